"""What a run or a sweep shows: its table and its picture, both from the summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engine.counts import Counts
from .engine.store import WEIGHTS
from .files import size
from .tasks import Metric, tasks

# -- tables -----------------------------------------------------------------------------------------------------------


def table(summary: dict[str, Any]) -> str:
    """The one table that a run prints."""
    n, merged, seconds = Counts(**summary["counts"]), summary["merge"], summary["seconds"]
    settings, data = summary["settings"], summary["data"]
    if not merged["merged"]:
        check, note = "no", merged["reason"]
    else:
        check, note = "yes", f"largest {_task(summary).score} difference {merged['largest_difference']:.1e}"
        if "same" in merged:
            check, note = f"{merged['same']:,} of {merged['of']:,}", f"predictions the same; {note}"
    base = summary["base"]
    layers = ", ".join(f"{n} layers in {kind}" for kind, n in base["packed"].items())
    packed = f"{layers}; dense it is {size(base['dense_bytes'])}" if layers else "dense"
    epochs = len(summary["epochs"])
    if found := summary["search"]:
        length = f"no gradients: {found['evaluations']:,} evaluations, stopped by {found['stopped']}"
    elif settings["budget"]:
        length = f"{summary['steps']:,} steps in a budget of {settings['budget']}"
    else:
        stopped = f", stopped early of {settings['epochs']}" if epochs < settings["epochs"] else ""
        length = f"epochs x texts: {epochs} x {data['train']:,}{stopped}"
    resumed = "; since it was resumed" if seconds["resumed"] else ""
    index = summary["index_bytes"]
    stored = f", {size(n.bytes - index)}, and {size(index)} that say which numbers they are" if index else ""
    dense = "; training takes more than is stored" if n.trainable > n.stored else ""
    rows = [
        *_figures(summary),
        ("trainable", f"{n.trainable:,}", f"{n.trainable / n.total:.3%} of the model{dense}"),
        ("changed", f"{n.changed:,}", "numbers of the model that a merge changes"),
        ("rank", f"{n.rank:,}", "of the change, summed over its matrices"),
        ("stored", f"{n.stored:,}", f"numbers in the adapter{stored}"),
        ("total", f"{n.total:,}", "numbers in the model"),
        ("model in memory", size(base["bytes"]), packed),
        ("adapter file", size(summary["adapter_bytes"]), WEIGHTS),
        (
            "training",
            f"{seconds['training']:.1f} s",
            f"{seconds['training_cpu']:.0f} s of CPU; {length}{resumed}",
        ),
        (
            "peak memory",
            size(summary["peak_memory_bytes"]),
            "of the GPU" if settings["device"].startswith("cuda") else "of the whole process",
        ),
        ("merged model", check, note),
    ]
    what = f"{len(data['classes'])} classes" if data["classes"] else summary["task"]
    return lined(f"{_about(summary)}, {what}", rows)


def _figures(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of the metrics: the main one in full, the others as tuned."""
    task, data, base, test = _task(summary), summary["data"], summary["baseline"], summary["test"]
    main, *others = task.metrics
    facts = "the model as it came"
    if "C" in base:
        facts = f"on frozen features, C = {base['C']:g}{'' if base['converged'] else ', NOT converged'}"
    elif "alpha" in base:
        facts = f"on frozen features, alpha = {base['alpha']:g}"
    gain = main.gain(base[main.name], test[main.name])
    rows = [
        (f"{main.label}, {task.rival}", main.show(base[main.name]), facts),
        (f"{main.label}, tuned", main.show(test[main.name]), f"{gain}; {data['test']:,} held-out texts"),
    ]
    if teacher := summary["teacher"]:
        note = f"{Path(teacher['source']).name}; temperature {teacher['temperature']:g}, weight {teacher['weight']:g}"
        rows.append((f"{main.label}, teacher", main.show(teacher["test"][main.name]), note))
    for m in others:
        rows.append((f"{m.label}, tuned", m.show(test[m.name]), f"{task.rival} {m.show(base[m.name])}"))
    if summary["validation"]:
        note = f"{data['validation']:,} texts cut from the training rows"
        rows.append((f"{main.label}, validation", main.show(summary["validation"][main.name]), note))
    for name, found in summary["eval_data"].items():
        before, after = found["before"][main.name], found["after"][main.name]
        known = f", {found['trained_on']:,} of them trained on" if found["trained_on"] else ""
        note = f"{main.show(before)} before tuning, {main.gain(before, after)}; {found['rows']:,} texts{known}"
        rows.append((f"{main.label}, {name}", main.show(after), note))
    return rows


