"""The main job: labelled text in; adapter, log, picture and table out. The training loop itself is engine/fit.py."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hf
from .engine.attach import attach, disabled
from .engine.counts import Counts, counts
from .engine.fit import fit
from .engine.merge import merge, unmerge
from .engine.method import Method
from .engine.store import CONFIG, WEIGHTS, save
from .files import output, size

LOG, PICTURE, SUMMARY = "log.jsonl", "curves.png", "summary.json"
HELD_OUT = 0.2  # of each class, where the data has no split of its own
TEST_NAMES = ("test", "validation", "valid", "dev")  # in a split column; the first that occurs is used


@dataclass(frozen=True)
class Job:
    """What `peft-kernels tune` was asked to do."""

    model: str
    data: str
    method: Method
    out: str
    targets: tuple[str, ...] | None = None
    epochs: int = 1
    batch_size: int = 32
    lr: float | None = None  # None: the method's own
    max_length: int | None = None  # tokens; None: 128, or less if the model takes less
    model_dropout: float | None = None  # the model's own dropout in training; None: as its config has it
    seed: int = 0
    text_column: str = "text"
    label_column: str = "label"
    split_column: str | None = None  # None: "split" if there is one
    device: str | None = None  # None: cuda if there is one
    force: bool = False

    def __post_init__(self):
        for name in ("epochs", "batch_size", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}; expected at least 1")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr {self.lr}; expected a positive number")
        if self.model_dropout is not None and not 0 <= self.model_dropout < 1:
            raise ValueError(f"--model-dropout {self.model_dropout}; expected a probability below 1")


@dataclass(frozen=True)
class Data:
    """Texts with the number of their class; no text is on both sides."""

    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]
    dropped: int  # rows of the train side whose text is in the test side too


# -- reading ----------------------------------------------------------------------------------------------------------


def read_data(path: str, text: str = "text", label: str = "label", split: str | None = None, seed: int = 0) -> Data:
    """Reads FILE.{tsv,csv,jsonl}, possibly .gz or .xz, and splits it.

    Tab-separated values have no quoting, comma-separated ones do, .jsonl has one object per line. Without a split
    column a fifth of each class is held out. FileNotFoundError; ValueError for a broken file or useless data.
    """
    rows = list(_rows(Path(path)))
    if not rows:
        raise ValueError(f"{path} has no rows; expected texts with labels")
    for column, option in ((text, "--text-column"), (label, "--label-column"), (split, "--split-column")):
        if column is not None and not any(column in row for row in rows):
            has = ", ".join(rows[0])
            raise ValueError(f"{path} has no column {column!r}, it has {has}; name the right one with {option}")
    if split is None and "split" in rows[0]:
        split = "split"
    items = []
    for n, row in enumerate(rows, 1):
        values = [row.get(column) for column in (text, label, split) if column is not None]
        if any(v is None or str(v).strip() == "" for v in values):
            raise ValueError(f"{path}: row {n} has no value in one of {text}, {label}{f', {split}' if split else ''}")
        items.append([str(v) for v in values])
    classes = sorted({item[1] for item in items})
    if len(classes) < 2:
        raise ValueError(f"{path}: column {label!r} holds the one class {classes[0]!r}; expected at least two")
    train, test = _given(path, items, split) if split else _cut(path, items, seed)
    held_out = {t for t, _ in test}
    kept = [(t, y) for t, y in train if t not in held_out]
    if not kept:
        raise ValueError(f"{path}: every training text is also a test text; nothing is left to train on")
    learned = {y for _, y in kept}
    if unseen := {y for _, y in test} - learned:
        raise ValueError(f"{path}: class {min(unseen)!r} is only in the test rows; every class needs training rows")
    if len(learned) < 2:
        raise ValueError(f"{path}: the training rows hold the one class {min(learned)!r}; expected at least two")
    classes = sorted(learned)
    number = {name: i for i, name in enumerate(classes)}
    return Data([(t, number[y]) for t, y in kept], [(t, number[y]) for t, y in test], classes, len(train) - len(kept))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    suffixes = [s.lower() for s in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".xz") else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in (".tsv", ".csv", ".jsonl"):
        raise ValueError(f"{path} is no data file by its name; expected .tsv, .csv or .jsonl, possibly with .gz or .xz")
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    opener: Any = {"": open, ".gz": gzip.open, ".xz": lzma.open}[packed]
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from _objects(path, file) if kind == ".jsonl" else _table(path, file, kind)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole {packed} file ({error})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not {kind[1:]} in UTF-8 ({error})") from None


def _table(path: Path, file: Any, kind: str) -> Iterator[dict[str, str]]:
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"strict": True}
    reader = csv.reader(file, **style)
    header = next(reader, None) or []
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(f"{path}: line {reader.line_num} has {len(row)} fields; the header has {len(header)}")
        yield dict(zip(header, row, strict=True))


def _objects(path: Path, file: Any) -> Iterator[dict[str, Any]]:
    for n, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {n} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {n} is no JSON object")
            yield row


def _given(path: str, items: list[list[str]], column: str) -> tuple[list, list]:
    found = Counter(item[2] for item in items)
    test_name = next((name for name in TEST_NAMES if name in found), None)
    if "train" not in found or test_name is None:
        some = ", ".join(sorted(found)[:5])
        raise ValueError(f"{path}: column {column!r} holds {some}; expected train and one of {', '.join(TEST_NAMES)}")
    train, test = ([(t, y) for t, y, s in items if s == side] for side in ("train", test_name))
    return train, test


def _cut(path: str, items: list[list[str]], seed: int) -> tuple[list, list]:
    """Holds out a part of each class, whole texts at a time, so that no text is on both sides."""
    by_class: dict[str, list[str]] = {}
    for text, label in sorted({item[0]: item[1] for item in reversed(items)}.items()):
        by_class.setdefault(label, []).append(text)
    rng = random.Random(seed)
    held_out: set[str] = set()
    for label in sorted(by_class):
        texts = rng.sample(by_class[label], len(by_class[label]))
        held_out.update(texts[: round(HELD_OUT * len(texts))])
    if not held_out:
        raise ValueError(f"{path} has too few texts per class to hold some out; add texts or a split column")
    test = list(dict.fromkeys((t, y) for t, y in items if t in held_out))
    return [(t, y) for t, y in items if t not in held_out], test


# -- batches ----------------------------------------------------------------------------------------------------------


class Batches:
    """Batches of texts of similar length: shuffled by seed and epoch for fit, in order of length for `outputs`."""

    def __init__(self, rows: Sequence[tuple[str, int]], tokenizer: Any, *, max_length: int, batch_size: int, seed: int):
        encoded = tokenizer([t for t, _ in rows], truncation=True, max_length=max_length)
        self.examples = [{key: encoded[key][i] for key in encoded} for i in range(len(rows))]
        self.lengths = [len(ids) for ids in encoded["input_ids"]]
        self.labels = torch.tensor([y for _, y in rows])  # [n]
        self.tokenizer, self.batch_size, self.seed, self.epoch = hf.quiet_padding(tokenizer), batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for members in self.shuffled():
            yield {**self.collate(members), "labels": self.labels[members]}

    def shuffled(self) -> list[list[int]]:
        """Sorting inside 16 batches at a time saves most of the padding and keeps the order random enough."""
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = rng.sample(range(len(self.examples)), len(self.examples))
        span, length = 16 * self.batch_size, self.lengths.__getitem__
        order = [i for k in range(0, len(order), span) for i in sorted(order[k : k + span], key=length)]
        batches = self._sliced(order)
        rng.shuffle(batches)
        return batches

    def sorted(self) -> list[list[int]]:
        return self._sliced(sorted(range(len(self.examples)), key=self.lengths.__getitem__))

    def collate(self, members: list[int]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad([self.examples[i] for i in members], return_tensors="pt"))

    def _sliced(self, order: list[int]) -> list[list[int]]:
        return [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]


@torch.inference_mode()
def outputs(batches: Batches, device: torch.device, compute: Any) -> Tensor:
    """compute(batch) -> [rows, width] for every example, in the order of the data, on the CPU in fp32."""
    parts, order = [], []
    for members in batches.sorted():
        batch = {key: value.to(device) for key, value in batches.collate(members).items()}
        parts.append(compute(batch).float().cpu())
        order += members
    return torch.cat(parts)[torch.tensor(order).argsort()]


def logits(model: nn.Module, batches: Batches) -> Tensor:
    """The model's class scores [n, classes] in eval mode."""
    model.eval()
    return outputs(batches, _device_of(model), lambda batch: model(**batch).logits)


