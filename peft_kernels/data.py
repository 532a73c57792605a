"""Data files: reading rows of text with labels, and cutting them into training, validation and test rows."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = 0.2  # of each class, where the data has no split of its own
TEST_NAMES = ("test", "validation", "valid", "dev")  # in a split column; the first that occurs is used

Row = tuple[str, Any]  # (text, label); the label is None where the task has none


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    text: str = "text"
    label: str | None = "label"  # None: the task has no labels
    split: str | None = None  # None: "split" if there is one


@dataclass(frozen=True)
class Data:
    """The rows of one file; no text is on two sides."""

    path: str
    train: list[Row]
    validation: list[Row]  # cut from the training rows; empty unless asked for
    test: list[Row]
    dropped: int  # rows of the train side whose text is in the test side too


def read_data(
    path: str,
    columns: Columns | None = None,
    *,
    parse: Callable[[str], Any] = str,
    by_label: bool = True,
    validation: float = 0.0,
    seed: int = 0,
) -> Data:
    """Reads FILE.{tsv,csv,jsonl}, possibly .gz or .xz, and splits it.

    Tab-separated values have no quoting, comma-separated ones do, .jsonl has one object per line. Without a split
    column a fifth of the texts is held out, with by_label of each label. validation: the fraction of the training texts
    that is cut off for choosing. parse: label as written -> label; its ValueError says what is wrong with it.
    FileNotFoundError; ValueError for a broken file or useless data.
    """
    rows, sides = _read(path, columns or Columns(), parse)
    if sides:
        train, test = _side(path, rows, sides, ("train",)), _side(path, rows, sides, TEST_NAMES)
    else:
        train, test = _cut(rows, HELD_OUT, by_label, seed)
        if not test:
            raise ValueError(f"{path} has too few texts to hold some out; add texts or a split column")
    held_out = {text for text, _ in test}
    kept = [row for row in train if row[0] not in held_out]
    if not kept:
        raise ValueError(f"{path}: every training text is also a test text; nothing is left to train on")
    dropped = len(train) - len(kept)
    chosen: list[Row] = []
    if validation:
        kept, chosen = _cut(kept, validation, by_label, seed)
        if not chosen:
            raise ValueError(f"{path} has too few training texts for --validation {validation}; take a larger part")
    return Data(path, kept, chosen, test, dropped)


def read_test(path: str, columns: Columns | None = None, *, parse: Callable[[str], Any] = str) -> list[Row]:
    """The test rows of a further file: those its split column names so, or all of them where it has none."""
    rows, sides = _read(path, columns or Columns(), parse, further=True)
    return _side(path, rows, sides, TEST_NAMES) if sides else rows


def _read(path: str, columns: Columns, parse: Callable, further: bool = False) -> tuple[list[Row], list[str]]:
    """(rows, the side of each, or nothing where the file has no split column)."""
    records = list(_records(Path(path)))
    if not records:
        raise ValueError(f"{path} has no rows; expected texts{' with labels' if columns.label else ''}")
    split = columns.split or "split"
    wanted = [(columns.text, "--text-column"), (columns.label, "--label-column")]
    if columns.split and not further:
        wanted.append((columns.split, "--split-column"))
    for column, option in wanted:
        if column is not None and not any(column in record for record in records):
            has = ", ".join(records[0])
            raise ValueError(f"{path} has no column {column!r}, it has {has}; name the right one with {option}")
    names = [name for name, _ in wanted[:2] if name is not None]
    if any(split in record for record in records):
        names.append(split)
    rows: list[Row] = []
    sides = []
    for n, record in enumerate(records, 1):
        if any(record.get(name) is None or not str(record[name]).strip() for name in names):
            raise ValueError(f"{path}: row {n} has no value in one of {', '.join(names)}")
        try:
            label = None if columns.label is None else parse(str(record[columns.label]))
        except ValueError as error:
            raise ValueError(f"{path}: row {n}: {error}") from None
        rows.append((str(record[columns.text]), label))
        if split in names:
            sides.append(str(record[split]))
    return rows, sides


def _records(path: Path) -> Iterator[dict[str, Any]]:
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


def _side(path: str, rows: list[Row], sides: list[str], names: tuple[str, ...]) -> list[Row]:
    """The rows of the first of `names` that occurs among the sides."""
    name = next((name for name in names if name in sides), None)
    if name is None:
        some = ", ".join(sorted(set(sides))[:5])
        raise ValueError(f"{path}: the split column holds {some}; expected train and one of {', '.join(TEST_NAMES)}")
    return [row for row, side in zip(rows, sides, strict=True) if side == name]


def _cut(rows: list[Row], fraction: float, by_label: bool, seed: int) -> tuple[list[Row], list[Row]]:
    """(the rest, a part held out), of each label or of all; whole texts at a time, so that no text is on both sides."""
    groups: dict[Any, list[str]] = {}
    for text, label in sorted({row[0]: row[1] for row in reversed(rows)}.items()):
        groups.setdefault(label if by_label else "", []).append(text)
    rng = random.Random(seed)
    held_out: set[str] = set()
    for label in sorted(groups):
        texts = rng.sample(groups[label], len(groups[label]))
        held_out.update(texts[: min(round(fraction * len(texts)), len(texts) - 1)])
    part = list(dict.fromkeys(row for row in rows if row[0] in held_out))
    return [row for row in rows if row[0] not in held_out], part
