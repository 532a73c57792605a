"""What a comparison shows: its table, on the screen and in Markdown, and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import size
from .report import lined, new_figure

COLUMNS = (
    "method",
    "accuracy",
    "trainable",
    "changed",
    "rank",
    "stored",
    "file",
    "peak",
    "CPU",
    "wall",
    "inference",
    "merged",
    "second",
    "family",
)
NAMES = {"class_mean": "nearest class mean", "linear_probe": "linear probe", "head": "head only", "full": "full tuning"}
COLOURS = {"additive": "C0", "selective": "C1", "reparametrised": "C2", "hybrid": "C3"}

Row = dict[str, Any]

# -- the table --------------------------------------------------------------------------------------------------------


def table(summary: Row) -> str:
    """A line per method, the baselines first, then the most accurate; below it what the columns are."""
    lines = [lined(title(summary), [COLUMNS, *_lines(summary)]), "", *notes(summary)]
    lines += [f"left out: {own['method']}: {own['reason']}" for own in summary["left_out"]]
    return "\n".join(lines)


def markdown(summary: Row) -> str:
    """The same for a document."""
    head = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 2), "---")]
    rows = [*head, *_lines(summary)]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    out = [f"- `{own['method']}` is left out: {own['reason']}" for own in summary["left_out"]]
    return "\n".join([f"{title(summary)}:", "", *lines, "", *(f"- {note}" for note in notes(summary)), *out]) + "\n"


def _lines(summary: Row) -> list[tuple[str, ...]]:
    """Of COLUMNS: those that are ranked, then those that failed."""
    blank = ["-"] * (len(COLUMNS) - 2)
    failed = [(row["method"], *blank, f"failed: {row['failed']}") for row in summary["rows"] if "failed" in row]
    return [*((*cells(row), row["family"]) for row in ranked(summary)), *failed]


def ranked(summary: Row) -> list[Row]:
    """The rows with figures: the baselines, then the methods, each the most accurate first."""
    done = [row for row in summary["rows"] if "failed" not in row]
    return sorted(done, key=lambda row: (row["family"] != "baseline", -row["accuracy"]))


def cells(row: Row) -> tuple[str, ...]:
    """Of COLUMNS but the last."""

    def shown(name: str, form: str) -> str:
        return "-" if row.get(name) is None else f"{row[name]:{form}}"

    def bytes_of(name: str) -> str:
        return "-" if row.get(name) is None else size(row[name])

    method: str = row["method"]
    return (
        NAMES.get(method, method),
        shown("accuracy", ".1%"),
        *(shown(name, ",") for name in ("trainable", "changed", "rank", "stored")),
        bytes_of("bytes"),
        bytes_of("peak_bytes"),
        *(f"{row[name]:.1f} s" for name in ("train_cpu_s", "train_wall_s")),
        *(shown(name, ".2f") for name in ("inference_ratio", "merged_ratio")),
        shown("second_task", ".1%"),
    )


def title(summary: Row) -> str:
    settings, machine = summary["settings"], summary["machine"]
    length = f"{settings['budget']} of training" if settings["budget"] else f"{settings['epochs'] or 1} epochs"
    what = f"{Path(summary['model']).name} on {Path(summary['data']).name}, {length} each"
    return f"{what}; {machine['device_name']}, {settings['threads'] or machine.get('threads', '')} threads"


def notes(summary: Row) -> list[str]:
    """What the columns are."""
    head, second, file = summary["head"], summary["second"], summary["settings"]["second"]
    lines = [
        f"trainable, changed, rank, stored, file: without the head's {head['trainable']:,} numbers, which every method "
        "trains too (not the two probes, nor warp, which reads the classes otherwise)",
        "peak: resident memory in training beyond the base's (of the GPU where there is one); CPU, wall: of training, "
        "calibration included, evaluation not",
        "inference, merged: time of a forward pass over the base's, before and after merging (-: does not merge)",
        "nearest class mean: by the mean feature of each class's training texts, so it has seen labels too",
    ]
    if second is None:
        return [*lines, "second: - without --second FILE, texts of another task"]
    return [
        *lines,
        f"second: of the base's accuracy on another task ({Path(file).name}, {second:.1%}), what a linear probe on the "
        "features reaches while the adapter is on; with it off that is 100 % by construction",
    ]


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(path: Path, summary: Row) -> None:
    """Accuracy over trainable numbers, a colour per family; the baselines are lines.

    A few that are far below all others are triangles at the lower edge, with their accuracy in words: the crowd is what
    needs the room.
    """
    done = ranked(summary)
    points = [row for row in done if row["family"] != "baseline" and row["trainable"] > 0]
    lines = [row for row in done if row["family"] == "baseline"]
    figure, axes = new_figure((13, 8))
    axes.set(xscale="log", xlabel="trainable numbers (without the head)", ylabel="accuracy (%)")
    axes.set_title(title(summary), fontsize=10)
    floor = _floor([row["accuracy"] for row in points], [row["accuracy"] for row in lines])
    marks = []
    for family, colour in COLOURS.items():
        own = [row for row in points if row["family"] == family]
        for mark, below in (("o", False), ("v", True)):
            side = [row for row in own if (row["accuracy"] < floor) == below]
            heights = [100 * max(row["accuracy"], floor) for row in side]
            axes.plot([row["trainable"] for row in side], heights, mark, color=colour, markersize=5, zorder=4)
            names = [f"{row['method']} {row['accuracy']:.1%}" if below else row["method"] for row in side]
            marks += [(r["trainable"], y, name, colour) for r, y, name in zip(side, heights, names, strict=True)]
        if own:
            axes.plot([], [], "o", color=colour, label=family)
    for row, style in zip(lines, ("-", "--", "-.", ":"), strict=False):
        name = f"{NAMES[row['method']]}, {row['accuracy']:.1%}"
        axes.axhline(100 * row["accuracy"], color="0.6", linestyle=style, linewidth=1, zorder=0, label=name)
    axes.margins(x=0.12, y=0.08)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4, fontsize=9)
    figure.canvas.draw()  # the layout and the limits are final, and sizes in pixels known
    label(axes, marks)
    figure.savefig(path, dpi=150)


def _floor(values: Sequence[float], lines: Sequence[float]) -> float:
    """The accuracy below which a point is an outlier, by its distance from the quartiles; no line is below it."""
    if len(values) < 8:
        return min([*values, *lines], default=0.0)
    first, _, third = statistics.quantiles(values, n=4)
    near = [value for value in values if value >= first - 2 * (third - first)]
    return min([*near, *lines])


def label(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside points (x, y, name, colour), none over another or over a point: the nearest free place for each."""
    from matplotlib.text import Text

    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    pixels = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in pixels]
    for (x, y, name, colour), (px, py) in zip(points, pixels, strict=True):
        text = axes.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset pixels",
            fontsize=8,
            color=colour,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkB": 3},
        )
        box = Text.get_window_extent(text, renderer)
        dx, dy = min(_offsets(box.width, box.height), key=lambda o: _cost(o, box, (px, py), taken, frame))
        text.set_position((dx, dy))
        taken.append((px + dx, py + dy, px + dx + box.width, py + dy + box.height))


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Of a label's lower left corner from its point: to the right, left, above and below, ever farther."""
    found = []
    for step in range(14):
        away = 9 + 0.8 * height * step
        sides = ((away, -height / 2), (-away - width, -height / 2), (-width / 2, away), (-width / 2, -away - height))
        corners = ((away, away), (-away - width, away), (away, -away - height), (-away - width, -away - height))
        found += [*sides, *corners]
    return found


def _cost(
    offset: tuple[float, float],
    box: Any,
    point: tuple[float, float],
    taken: Sequence[tuple[float, float, float, float]],
    frame: Any,
) -> float:
    """The area under which something lies already, then the distance."""
    left, low = point[0] + offset[0], point[1] + offset[1]
    right, high = left + box.width, low + box.height
    covered = sum(max(0, min(right, r) - max(left, a)) * max(0, min(high, h) - max(low, b)) for a, b, r, h in taken)
    outside = left < frame.x0 or low < frame.y0 or right > frame.x1 or high > frame.y1
    away = abs(left + box.width / 2 - point[0]) + abs(low + box.height / 2 - point[1])
    return 1e6 * outside + 1e3 * covered + away