def sweep_table(summary: dict[str, Any]) -> str:
    """One line per run, then the baseline, and which value to take."""
    main, fields = _main(summary), list(summary["sweep"])
    splits = [split for split in ("validation", "test") if summary["data"][split]]
    rows = [(*fields, *(f"{main.label}, {name}" for name in (*splits, *summary["eval_data"])), "trainable", "time", "")]
    for run in summary["runs"]:
        words = run["values"].values()
        if "failed" in run:
            rows.append((*words, *["-"] * (len(rows[0]) - len(fields) - 1), run["failed"]))
            continue
        found = (*(run[split] for split in splits), *(own["after"] for own in run["eval_data"].values()))
        figures = (main.show(figures[main.name]) for figures in found)
        note = "best" if run["directory"] == summary["best"] else ""
        rows.append((*words, *figures, f"{run['trainable']:,}", f"{run['training_seconds']:.1f} s", note))
    before = {"test": summary["baseline"], **summary["eval_data"]}
    lines = [f"{main.label}, {name}, {_rival(summary, name)}: {main.show(f[main.name])}" for name, f in before.items()]
    if teacher := summary["teacher"]:
        lines.append(f"{main.label}, test, teacher: {main.show(teacher['test'][main.name])}")
    choice = (
        f"best: {summary['best']}, chosen on {summary['data']['validation']:,} validation texts"
        if summary["best"]
        else f"every {main.label} is of test rows, which choose nothing; add --validation FRACTION for that"
    )
    title = f"{_about(summary)}; sweep of {' x '.join(fields)}"
    return "\n".join((lined(title, rows), *lines, choice))


def _rival(summary: dict[str, Any], name: str) -> str:
    """What the figures before tuning on some rows are called."""
    return _task(summary).rival if name == "test" else "before tuning"


def _task(summary: dict[str, Any]) -> Any:
    return tasks()[summary["task"]]


def _main(summary: dict[str, Any]) -> Metric:
    return _task(summary).metrics[0]


def _about(summary: dict[str, Any]) -> str:
    return f"{summary['method']['method']} on {Path(summary['model']).name}; {Path(summary['data']['file']).name}"


def lined(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    """A title, a line, and the rows: their first cells to the left, the last one free, those between to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells, last in rows:
        middle = (f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:-1], strict=True))
        lines.append(f"{first:<{widths[0]}}{''.join(middle)}  {last}".rstrip())
    return "\n".join((title, "-" * max(map(len, lines)), *lines))


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw(path: Path, log: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Loss by step and the main metric by epoch, beside the baseline's."""
    from matplotlib.ticker import MaxNLocator

    task, main = _task(summary), _main(summary)
    split = "validation" if summary["validation"] else "test"
    whose = "validation" if summary["validation"] else "held-out"
    steps, epochs = [row for row in log if "step" in row and "loss" in row], summary["epochs"]
    figure, left, right = _figure()

    loss = [row["loss"] for row in steps]
    left.plot([row["step"] for row in steps], loss, color="0.75", linewidth=0.8, label="train, each step")
    left.plot([row["step"] for row in steps], _smoothed(loss), color="C0", label="train, running mean")
    ends = [max(row["step"] for row in steps if row["epoch"] == epoch["epoch"]) for epoch in epochs]
    left.plot(ends, [row[f"{split}_loss"] for row in epochs], "o", color="C1", label=f"{whose}, each epoch")
    left.set(title="Loss", xlabel="step", ylabel=task.loss, ylim=(0, None))
    left.legend(frameon=False)

    scale = 100 if "%" in main.form else 1
    values = [row[f"{split}_{main.name}"] for row in epochs]
    numbers = [row["epoch"] for row in epochs]
    name = summary["method"]["method"]
    right.plot(numbers, [scale * v for v in values], "o-", color="C1", label=f"{name}, {whose} texts")
    _annotate(right, numbers, values, main, scale)
    base = summary["baseline"][main.name]
    rival = f"{task.rival}, held-out texts, {main.show(base)}"
    right.axhline(scale * base, color="0.4", linestyle="--", label=rival)
    shown = [base, *values]
    if summary["teacher"]:
        shown.append(theirs := summary["teacher"]["test"][main.name])
        label = f"teacher, held-out texts, {main.show(theirs)}"
        right.axhline(scale * theirs, color="C4", linestyle=":", label=label)
    if split == "validation":
        test = summary["test"][main.name]
        right.plot(numbers[-1:], [scale * test], "s", color="C2", label=f"{name}, held-out texts, {main.show(test)}")
        shown.append(test)
    right.set(title="After each epoch", xlabel="epoch", ylabel=_unit(main), xlim=(0.5, len(epochs) + 0.5))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    _room(right, [scale * v for v in shown])
    right.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)


