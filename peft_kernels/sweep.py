"""A sweep: the same job with other values, every run in the same world, one table and one picture."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from . import report
from .files import output
from .resume import Checkpoint
from .tasks import tasks
from .train import SUMMARY, Job, World, run

PICTURE = "sweep.png"


def sweep(job: Job, runs: Sequence[tuple[dict[str, str], Job]], *, progress: bool = True) -> dict[str, Any]:
    """Runs every job and returns the summary, which is also in OUT/summary.json; a run writes into OUT/<field>-<value>.

    job: what the runs have in common, and where they go.   runs: (field -> value as written, the job with it).
    Whatever is wrong with a value is a ValueError before the first run. The best run is chosen on the validation rows;
    without them none is. A sweep that did not end leaves the runs that did in OUT.checkpoint.
    """
    names = ["_".join(f"{field}-{_plain(value)}" for field, value in values.items()) for values, _ in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--sweep has {twice[0]} twice; every value needs a directory of its own")
    checkpoint = Checkpoint(job.out, {**job.identity(), "sweep": names}, resume=job.resume, force=job.force)
    with checkpoint.kept(), output(job.out, job.force, SUMMARY) as directory:
        world = World(job)
        for name, (_, one) in zip(names, runs, strict=True):
            try:
                world.try_on(one)
            except ValueError as error:
                raise ValueError(f"--sweep {name}: {error}") from None
        world.look()
        place = checkpoint.begin()
        summaries = []
        for name, (_, one) in zip(names, runs, strict=True):
            own = Checkpoint(place / name, one.identity(), resume=True, force=False)
            if not (place / name / SUMMARY).exists():
                with own.kept(), output(place / name, False, SUMMARY) as inside:
                    run(one, world, own, inside, progress)
            summaries.append(json.loads((place / name / SUMMARY).read_text()))
        summary = _summary([values for values, _ in runs], names, summaries)
        report.draw_sweep(directory / PICTURE, summary)
        (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        for name in names:
            os.rename(place / name, directory / name)
    return summary


def _summary(values: list[dict[str, str]], names: list[str], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    first = summaries[0]
    rows: list[dict[str, Any]] = [
        {
            "values": own,
            "directory": name,
            "test": summary["test"],
            "validation": summary["validation"],
            "eval_data": summary["eval_data"],
            "trainable": summary["counts"]["trainable"],
            "adapter_bytes": summary["adapter_bytes"],
            "training_seconds": summary["seconds"]["training"],
        }
        for own, name, summary in zip(values, names, summaries, strict=True)
    ]
    return {
        **{key: first[key] for key in ("task", "model", "data", "baseline")},
        "method": {"method": first["method"]["method"]},
        "sweep": {field: list(dict.fromkeys(own[field] for own in values)) for field in values[0]},
        "runs": rows,
        "best": best(first["task"], rows),
        "files": [PICTURE, SUMMARY, *names],
    }


def best(task: str, rows: list[dict[str, Any]]) -> str | None:
    """The directory of the run with the best main metric on the validation rows, the first of equals; None without."""
    if not rows[0]["validation"]:
        return None
    metric = tasks()[task].metrics[0]
    sign = 1 if metric.higher else -1
    return max(rows, key=lambda row: sign * row["validation"][metric.name])["directory"]


def _plain(value: str) -> str:
    """As part of the name of a directory."""
    return re.sub(r"[^A-Za-z0-9.+-]", "_", value)
