"""One trial of a comparison in a process of its own: a JSON job on stdin, JSON events and its rows on stdout."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batches, device_of
from .bench.measure import measure, ratio
from .data import Columns, read_data
from .engine.attach import attach, detach, tuners
from .engine.calibrate import calibrate
from .engine.counts import counts
from .engine.fit import fit
from .engine.life import eject
from .engine.merge import merge
from .engine.method import Method, Replica
from .engine.store import WEIGHTS, save
from .methods import Head
from .probe import features, linear_probe
from .tasks import Classify
from .train import Job, Setup

BASELINES = ("class_mean", "linear_probe")  # of the frozen base; they train no adapter
SECOND = (1500, 1000)  # rows of the second task, to learn a probe on and to score it
TIMED = 4  # batches of test rows that the inference time is of

Say = Callable[[str, float], None]  # (what is going on, how much of it is done)


def main() -> int:
    """The process: whatever goes wrong with the method is a row."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print must not come between
    words = json.load(sys.stdin)
    if words["threads"]:
        torch.set_num_threads(words["threads"])
    last = [0.0]

    def say(stage: str, done: float) -> None:
        if time.monotonic() - last[0] > 0.1:
            last[0] = time.monotonic()
            print(json.dumps({"stage": stage, "done": min(done, 1.0)}), file=out)

    try:
        found: dict[str, Any] = {"found": run(words, say)}
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the others are to go on
        traceback.print_exc()
        text = " ".join(str(error).split())
        found = {"failed": text if isinstance(error, (ValueError, RuntimeError)) and text else f"{error!r}"}
    print(json.dumps(found), file=out)
    return 0


def run(words: dict[str, Any], say: Say) -> Any:
    """What the parent asks for -> figures of a method, or what `baselines` found."""
    say("loading", 0.0)
    job = job_from(words["job"])
    setup = Setup(job)
    second = SecondTask(setup, words["second"]) if words["second"] else None
    if job.method.key == Head.key and job.train is None:  # what every other method trains beside itself
        targets = setup.task.trained(setup.model)
        job = dataclasses.replace(job, targets=targets, train=())
    warm(setup)
    if words["baselines"]:
        return baselines(setup, second, say)
    return method_row(job, setup, second, words["seconds"], say)


def job_to(job: Job) -> dict[str, Any]:
    return {**vars(job), "method": job.method.to_json()}


def job_from(data: dict[str, Any]) -> Job:
    tuples = {name: tuple(data[name]) if data[name] is not None else None for name in ("targets", "train")}
    further = tuple((name, file) for name, file in data["eval_data"])
    return Job(**{**data, **tuples, "eval_data": further, "method": Method.from_json(data["method"])})


# -- a method ---------------------------------------------------------------------------------------------------------


def method_row(job: Job, setup: Setup, second: SecondTask | None, seconds: float, say: Say) -> dict[str, Any]:
    """Trains, and measures what that took and what came out."""
    head, task = head_counts(job, setup), setup.task
    memory = Memory(job.on_cuda)
    model = setup.attach(job)
    whole = {path for path, tuner in tuners(model, "default") if isinstance(tuner, Replica)}
    if not whole & {"", *task.trained(model)}:  # it reads the classes otherwise, as WARP does
        head = dict.fromkeys(head, 0)
    batches = setup.batches("train")
    watch = Watch()
    calibrate(model, Watched(batches, lambda taken: say("calibrating", taken / len(batches))), progress=False)
    calibration = watch.read()
    began, length = time.perf_counter(), job.duration

    def training(taken: int) -> None:
        wanted = length.get("steps", 0) * job.accumulate or length.get("epochs", 0) * len(batches)
        say("training", taken / wanted if wanted else (time.perf_counter() - began) / length["seconds"])

    log = fit(model, Watched(batches, training), **job.training, progress=False)
    wall, cpu = watch.read()
    peak = memory.peak()
    say("scoring", 0.0)
    trained = max([counts(model).trainable, *(row["trainable"] for row in log if "phase" in row)])
    found = counts(eject(model))  # what training alone needed is not stored, nor in what follows
    figures, _ = task.evaluate(model, setup.batches("test"))
    row = {
        **{name: figures[name] for name in ("accuracy", "macro_f1")},
        "trainable": trained - head["trainable"],
        **{name: getattr(found, name) - head[name] for name in ("changed", "rank", "stored")},
        "bytes": file_bytes(model) - head["bytes"],
        "peak_bytes": peak,
        "train_cpu_s": cpu,
        "train_wall_s": wall,
        "calibration_s": calibration[0],
        "steps": sum("lr" in row for row in log),
        "second_accuracy": second.accuracy(model, say) if second else None,
    }
    return {**row, **inference(model, setup, seconds, say)}


def head_counts(job: Job, setup: Setup) -> dict[str, int]:
    """Of the head, to be left out of a method's figures; zeros for the head alone."""
    names = ("trainable", "changed", "rank", "stored")
    paths = setup.task.trained(setup.model) if job.train is None else job.train
    if not paths:
        return {**dict.fromkeys(names, 0), "bytes": 0}
    attach(setup.model, Head(), paths)
    found = counts(setup.model)
    kept = {**{name: getattr(found, name) for name in names}, "bytes": found.bytes}
    detach(setup.model)
    return kept


def file_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as directory:
        save(model, Path(directory) / "adapter")
        return (Path(directory) / "adapter" / WEIGHTS).stat().st_size


