"""Rows of the benchmark as JSON lines, as text, as a Markdown table, and as a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..files import size

Row = dict[str, Any]


def dumps(row: Row) -> str:
    """The row as one line of JSON, which has no infinity."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def read(path: str | os.PathLike) -> list[Row]:
    """The rows of a file that `peft-kernels bench --json FILE` wrote; ValueError if it is none."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
            assert {"case", "rival", "device_name"} <= rows[-1].keys()
        except (ValueError, AssertionError, AttributeError):
            raise ValueError(f"{path}, line {number}: not a row of peft-kernels bench --json FILE") from None
    return rows


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """case -> rival -> row, of the rows with figures; of several runs of one, the last."""
    out: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "wall_p50" in row:
            out.setdefault(row["case"], {})[row["rival"]] = row
    return out


# -- text -------------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row on the screen, below the name of its case."""
    name = f"  {row['rival']:<32}"
    if "wall_p50" not in row:
        return f"{name} FAILED, no row: {row['failed']}" if "failed" in row else f"{name} {row['missing']}"
    cells = [f"{duration(row['wall_p50']):>9}", f"cpu {duration(row['cpu_p50']):>9}"]
    cells.append(f"{row['ratio']:6.2f} ({row['ratio_cpu']:.2f}) x {row['over']}" if row["ratio"] is not None else "")
    if row.get("roofline") is not None:
        cells.append(f"{row['gb_s']:.3g} GB/s, {row['tflop_s']:.3g} TFLOP/s, {row['roofline']:.0%} of the roofline")
    cells.append(f"peak {size(row['peak_bytes'])}")
    return "  ".join((name, *filter(None, cells)))


def duration(seconds: float) -> str:
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def heading(row: Row) -> str:
    """Where a run takes place."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    where = f"{row['device_name']}, {row['threads']} threads, {row['isa']}" if "isa" in row else row["device_name"]
    return f"{where}; {versions}{'; ' if row['commit'] else ''}{row['commit']}; load {row['load']}"


# -- Markdown ---------------------------------------------------------------------------------------------------------


def table(rows: Iterable[Row], *, lost: bool = False) -> str:
    """Time over the yardstick's (CPU time in brackets) and peak memory: the headline cases, or the other ones we lost.

    Above it stands where the run took place, as `heading` says it, once for each machine and commit.
    """
    rows = list(rows)
    places: dict[tuple[str, str], str] = {}
    for row in rows:
        places.setdefault((row["device_name"], row["commit"]), heading(row))
    lines = ["  \n".join(places.values()), "", "| case | over | ours | rivals |", "|---|---|---|---|"]
    for case, found in by_case(rows).items():
        ours = {name: row for name, row in found.items() if name.startswith("ours")}
        others = {name: row for name, row in found.items() if name not in ours and name != "frozen"}
        best = min((*ours.values(), *others.values()), key=lambda row: row["ratio"])
        headline = best["selection"] == "quick"
        if ours and (not headline and best not in ours.values() if lost else headline):
            cells = (", ".join(_cell(name, row, row is best) for name, row in part.items()) for part in (ours, others))
            lines.append(" | ".join((f"| {case}", best["over"], *cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(name: str, row: Row, best: bool) -> str:
    ratio = f"{row['ratio']:.2f}"
    return f"{name} {f'**{ratio}**' if best else ratio} ({row['ratio_cpu']:.2f}) {size(row['peak_bytes'])}"


# -- pictures ---------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Time and peak memory against the number of rows, a pair of axes for whatever was run with several numbers.

    ValueError where nothing was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would ask for a display
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, list[Row]]] = {}  # case without its rows -> rival -> rows
    for found in by_case(rows).values():
        for name, row in found.items():
            words = row["case"].replace(f" rows={row['rows']}", "")
            groups.setdefault(words, {}).setdefault(name, []).append(row)
    groups = {words: own for words, own in groups.items() if any(len(points) > 1 for points in own.values())}
    if not groups:
        raise ValueError("nothing to draw: no case was run with several numbers of rows")
    figure = Figure(figsize=(10, 3.2 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    for (words, own), (left, right) in zip(groups.items(), figure.subplots(len(groups), 2, squeeze=False), strict=True):
        for n, (name, points) in enumerate(own.items()):
            points.sort(key=lambda row: row["rows"])
            x, style = [row["rows"] for row in points], {"marker": "osD^v"[n % 5], "color": f"C{n}"}
            left.plot(x, [row["wall_p50"] for row in points], label=name, **style)
            left.fill_between(x, *([row[p] for row in points] for p in ("wall_p20", "wall_p80")), alpha=0.2)
            right.plot(x, [row["peak_bytes"] / 1e6 for row in points], **style)
        left.set(title=words, xscale="log", yscale="log", xlabel="rows", ylabel="seconds, p50 and p20 to p80")
        right.set(title="Peak memory beyond the inputs", xscale="log", xlabel="rows", ylabel="MB", ylim=(0, None))
        left.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
