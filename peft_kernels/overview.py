"""What every method is, what it costs on a model, and what a comparison measured of it."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import os
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .engine.attach import active, attach, tuners
from .engine.counts import counts
from .engine.life import timeline
from .engine.method import FAMILIES, Method, Tuner, fields, method_of, methods, needed
from .engine.recipe import Recipe
from .engine.text import columns, shown
from .files import size
from .methods._select import Masked, best, kept
from .methods._sparse import SparseTuner
from .methods.structured import StructuredPruning, StructuredTuner

# Fields with which a method is counted that by default asks the values of weights; here there are none.
COUNTED: dict[str, dict[str, Any]] = {"svd": {"rank": 64}}
# Of a row of a comparison: storage, memory, compute, accuracy, and the time of inference before and after a merge.
AXES = ("bytes", "peak_bytes", "train_cpu_s", "accuracy", "inference_ratio", "merged_ratio")
COUNTS = ("trainable", "changed", "rank", "stored", "total")
_STEPS = 100  # of the training whose phases are entered


def overview(
    keys: Sequence[str] = (), model: nn.Module | None = None, log: str | os.PathLike | None = None
) -> list[dict[str, Any]]:
    """A row for each method (keys: of these), in the order of the registry.

    key, class, family, kernel, roles, lr, fields: as the class says them.   summary: the first line of its docstring.
    what, paper: that line without the reference, and the reference, of arXiv its number.
    mergeable: None for a recipe that has no parts of its own.
    model: on a copy of it, whose values are not looked at, the method has these counts: trainable (the most in one
        phase of a training), changed, rank and stored (at its end; None where that takes values), total; settings:
        fields that are not the defaults. why: "" or why it has none.
    log: comparison.json of `tune --method all`, whose figures are `measured`: AXES, or None, or {"failed": why}.
    ValueError on an unknown key and on another log.
    """
    for key in keys:
        method_of(key)
    found = measured(log) if log is not None else {}
    rows = []
    for key, cls in methods().items():
        if keys and key not in keys:
            continue
        row = described(cls)
        if model is not None:
            row |= counted(model, cls)
        if log is not None:
            row["measured"] = found.get(key)
        rows.append(row)
    return rows


def described(cls: type[Method]) -> dict[str, Any]:
    """What the class says of itself."""
    what, paper = cited(cls)
    return {
        "key": cls.key,
        "class": cls.__name__,
        "family": cls.family,
        "kernel": list(cls.kernel),
        "mergeable": mergeable(cls),
        "paper": paper,
        "roles": list(cls.roles),
        "lr": cls.lr,
        "summary": _summary(cls),
        "what": what,
        "fields": described_fields(cls),
    }


def _summary(cls: type[Method]) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def cited(cls: type[Method]) -> tuple[str, str]:
    """(the first line of the docstring, the paper that is named there); arXiv:... is the shortest name of one."""
    line = _summary(cls)
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", line)
    match = re.fullmatch(r"(.*?\.) ([A-Z][^.]*(?: et al\.)?[^.]* (?:19|20)\d\d\b.*?)\.?", line)
    what, reference = (match[1], match[2]) if match else (line, "")
    return what, arxiv[1] if arxiv else reference


def mergeable(cls: type[Method]) -> bool | None:
    """Whether every tuner of the method has a weight-space form; None for a recipe that has no parts of its own.

    What is trained beside it, such as LayerNorms, always has one; a model may still refuse, where its weights are tied.
    """
    if issubclass(cls, Recipe):
        return None if needed(cls) else all(mergeable(own) for own in cls().made_of())
    return cls.tuner.folds()


# -- fields -----------------------------------------------------------------------------------------------------------


def described_fields(cls: type[Method]) -> list[dict[str, Any]]:
    """name, type, required, default and comment of each."""
    hints, comments = typing.get_type_hints(cls), field_comments(cls)
    out = []
    for f in fields(cls):
        row: dict[str, Any] = {"name": f.name, "type": shown(hints[f.name]), "required": f.name in needed(cls)}
        if not row["required"]:
            row["default"] = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        out.append({**row, "comment": comments.get(f.name, "")})
    return out


def field_comments(cls: type) -> dict[str, str]:
    """Field -> the comment behind it, or the lines of comments above it."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        lines, body = source.splitlines(), typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for node in body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            end = typing.cast(int, node.end_lineno)
            behind = lines[end - 1][node.end_col_offset :].strip()
            above: list[str] = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("#"):
                    break
                above.insert(0, line.strip())
            out[node.target.id] = " ".join(line.lstrip("# ") for line in ([behind] if behind else above))
    return out


# -- on a model -------------------------------------------------------------------------------------------------------


def counted(model: nn.Module, cls: type[Method]) -> dict[str, Any]:
    """The counts of `overview`, or why there are none."""
    settings = COUNTED.get(cls.key, {})
    if lacks := needed(cls):
        why = f"needs {', '.join(lacks)}"
    else:
        try:
            found, _ = on_copy(model, cls(**settings))
            return {**found, "settings": settings, "why": ""}
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            why = str(error).partition(";")[0]
    return {**dict.fromkeys(COUNTS), "settings": {}, "why": why}


