"""The main job: a data file in; adapter, log, picture and table out. The training loop itself is engine/fit.py."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hf, report
from .batches import Batches, device_of
from .data import Columns, Data, Row, read_data, read_test
from .engine.attach import attach, detach, tuners
from .engine.calibrate import calibrate
from .engine.counts import counts
from .engine.fit import OnEpoch, fit
from .engine.life import eject
from .engine.merge import merge, unmerge
from .engine.method import Method
from .engine.search import search
from .engine.store import CONFIG, WEIGHTS, save
from .files import output
from .methods.full import Head
from .quant import footprint
from .resume import Checkpoint, digest
from .tasks import Task, tasks
from .teacher import Teacher

LOG, PICTURE, SUMMARY = "log.jsonl", "curves.png", "summary.json"
PRECISIONS = ("fp32", "bf16", "fp16")
# Of the job, what only a training by gradients has.
_OF_GRADIENTS = (
    "teacher",
    "budget",
    "patience",
    "epochs",
    "accumulate",
    "lr",
    "precision",
    "checkpointing",
    "model_dropout",
)


@dataclass(frozen=True)
class Job:
    """What `peft-kernels tune` was asked to do."""

    model: str
    data: str
    method: Method
    out: str
    task: str = "classify"
    targets: tuple[str, ...] | None = None  # None: the method's own
    train: tuple[str, ...] | None = None  # modules trained whole; None: the task's own
    eval_data: tuple[tuple[str, str], ...] = ()  # (name, file), scored before and after
    validation: float | None = None  # the part of the training rows that is held out for choosing
    teacher: str | None = None  # directory of a model or an adapter that knows the task
    temperature: float | None = None  # of the teacher's and the student's predictions; None: that of Distillation
    teacher_weight: float | None = None  # of the teacher in the loss; None: that of Distillation
    patience: int | None = None  # epochs without a lower validation loss before training stops
    search: str | None = None  # without gradients: evaluations, as "2000", or seconds, as "60s"
    sigma: float | None = None  # of the search; None: that of pk.search
    draw: int | None = None  # batches of the search, anew for each generation; None: all
    epochs: int | None = None  # None: 1, or what the budget comes to
    budget: str | None = None  # of training: 60s, 2m or 100steps
    batch_size: int = 32
    accumulate: int = 1  # batches per optimizer step
    lr: float | None = None  # None: the method's own
    max_length: int | None = None  # tokens; None: 128, or less if the model takes less
    model_dropout: float | None = None  # the model's own dropout in training; None: as its config has it
    precision: str = "fp32"  # of the forward in training
    checkpointing: bool = False
    seed: int = 0
    text_column: str = "text"
    label_column: str | None = None  # None: "label", if the task has labels
    split_column: str | None = None  # None: "split" if there is one
    device: str | None = None  # None: cuda if there is one
    checkpoint_every: int | None = None  # steps, besides the end of each epoch
    resume: bool = False
    force: bool = False

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "max_length", "patience", "checkpoint_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}; expected at least 1")
        if self.budget is not None:
            budget(self.budget)
            if self.epochs is not None:
                raise ValueError(f"--epochs {self.epochs} and --budget {self.budget}; expected one of them")
        for name, value, words in (("task", self.task, tasks()), ("precision", self.precision, PRECISIONS)):
            if value not in words:
                raise ValueError(f"--{name} {value}; expected one of {', '.join(words)}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr {self.lr}; expected a positive number")
        if self.model_dropout is not None and not 0 <= self.model_dropout < 1:
            raise ValueError(f"--model-dropout {self.model_dropout}; expected a probability below 1")
        if self.validation is not None and not 0 < self.validation < 1:
            raise ValueError(f"--validation {self.validation}; expected a fraction of the training rows, such as 0.1")
        for name in ("temperature", "teacher_weight"):
            if (value := getattr(self, name)) is not None and self.teacher is None:
                raise ValueError(f"--{name.replace('_', '-')} {value:g} needs --teacher PATH")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature:g}; expected a positive number")
        if self.teacher_weight is not None and not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"--teacher-weight {self.teacher_weight:g}; expected a number from 0 to 1")
        if self.search is None:
            for name in ("sigma", "draw"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"--{name} {value} needs --search EVALUATIONS")
        else:
            self.bounds()
            for field in fields(self):
                if field.name in _OF_GRADIENTS and (value := getattr(self, field.name)) != field.default:
                    name = field.name.replace("_", "-")
                    raise ValueError(f"--{name} is of training by gradients, and --search takes none; leave one out")
        if self.patience is not None and self.validation is None:
            raise ValueError("--patience stops on the validation loss; add --validation FRACTION")
        if self.label_column is not None and not tasks()[self.task].labelled:
            raise ValueError(f"--label-column {self.label_column}; --task {self.task} reads no labels")
        if self.precision == "fp16" and not self.on_cuda:
            raise ValueError("--precision fp16 needs a GPU; bf16 works on the CPU too")
        names = [name for name, _ in self.eval_data]
        for name in names:
            if not name or names.count(name) > 1 or name in ("train", "validation", "test"):
                raise ValueError(f"--eval-data {name}=...; expected a name of its own, other than train and test")

    def bounds(self) -> dict[str, Any]:
        """Where the search ends, as pk.search takes it."""
        text = str(self.search)
        try:
            if text.endswith("s"):
                return {"evaluations": None, "seconds": float(text[:-1])}
            return {"evaluations": int(text)}
        except ValueError:
            raise ValueError(f"--search {text}; expected evaluations, such as 2000, or seconds, such as 60s") from None

    @property
    def duration(self) -> dict[str, Any]:
        """Of training, as fit takes it."""
        return {"epochs": self.epochs or 1} if self.budget is None else budget(self.budget)

    @property
    def training(self) -> dict[str, Any]:
        """What of it fit takes, and decides the numbers."""
        precision = None if self.precision == "fp32" else self.precision
        return {
            **self.duration,
            "lr": self.lr,
            "seed": self.seed,
            "accumulate": self.accumulate,
            "precision": precision,
        }

    @property
    def on_cuda(self) -> bool:
        return torch.cuda.is_available() if self.device is None else self.device.startswith("cuda")

    def trained(self, task: Task, model: nn.Module) -> tuple[str, ...]:
        """The modules trained whole beside the method, unless it trains the whole model anyway."""
        if self.train is not None:
            return self.train
        return () if "model" in (self.targets or self.method.roles) else task.trained(model)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the interrupted one."""
        kept = {k: v for k, v in vars(self).items() if k not in ("out", "resume", "force", "checkpoint_every")}
        files = [self.data, *(file for _, file in self.eval_data)]
        return {**kept, "method": self.method.to_json(), "sha256 of the data": [digest(file) for file in files]}