def features(model: nn.Module, batches: Batches) -> Tensor:
    """L2-normalised mean of the last hidden states [n, width], what the linear probe reads."""
    model.eval()
    body = hf.backbone(model)

    def pooled(batch: dict[str, Tensor]) -> Tensor:
        hidden = body(**batch).last_hidden_state  # [rows, t, d]
        mask = batch["attention_mask"].unsqueeze(-1)  # [rows, t, 1]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    return outputs(batches, _device_of(model), pooled)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# -- the probe --------------------------------------------------------------------------------------------------------


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int = 0) -> dict[str, Any]:
    """A converged linear probe: what the frozen features give without tuning, the figure a tuned model has to beat.

    (features, labels) twice. C is chosen on a tenth of the training rows, never on the test rows.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    (x, y), (x_test, y_test) = ([t.numpy() for t in side] for side in (train, test))
    order = random.Random(seed).sample(range(len(y)), len(y))
    order.sort(key=y.__getitem__)  # by class: every tenth is then a tenth of each class
    chosen, rest = order[5::10], [i for n, i in enumerate(order) if n % 10 != 5]
    # Each fit starts from the one before, which is several times faster and ends at the same place: the loss is convex.
    best, limit = 1.0, 2000
    model = LogisticRegression(max_iter=limit, tol=1e-6, warm_start=True)
    with warnings.catch_warnings(), threadpool_limits(1):  # these matrices are too small to share out
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as "converged" instead
        if chosen and len(set(y[rest])) > 1:
            scores = {}
            for c in (0.3, 1.0, 3.0, 10.0, 30.0):
                scores[c] = model.set_params(C=c).fit(x[rest], y[rest]).score(x[chosen], y[chosen])
            best = max(scores, key=scores.__getitem__)
        model.set_params(C=best, warm_start=False).fit(x, y)
    converged = bool(model.n_iter_.max() < limit)
    return {"accuracy": float(model.score(x_test, y_test)), "C": best, "converged": converged}


# -- the job ----------------------------------------------------------------------------------------------------------


def tune(job: Job, *, progress: bool = True) -> dict[str, Any]:
    """Runs the job and returns its summary, which is also in OUT/summary.json.

    Everything is written into a hidden directory beside OUT and renamed at the end, so OUT is whole or absent.
    """
    hf.need("tqdm", "sklearn", "matplotlib", "transformers")
    with output(job.out, job.force, SUMMARY) as directory:
        summary, log = _run(job, directory, progress)
        (directory / LOG).write_text("".join(json.dumps(row) + "\n" for row in log))
        draw(directory / PICTURE, log, summary)
        summary["files"] = [CONFIG, WEIGHTS, LOG, PICTURE, SUMMARY]
        (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _run(job: Job, directory: Path, progress: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    began = time.perf_counter()
    data = read_data(job.data, job.text_column, job.label_column, job.split_column, job.seed)
    torch.manual_seed(job.seed)  # the new head's first values
    model, tokenizer = hf.load_classifier(job.model, data.classes, job.model_dropout)
    length = _length(job, hf.max_length(model, tokenizer))
    cuda = torch.cuda.is_available() if job.device is None else job.device.startswith("cuda")
    model.to(job.device or ("cuda" if cuda else "cpu"))
    # The new head is trained too, unless the method trains the whole model anyway. Attached before the probe runs, so
    # that a bad target costs no waiting.
    whole = "model" in (job.targets or job.method.roles)
    attach(model, job.method, job.targets, seed=job.seed, train=() if whole else hf.head(model))
    options = {"max_length": length, "batch_size": job.batch_size, "seed": job.seed}
    train, test = (Batches(rows, tokenizer, **options) for rows in (data.train, data.test))

    probe_began = time.perf_counter()
    with disabled(model):
        known, held_out = ((features(model, side), side.labels) for side in (train, test))
    baseline = probe(known, held_out, seed=job.seed)
    probe_seconds = time.perf_counter() - probe_began

    last, away = {}, [0.0, 0.0]  # wall and CPU seconds spent on evaluation, which are no training seconds

    def on_epoch(epoch: int, model: nn.Module) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        last["logits"] = scores = logits(model, test)
        away[0] += time.perf_counter() - wall
        away[1] += time.process_time() - cpu
        return {"accuracy": accuracy(scores, test.labels), "test_loss": _cross_entropy(scores, test.labels)}

    wall, cpu = time.perf_counter(), time.process_time()
    log = fit(model, train, epochs=job.epochs, lr=job.lr, seed=job.seed, progress=progress, on_epoch=on_epoch)
    seconds = time.perf_counter() - wall - away[0]
    cpu_seconds = time.process_time() - cpu - away[1]

    save(model, directory)
    epochs = [row for row in log if "accuracy" in row]
    summary = {
        "model": job.model,
        "data": {
            "file": job.data,
            "train": len(data.train),
            "test": len(data.test),
            "classes": data.classes,
            "dropped": data.dropped,
        },
        "method": job.method.to_json(),
        "targets": list(job.targets or job.method.roles),
        "settings": {
            "epochs": job.epochs,
            "batch_size": job.batch_size,
            "lr": job.lr or job.method.lr,
            "max_length": length,
            "model_dropout": job.model_dropout,
            "seed": job.seed,
            "threads": torch.get_num_threads(),
            "device": str(_device_of(model)),
        },
        "accuracy": {"probe": baseline["accuracy"], "tuned": epochs[-1]["accuracy"]},
        "probe": baseline,
        "epochs": epochs,
        "counts": asdict(counts(model)),
        "merge": merged_check(model, test, last["logits"]),
        "peak_memory_bytes": peak_memory(cuda),
        "adapter_bytes": (directory / WEIGHTS).stat().st_size,
        "seconds": {
            "training": seconds,
            "training_cpu": cpu_seconds,
            "evaluation": away[0],
            "probe": probe_seconds,
            "total": time.perf_counter() - began,
        },
    }
    return summary, log


def _length(job: Job, longest: int | None) -> int:
    if job.max_length and longest and job.max_length > longest:
        raise ValueError(f"--max-length {job.max_length}; {job.model} takes at most {longest} tokens")
    return job.max_length or min(128, longest or 128)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(-1) == labels).double().mean().item()


def _cross_entropy(scores: Tensor, labels: Tensor) -> float:
    return nn.functional.cross_entropy(scores, labels).item()


def merged_check(model: nn.Module, test: Batches, adapted: Tensor) -> dict[str, Any]:
    """Merges, predicts the test rows again, unmerges: how many predictions stay, and the largest logit difference."""
    try:
        merge(model)
    except RuntimeError as error:  # a method without a weight-space form is a fact about it, not a failure
        return {"merged": False, "reason": str(error)}
    scores = logits(model, test)
    unmerge(model)
    same = (scores.argmax(-1) == adapted.argmax(-1)).sum().item()
    difference = (scores - adapted).abs().max().item()
    return {"merged": True, "same": same, "of": len(scores), "largest_difference": difference}


def peak_memory(cuda: bool) -> int:
    """Bytes: of the GPU where the model is on one, else of this whole process."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- what comes out ---------------------------------------------------------------------------------------------------