def on_copy(model: nn.Module, method: Method) -> tuple[dict[str, int | None], list[Tuner]]:
    """(COUNTS of a method on a copy of the model without values, its tuners); ValueError where it does not fit."""
    model = copy.deepcopy(model).to("meta")  # a copy, because QLoRA quantises it
    attach(model, method)
    own = [tuner for _, tuner in tuners(model, "default")]
    trainable, chosen = 0, True
    for entry in timeline(model, active(model), _STEPS):
        try:
            entry.enter(model)
        except RuntimeError:  # what is kept is seen in the values
            chosen = False
            break
        if entry.phase.steps:
            _choose(model)
            trainable = max(trainable, counts(model).trainable)
    found = dataclasses.asdict(counts(model))
    found |= {"trainable": trainable, "stored": found["stored"] if chosen else None}
    return {name: found[name] for name in COUNTS}, own


def _choose(model: nn.Module) -> None:
    """Lets what calibration would choose have the size that it will have."""
    found = [m for m in model.modules() if isinstance(m, SparseTuner) and not any(p.numel() for p in m.parameters())]
    if found:
        cfg, scores = typing.cast(Masked, found[0].cfg), [torch.empty(m.shape, device="meta") for m in found]
        k = kept(sum(s.numel() for s in scores), cfg.keep_ratio, cfg.pattern)
        for tuner, positions in zip(found, best(scores, k, cfg.pattern), strict=True):
            tuner.set_mask(positions)
    for module in model.modules():
        if isinstance(module, StructuredTuner) and module.units is None:
            pruning = typing.cast(StructuredPruning, module.cfg)
            ratio = pruning.heads if module.heads else pruning.neurons
            module.keep(torch.empty(max(1, round(ratio * module.count)), dtype=torch.int32, device="meta"))


# -- in a comparison --------------------------------------------------------------------------------------------------


def measured(log: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Method -> what the rows of a comparison's log say of it, the last one if there are several."""
    try:
        rows = json.loads(Path(log).read_text())["rows"]
        out = {}
        for row in rows:
            figures = {name: row.get(name) for name in AXES}
            out[row["method"]] = {"failed": row["failed"]} if row.get("failed") else figures
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{log} is no log of a comparison; expected comparison.json of tune --method all") from None
    return out


def grouped(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows family by family."""
    return sorted(rows, key=lambda row: FAMILIES.index(row["family"]))


# -- as text ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each method: the counts if they are of a model, the figures if they are of a log."""
    counted, logged = "trainable" in rows[0], "measured" in rows[0]
    header = ["method", "family", "kernel", "merges", *(COUNTS[:-1] if counted else ())]
    header += ["file", "peak", "CPU", "accuracy", "inference", "merged"] if logged else []
    lines = [(*header, "targets", "lr", "paper", "")]
    for row in rows:
        merges = {True: "yes", False: "no", None: "as its parts"}[row["mergeable"]]
        cells = [row["key"], row["family"], " ".join(row["kernel"]) or "-", merges]
        cells += [_cell(row[name], "{:,}".format) for name in COUNTS[:-1]] if counted else []
        cells += _figures(row["measured"] or {}) if logged else []
        lines.append((*cells, " ".join(row["roles"]) or "-", f"{row['lr']:g}", row["paper"] or "-", _said(row)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    figures = range(4, len(header))  # are aligned to the right
    return columns([tuple(c.rjust(widths[i]) if i in figures else c for i, c in enumerate(line)) for line in lines])


def _figures(own: dict[str, Any]) -> list[str]:
    shapes = (size, size, "{:.1f}".format, "{:.1%}".format, "{:.2f}".format, "{:.2f}".format)
    return [_cell(own.get(name), shape) for name, shape in zip(AXES, shapes, strict=True)]


def _cell(value: Any, shape: Callable[[Any], str]) -> str:
    return "-" if value is None else shape(value)


def _said(row: dict[str, Any]) -> str:
    """What the method is, with the fields that it was counted with, or why there are no counts or figures."""
    if why := row.get("why"):
        return f"not on this model: {why}"
    if failed := (row.get("measured") or {}).get("failed"):
        return f"failed: {failed}"
    own = ", ".join(f"{name}={value}" for name, value in row.get("settings", {}).items())
    return f"({own}) {row['what']}" if own else row["what"]


def details(row: dict[str, Any]) -> str:
    """The fields of a method, a line for each."""
    fields = [
        (f"  --set {f['name']}={'...' if f['required'] else f['default']}", f["type"], f["comment"])
        for f in row["fields"]
    ]
    return "\n".join([f"{row['key']} (pk.{row['class']}): {row['summary']}", *([columns(fields)] if fields else [])])