def budget(text: str) -> dict[str, Any]:
    """A --budget as fit takes it: 60s, 1.5m or 2h are seconds of training, 100steps is steps."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|steps?)", text.strip())
    number = float(found[1]) if found else 0.0
    if not found or not number or (found[2].startswith("step") and number != int(number)):
        raise ValueError(f"--budget {text}; expected a time of training such as 60s, 2m or 1h, or 100steps")
    if found[2].startswith("step"):
        return {"steps": int(number)}
    return {"seconds": number * {"s": 1, "m": 60, "h": 3600}[found[2]]}


def tune(job: Job, *, progress: bool = True) -> dict[str, Any]:
    """Runs the job and returns its summary, which is also in OUT/summary.json.

    Everything is written into a hidden directory beside OUT and renamed at the end, so OUT is whole or absent. A run
    that did not end leaves OUT.checkpoint, from which one with resume=True continues to the same bits.
    KeyboardInterrupt then says so.
    """
    checkpoint = Checkpoint(job.out, job.identity(), resume=job.resume, force=job.force)
    with checkpoint.kept(), output(job.out, job.force, SUMMARY) as directory:
        setup = Setup(job)
        setup.try_on(job)
        setup.look()
        return run(job, setup, checkpoint, directory, progress)


class _Words:
    """Text -> ids without special tokens.   mask: the id of [MASK], or None."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.mask = tokenizer, tokenizer.mask_token_id

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Setup:
    """What does not depend on the method: rows, model, tokenizer, and the figures before tuning.

    A sweep shares one among its runs: each attaches to the same model and comes off without a trace, or, where it has
    quantised the model, the next loads it again.
    """

    def __init__(self, job: Job):
        self.began, self.job = time.perf_counter(), job
        kind = tasks()[job.task]
        hf.need("tqdm", "matplotlib", "transformers", *kind.needs)
        columns = Columns(job.text_column, (job.label_column or "label") if kind.labelled else None, job.split_column)
        self.data: Data = read_data(
            job.data,
            columns,
            parse=kind.parse,
            by_label=kind.by_label,
            validation=job.validation or 0.0,
            seed=job.seed,
        )
        self.task = kind(self.data)
        sides = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        self.rows: dict[str, list[Row]] = {name: rows for name, rows in sides.items() if rows}
        self.further = [name for name, _ in job.eval_data]
        for name, path in job.eval_data:
            self.rows[name] = read_test(path, columns, parse=kind.parse)
            self.task.check(path, self.rows[name])
        self.teacher = None if job.teacher is None else Teacher(job.teacher, self.task)
        self.load(job)
        takers = [(job.model, self.model)] + ([(self.teacher.source, self.teacher.model)] if self.teacher else [])
        self.length = _length(job, {name: hf.max_length(model, self.tokenizer) for name, model in takers})
        self.examples = {name: self.task.encode(self.tokenizer, rows, self.length) for name, rows in self.rows.items()}
        self.batch_size, self.seed = job.batch_size, job.seed
        self.baseline: dict[str, Any] = {}
        self.before: dict[str, dict[str, float]] = {}

    def load(self, job: Job) -> None:
        torch.manual_seed(job.seed)  # a new head's first values
        self.model, self.tokenizer = self.task.load(job.model, job.model_dropout)
        self.packed = footprint(self.model).packed  # as its files are
        if job.checkpointing:
            hf.checkpoint_blocks(self.model)
        self.model.to(job.device or ("cuda" if job.on_cuda else "cpu"))
        if self.teacher is not None:
            self.teacher.join(self.model, self.tokenizer)

    def batches(self, name: str, batch_size: int | None = None) -> Batches:
        size = self.batch_size if batch_size is None else batch_size
        return Batches(self.rows[name], self.examples[name], self.tokenizer, size, self.seed)

    def try_on(self, job: Job) -> None:
        """Attaches and detaches, so that a method or a teacher that does not fit costs no waiting."""
        if self.teacher is not None:
            batch = self.batches("train", 1).collate([0])
            self.teacher.try_out(self.model, {key: t.to(device_of(self.model)) for key, t in batch.items()})
        detach(self.attach(job))
        self.renew(job)

    def renew(self, job: Job) -> None:
        """Loads the model again if a method has quantised it."""
        if footprint(self.model).packed != self.packed:
            del self.model
            self.load(job)

    def attach(self, job: Job) -> nn.Module:
        self.renew(job)
        train = job.trained(self.task, self.model)
        return attach(self.model, self.method(job), job.targets, seed=job.seed, train=train)

    def method(self, job: Job) -> Method:
        """The job's, which knows the tokens of its words."""
        names = getattr(self.task, "classes", ())
        return job.method.spelled(_Words(self.tokenizer), names)

    def look(self) -> None:
        """Takes the figures before tuning."""
        began = time.perf_counter()
        self.baseline = self.task.baseline(self.model, self.batches("train"), self.batches("test"), self.seed)
        self.baseline_seconds = time.perf_counter() - began
        self.before = self.figures(self.further)
        if self.teacher is not None:
            self.teacher.look(self.batches("test"))
        self.seconds = time.perf_counter() - self.began

    def facts(self, job: Job) -> dict[str, Any]:
        """About the data."""
        return {
            "file": job.data,
            **{name: len(self.rows.get(name, ())) for name in ("train", "validation", "test")},
            "classes": getattr(self.task, "classes", None),
            "dropped": self.data.dropped,
        }

    def figures(self, names: Iterable[str]) -> dict[str, dict[str, float]]:
        return {name: self.task.evaluate(self.model, self.batches(name))[0] for name in names}