def table(summary: dict[str, Any]) -> str:
    """The one table that a run prints."""
    n, merged, seconds = Counts(**summary["counts"]), summary["merge"], summary["seconds"]
    settings, data, base = summary["settings"], summary["data"], summary["probe"]
    tuned = summary["accuracy"]["tuned"]
    gain = 100 * (tuned - base["accuracy"])
    if merged["merged"]:
        check = f"{merged['same']:,} of {merged['of']:,}"
        note = f"predictions the same; largest logit difference {merged['largest_difference']:.1e}"
    else:
        check, note = "no", merged["reason"]
    where = "of the GPU" if settings["device"].startswith("cuda") else "of the whole process"
    rows = [
        (
            "accuracy, linear probe",
            f"{base['accuracy']:.1%}",
            f"on frozen features, C = {base['C']:g}{'' if base['converged'] else ', NOT converged'}",
        ),
        ("accuracy, tuned", f"{tuned:.1%}", f"{gain:+.1f} points; {data['test']:,} held-out texts"),
        ("trainable", f"{n.trainable:,}", f"{n.trainable / n.total:.3%} of the model"),
        ("changed", f"{n.changed:,}", "numbers of the model that a merge changes"),
        ("rank", f"{n.rank:,}", "of the change, summed over its matrices"),
        ("stored", f"{n.stored:,}", "numbers in the adapter"),
        ("total", f"{n.total:,}", "numbers in the model"),
        ("adapter file", size(summary["adapter_bytes"]), WEIGHTS),
        (
            "training",
            f"{seconds['training']:.1f} s",
            f"{seconds['training_cpu']:.0f} s of CPU; epochs x texts: {settings['epochs']} x {data['train']:,}",
        ),
        ("peak memory", size(summary["peak_memory_bytes"]), where),
        ("merged model", check, note),
    ]
    names = Path(summary["model"]).name, Path(data["file"]).name
    title = f"{summary['method']['method']} on {names[0]}; {names[1]}, {len(data['classes'])} classes"
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{name:<{left}}  {value:>{right}}  {note}" for name, value, note in rows]
    return "\n".join([title, "-" * max(map(len, lines)), *lines])