def draw_sweep(path: Path, summary: dict[str, Any]) -> None:
    """The main metric and the trainable numbers against the first field, a line per value of the others."""
    main = _main(summary)
    split = "validation" if summary["data"]["validation"] else "test"
    field, *others = summary["sweep"]
    ticks = summary["sweep"][field]
    scale = 100 if "%" in main.form else 1
    lines: dict[str, list[dict[str, Any]]] = {}
    for run in (run for run in summary["runs"] if "failed" not in run):
        lines.setdefault(", ".join(f"{name}={run['values'][name]}" for name in others), []).append(run)
    figure, left, right = _figure()
    shown = [base := summary["baseline"][main.name]]
    for n, (name, runs) in enumerate(lines.items()):
        places = [ticks.index(run["values"][field]) for run in runs]
        values = [run[split][main.name] for run in runs]
        shown += values
        style = {"marker": "osD^v"[n % 5], "markersize": 6 + 3 * (len(lines) - 1 - n), "markerfacecolor": "none"}
        left.plot(places, [scale * v for v in values], label=name, **style)
        right.plot(places, [run["trainable"] for run in runs], **style)
        if not others:
            _annotate(left, places, values, main, scale)
        for place, value in ((p, v) for p, v, run in zip(places, values, runs, strict=True) if _is_best(run, summary)):
            left.plot(place, scale * value, "*", color="C3", markersize=12, label=f"best, {main.show(value)}")
    rival = f"{_task(summary).rival}, held-out texts, {main.show(base)}"
    left.axhline(scale * base, color="0.4", linestyle="--", label=rival)
    _room(left, [scale * v for v in shown])
    left.set(title=f"On the {split} rows", ylabel=_unit(main))
    left.legend(frameon=False)
    right.set(title="Trainable numbers", ylim=(0, None))
    right.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (left, right):
        axes.set(xlabel=field, xlim=(-0.5, len(ticks) - 0.5))
        axes.set_xticks(range(len(ticks)), ticks)
    figure.savefig(path, dpi=150)


def _is_best(run: dict[str, Any], summary: dict[str, Any]) -> bool:
    return run["directory"] == summary["best"]


def _figure() -> Any:
    """(figure, left axes, right axes)"""
    figure, axes = new_figure((10, 4), 2)
    return figure, *axes


def new_figure(inches: tuple[float, float], columns: int = 1) -> tuple[Any, Any]:
    """(figure, its axes)"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it would ask for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _unit(metric: Metric) -> str:
    return f"{metric.label}{' (%)' if '%' in metric.form else ''}, {'higher' if metric.higher else 'lower'} is better"


def _annotate(axes: Any, places: Sequence[float], values: Sequence[float], metric: Metric, scale: float) -> None:
    for place, value in zip(places, values, strict=True) if len(places) <= 12 else ():
        text = metric.show(value).rstrip("%")
        axes.annotate(text, (place, scale * value), textcoords="offset points", xytext=(0, 7), ha="center")


def _room(axes: Any, values: Sequence[float]) -> None:
    """Limits around the values, with room for the legend."""
    low, high = min(values), max(values)
    margin = 0.25 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set(ylim=(low - margin, high + 2 * margin))


def _smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    out, mean = [], 0.0
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**n))
    return out