def run(job: Job, setup: Setup, checkpoint: Checkpoint, directory: Path, progress: bool) -> dict[str, Any]:
    """One run in a set-up: trains, writes everything into `directory`, leaves the model as it was; the summary."""
    began = time.perf_counter()
    model, task = setup.attach(job), setup.task
    if job.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    watched = "validation" if "validation" in setup.rows else "test"  # the test rows are not looked at without need
    latest: dict[str, tuple[dict[str, float], Tensor]] = {}  # of the epoch before: a last epoch is not scored twice
    away = [0.0, 0.0]  # wall and CPU seconds spent on evaluation, which are no training seconds

    def on_epoch(epoch: int, model: nn.Module) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        latest[watched] = task.evaluate(model, setup.batches(watched))
        away[0] += time.perf_counter() - wall
        away[1] += time.process_time() - cpu
        return {f"{watched}_{name}": value for name, value in latest[watched][0].items()}

    place = checkpoint.begin()
    wall, cpu = time.perf_counter(), time.process_time()
    if not checkpoint.resumed:
        calibrate(model, setup.batches("train", job.batch_size), progress=progress)
    teacher = taught = None
    if setup.teacher is not None:
        teacher = setup.teacher.distillation(job.temperature, job.teacher_weight)
        taught = setup.teacher.facts(teacher)
    if job.search:
        log = _searched(job, setup, model, on_epoch, checkpoint, progress)
    else:
        log = fit(
            model,
            setup.batches("train", job.batch_size),
            teacher=teacher,
            **job.training,
            progress=progress,
            on_epoch=on_epoch,
            patience=job.patience,
            checkpoint=place,
            checkpoint_every=job.checkpoint_every,
            resume=True,  # of what begin() left there
        )
    seconds = time.perf_counter() - wall - away[0]
    cpu_seconds = time.process_time() - cpu - away[1]

    test, scores = latest.get("test") or task.evaluate(model, setup.batches("test"))
    validation = setup.figures({"validation"} & setup.rows.keys()).get("validation")
    after = setup.figures(setup.further)
    # A phase of the training may have had more to train than what it leaves, and so has the network behind a prefix.
    trainable = max([counts(model).trainable, *(row["trainable"] for row in log if "phase" in row)])
    found = counts(eject(model))
    learned = {text for text, _ in setup.data.train}
    save(model, directory)
    summary = {
        "task": task.key,
        "model": job.model,
        "data": setup.facts(job),
        "method": setup.method(job).to_json(),
        "targets": list(job.targets or job.method.roles),
        "settings": {
            "train": list(job.trained(task, model)),
            "epochs": None if job.budget else job.epochs or 1,
            **{name: getattr(job, name) for name in ("budget", "batch_size", "accumulate", "validation", "patience")},
            "lr": job.lr or job.method.lr,
            "max_length": setup.length,
            **{name: getattr(job, name) for name in ("model_dropout", "precision", "checkpointing", "seed")},
            "threads": torch.get_num_threads(),
            "device": str(device_of(model)),
        },
        "baseline": setup.baseline,
        "teacher": taught,
        "test": test,
        "validation": validation,
        "eval_data": {
            name: {
                "file": file,
                "rows": len(setup.rows[name]),
                "trained_on": sum(text in learned for text, _ in setup.rows[name]),
                "before": setup.before[name],
                "after": after[name],
            }
            for name, file in job.eval_data
        },
        "epochs": [row for row in log if f"{watched}_loss" in row],
        "search": log[-2] if job.search else None,
        "steps": sum("lr" in row for row in log),
        "counts": {**asdict(found), "trainable": trainable},
        "index_bytes": _index_bytes(model),
        "base": _base(model),
        "merge": merged_check(model, task, setup.batches("test"), scores),
        "peak_memory_bytes": peak_memory(job.on_cuda),
        "adapter_bytes": (directory / WEIGHTS).stat().st_size,
        "seconds": {
            "training": seconds,
            "training_cpu": cpu_seconds,
            "evaluation": away[0],
            "baseline": setup.baseline_seconds,
            "total": setup.seconds + time.perf_counter() - began,
            "resumed": checkpoint.resumed,
        },
        "files": [CONFIG, WEIGHTS, LOG, PICTURE, SUMMARY],
    }
    detach(model)
    (directory / LOG).write_text("".join(json.dumps(row) + "\n" for row in log))
    report.draw(directory / PICTURE, log, summary)
    (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _searched(
    job: Job, setup: Setup, model: nn.Module, on_epoch: OnEpoch, checkpoint: Checkpoint, progress: bool
) -> list[dict[str, Any]]:
    """The log of a search instead of a training, with a row of its end like that of an epoch.

    A head is not searched: it has too many numbers, and a regression finds them.
    """
    if not checkpoint.resumed:
        setup.task.solve(model, setup.batches("train"), job.seed)
    for _, tuner in tuners(model, "default"):
        if isinstance(tuner.cfg, Head):
            tuner.requires_grad_(False)
    chosen: dict[str, Any] = {} if job.sigma is None else {"sigma": job.sigma}
    log = search(
        model,
        setup.batches("train", job.batch_size),
        draw=job.draw,
        seed=job.seed,
        progress=progress,
        checkpoint=checkpoint.directory,
        checkpoint_every=job.checkpoint_every or 50,
        resume=True,
        **job.bounds(),
        **chosen,
    )
    return [*({**row, "epoch": 1} for row in log), {"epoch": 1, "loss": log[-1]["loss"], **on_epoch(1, model)}]


def _index_bytes(model: nn.Module) -> int:
    """Of the adapter's bytes, those that say where its numbers belong; whole copies of modules have other integers."""
    kept = (t for _, tuner in tuners(model, "default") if not tuner.opaque for t in tuner.state_dict().values())
    return sum(t.numel() * t.element_size() for t in kept if not t.is_floating_point())


def _base(model: nn.Module) -> dict[str, Any]:
    found = footprint(model)
    return {"bytes": found.bytes, "dense_bytes": found.dense_bytes, "packed": found.packed}


def _length(job: Job, longest: dict[str, int | None]) -> int:
    """In tokens, of which each model takes at most so many."""
    for model, most in longest.items():
        if job.max_length and most and job.max_length > most:
            raise ValueError(f"--max-length {job.max_length}; {model} takes at most {most} tokens")
    return job.max_length or min(128, *(most or 128 for most in longest.values()))


def merged_check(model: nn.Module, task: Task, test: Batches, adapted: Tensor) -> dict[str, Any]:
    """Merges, scores the test rows again, unmerges: how many predictions stay, the largest difference of scores."""
    try:
        merge(model)
    except RuntimeError as error:  # a method without a weight-space form is a fact about it, not a failure
        return {"merged": False, "reason": str(error)}
    scores = task.scores(model, test)
    unmerge(model)
    facts: dict[str, Any] = {"merged": True, "largest_difference": (scores - adapted).abs().max().item()}
    before, after = task.decided(adapted), task.decided(scores)
    if before is not None and after is not None:
        facts |= {"same": (before == after).sum().item(), "of": len(scores)}
    return facts


def peak_memory(cuda: bool) -> int:
    """Bytes: of the GPU where the model is on one, else of this whole process."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