def draw(path: Path, log: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Loss by step and accuracy by epoch, beside the probe's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would ask for a display
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [row for row in log if "step" in row]
    epochs = [row for row in log if "accuracy" in row]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    loss = [row["loss"] for row in steps]
    left.plot([row["step"] for row in steps], loss, color="0.75", linewidth=0.8, label="train, each batch")
    left.plot([row["step"] for row in steps], _smoothed(loss), color="C0", label="train, running mean")
    ends = [max(row["step"] for row in steps if row["epoch"] == epoch["epoch"]) for epoch in epochs]
    left.plot(ends, [row["test_loss"] for row in epochs], "o", color="C1", label="held out, each epoch")
    left.set(title="Loss", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    left.legend(frameon=False)

    values = [100 * row["accuracy"] for row in epochs]
    name = summary["method"]["method"]
    right.plot([row["epoch"] for row in epochs], values, "o-", color="C1", label=f"{name}, tuned")
    for row, value in zip(epochs, values, strict=True):
        right.annotate(f"{value:.1f}", (row["epoch"], value), textcoords="offset points", xytext=(0, 7), ha="center")
    base = 100 * summary["accuracy"]["probe"]
    right.axhline(base, color="0.4", linestyle="--", label=f"linear probe on frozen features, {base:.1f}")
    right.set(title="Accuracy on held-out texts", xlabel="epoch", ylabel="%")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = min([base, *values]), max([base, *values])
    margin = max(1.0, 0.25 * (high - low))
    right.set(xlim=(0.5, len(epochs) + 0.5), ylim=(low - margin, high + 2 * margin))  # room for the legend
    right.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)


def _smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    out, mean = [], 0.0
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**n))
    return out