def inference(model: nn.Module, setup: Setup, seconds: float, say: Say) -> dict[str, Any]:
    """Times of the adapted and of the merged model over those of the base, which takes turns with each."""
    base, _ = setup.task.load(setup.job.model, None)
    base.to(device_of(model)).eval()
    test = setup.batches("test")
    members = test.sorted()
    chosen = [members[(2 * k + 1) * len(members) // (2 * TIMED)] for k in range(min(TIMED, len(members)))]
    inputs = []
    for rows in chosen:
        batch = {key: t.to(device_of(model)) for key, t in test.collate(rows).items()}
        del batch["labels"]
        inputs.append(batch)

    def over_base(name: str) -> dict[str, float]:
        say(f"timing, {name}", 0.5)
        with torch.inference_mode():
            rivals = {n: [lambda m=m, x=x: m(**x) for x in inputs] for n, m in (("base", base), (name, model))}
            times = measure(rivals, seconds, device_of(model).type)
        wall, cpu = ratio(times[name].wall, times["base"].wall), ratio(times[name].cpu, times["base"].cpu)
        return {f"{name}_ratio": wall, f"{name}_cpu_ratio": cpu}

    row: dict[str, Any] = over_base("inference")
    try:
        merge(model)
    except RuntimeError as error:  # a method without a weight-space form is a fact about it, not a failure
        return {**row, "merged_ratio": None, "merged_cpu_ratio": None, "not_merged": " ".join(str(error).split())}
    return {**row, **over_base("merged")}


# -- the base alone ---------------------------------------------------------------------------------------------------


def baselines(setup: Setup, second: SecondTask | None, say: Say) -> dict[str, Any]:
    """{"rows": of BASELINES, "second": the base's accuracy on the second task, "head": the numbers of the head}"""
    head, task = head_counts(setup.job, setup), setup.task
    assert isinstance(task, Classify)
    say("features", 0.0)
    held_out, wanted = features(setup.model, setup.batches("test"))
    memory, watch = Memory(setup.job.on_cuda), Watch()
    x, y = features(setup.model, setup.batches("train"))
    learned, rows = watch.read(), []
    for name in BASELINES:
        say(name.replace("_", " "), 0.5)
        watch = Watch()
        if name == "linear_probe":
            predicted, facts = linear_probe((x, y), held_out, setup.seed)
        else:
            predicted, facts = class_mean((x, y), held_out), {}
        wall, cpu = (own + before for own, before in zip(watch.read(), learned, strict=True))
        numbers = len(task.classes) * (x.shape[1] + (name == "linear_probe"))
        row = {"method": name, "settings": facts, **task.agreement(predicted, wanted)}
        costs = {"peak_bytes": memory.peak(), "train_cpu_s": cpu, "train_wall_s": wall}
        rows.append({**row, "trainable": numbers if facts else 0, "stored": numbers, **costs})
    return {"rows": rows, "second": second.accuracy(setup.model, say) if second else None, "head": head}


def class_mean(train: tuple[Tensor, Tensor], test: Tensor) -> Tensor:
    """The class whose mean of training features [n, width] is nearest in angle to each of the features `test`."""
    x, y = train
    means = torch.stack([x[y == c].mean(0) for c in range(int(y.max()) + 1)])
    return (test @ nn.functional.normalize(means, dim=-1).T).argmax(-1)


class SecondTask:
    """Other texts with other classes: what a linear probe on the model's features still tells of them.

    An adapter that is switched off leaves the base's features, all of them; this is of one that stays on.
    """

    def __init__(self, setup: Setup, path: str):
        job = setup.job
        data = read_data(path, Columns(job.text_column, job.label_column or "label"), seed=job.seed)
        task, rows = Classify(data), (data.train[: SECOND[0]], data.test[: SECOND[1]])
        self.train, self.test = (
            Batches(own, task.encode(setup.tokenizer, own, setup.length), setup.tokenizer, job.batch_size, job.seed)
            for own in rows
        )
        self.seed = job.seed

    def accuracy(self, model: nn.Module, say: Say) -> float:
        say("second task", 0.5)
        known, (held_out, wanted) = features(model, self.train), features(model, self.test)
        predicted, _ = linear_probe(known, held_out, self.seed)
        return (predicted == wanted).double().mean().item()


# -- measuring --------------------------------------------------------------------------------------------------------


class Watch:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class Memory:
    """The most memory that this process held since it was made, beyond what it held then: of the GPU, or resident."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        gc.collect()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):  # glibc's: memory that was freed would hide what is taken
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # Linux: the high-water mark falls to what is held now
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident("VmRSS")

    def peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return max(0, _resident("VmHWM") - self.before)


def _resident(name: str) -> int:
    """Bytes; where the system has no /proc, the high-water mark for both."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def warm(setup: Setup) -> None:
    """What a first call allocates for good, and the pages of a mapped file that it reads, are no method's."""
    test = setup.batches("test")
    setup.task.scores(setup.model, Batches(test.rows[:64], test.examples[:64], test.tokenizer, 32, 0))


class Watched:
    """Batches that tell how many were taken."""

    def __init__(self, batches: Batches, tell: Callable[[int], None]):
        self.batches, self.tell, self.taken = batches, tell, 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield batch
            self.taken += 1
            self.tell(self.taken)


if __name__ == "__main__":
    sys.exit(main())
