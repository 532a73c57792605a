"""The main job: labelled text in; adapter, log, picture and table out. The training loop itself is engine/fit.py."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hf
from .engine.attach import attach
from .engine.counts import Counts, counts
from .engine.fit import fit
from .engine.merge import merge, unmerge
from .engine.method import Method
from .engine.store import CONFIG, WEIGHTS, save

LOG, PICTURE, SUMMARY = "log.jsonl", "curves.png", "summary.json"
HELD_OUT = 0.2  # of each class, where the data has no split of its own
TRAIN_NAMES, TEST_NAMES = ("train",), ("test", "validation", "valid", "dev")  # of TEST_NAMES the first that occurs counts


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

    Tab-separated values have no quoting, comma-separated ones do, .jsonl has one object per line. Without a split column
    a fifth of each class is held out. FileNotFoundError; ValueError for a broken file, missing column or a single class.
    """
    rows = list(_rows(Path(path)))
    if not rows:
        raise ValueError(f"{path} has no rows; expected texts with labels")
    for column, option in ((text, "--text-column"), (label, "--label-column"), (split, "--split-column")):
        if column is not None and not any(column in row for row in rows):
            raise ValueError(f"{path} has no column {column!r}, it has {', '.join(rows[0])}; name the right one with {option}")
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
    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open}[packed]
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
    if not test_name or not any(name in found for name in TRAIN_NAMES):
        some = ", ".join(sorted(found)[:5])
        raise ValueError(f"{path}: column {column!r} holds {some}; expected train and one of {', '.join(TEST_NAMES)}")
    sides = {side: [(t, y) for t, y, s in items if s == side] for side in ("train", test_name)}
    return sides["train"], sides[test_name]


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
        raise ValueError(f"{path} has too few texts per class to hold some out; expected three or more, or a split column")
    test = list(dict.fromkeys((t, y) for t, y in items if t in held_out))
    return [(t, y) for t, y in items if t not in held_out], test


# -- batches ----------------------------------------------------------------------------------------------------------


class Batches:
    """Batches of texts of similar length, for fit (shuffled by seed and epoch) and for `outputs` (in order of length)."""

    def __init__(self, rows: Sequence[tuple[str, int]], tokenizer: Any, *, max_length: int, batch_size: int, seed: int = 0):
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
        span = 16 * self.batch_size
        order = [i for k in range(0, len(order), span) for i in sorted(order[k : k + span], key=self.lengths.__getitem__)]
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
    out = None
    for members in batches.sorted():
        batch = {key: value.to(device) for key, value in batches.collate(members).items()}
        values = compute(batch).float().cpu()
        out = torch.empty(len(batches.examples), values.shape[1]) if out is None else out
        out[members] = values
    return out


def logits(model: nn.Module, batches: Batches) -> Tensor:
    """The model's class scores [n, classes] in eval mode."""
    model.eval()
    return outputs(batches, _device_of(model), lambda batch: model(**batch).logits)


def features(model: nn.Module, batches: Batches) -> Tensor:
    """L2-normalised mean of the last hidden states [n, width], what the linear probe reads."""
    model.eval()
    body = hf.backbone(model)

    def pooled(batch: dict[str, Tensor]) -> Tensor:
        hidden, mask = body(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)  # [rows, t, d], [rows, t, 1]
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

    (x, y), (x_test, y_test) = ([t.numpy() for t in side] for side in (train, test))
    order = random.Random(seed).sample(range(len(y)), len(y))
    order.sort(key=y.__getitem__)  # by class: every tenth is then a tenth of each class
    chosen, rest = order[5::10], [i for n, i in enumerate(order) if n % 10 != 5]
    best, limit = 1.0, 2000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as "converged" instead
        if chosen and len(set(y[rest])) > 1:
            scores, model = {}, LogisticRegression(max_iter=limit, warm_start=True)
            for c in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
                scores[c] = model.set_params(C=c).fit(x[rest], y[rest]).score(x[chosen], y[chosen])
            best = max(scores, key=scores.get)
        final = LogisticRegression(C=best, max_iter=limit).fit(x, y)
    converged = bool(final.n_iter_.max() < limit)
    return {"accuracy": float(final.score(x_test, y_test)), "C": best, "converged": converged}


# -- the job ----------------------------------------------------------------------------------------------------------


def tune(job: Job, *, progress: bool = True) -> dict[str, Any]:
    """Runs the job and returns its summary, which is also in OUT/summary.json.

    Everything is written into a hidden directory beside OUT and renamed at the end, so OUT is whole or absent.
    """
    hf.need("tqdm", "sklearn", "matplotlib", "transformers")
    with _output(Path(job.out), job.force) as directory:
        summary, log = _run(job, directory, progress)
        (directory / LOG).write_text("".join(json.dumps(row) + "\n" for row in log))
        draw(directory / PICTURE, log, summary)
        summary["files"] = [CONFIG, WEIGHTS, LOG, PICTURE, SUMMARY]
        (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _run(job: Job, directory: Path, progress: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    clock = _Clock()
    data = read_data(job.data, job.text_column, job.label_column, job.split_column, job.seed)
    torch.manual_seed(job.seed)  # the new head's first values
    model, tokenizer = hf.load_classifier(job.model, data.classes)
    longest = hf.max_length(model, tokenizer)
    if job.max_length and longest and job.max_length > longest:
        raise ValueError(f"--max-length {job.max_length}; {job.model} takes at most {longest} tokens")
    length = job.max_length or min(128, longest or 128)
    model.to(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Attached before the probe runs, so that a bad target costs no time; at this point it is not trained yet.
    sides = [
        Batches(rows, tokenizer, max_length=length, batch_size=job.batch_size, seed=job.seed)
        for rows in (data.train, data.test)
    ]
    train, test = sides
    frozen = [None, None]
    attach(model, job.method, job.targets, seed=job.seed, train=("head",))
    ...
