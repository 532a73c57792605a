"""A sweep: the same job with other values, every run in the same set-up, one table and one picture."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from typing import Any

from . import report
from .engine.attach import detach
from .files import output
from .resume import Checkpoint
from .tasks import tasks
from .train import SUMMARY, Job, Setup, run

PICTURE = "sweep.png"


def sweep(job: Job, runs: Sequence[tuple[dict[str, str], Job]], *, progress: bool = True) -> dict[str, Any]:
    """Runs every job and returns the summary, which is also in OUT/summary.json; a run writes into OUT/<field>-<value>.

    job: what the runs have in common, and where they go.   runs: (field -> value as written, the job with it).
    Whatever is wrong with a value is a ValueError before the first run; a run that fails all the same, by a loss that
    is not finite, is a row of the table, unless every run does. The best is chosen on the validation rows; without
    them none is. A sweep that did not end leaves the runs that did in OUT.checkpoint.
    """
    names = ["_".join(f"{field}-{_plain(value)}" for field, value in values.items()) for values, _ in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--sweep has {twice[0]} twice; every value needs a directory of its own")
    checkpoint = Checkpoint(job.out, {**job.identity(), "sweep": names}, resume=job.resume, force=job.force)
    with checkpoint.kept(), output(job.out, job.force, SUMMARY) as directory:
        setup = Setup(job)
        for name, (_, one) in zip(names, runs, strict=True):
            try:
                setup.try_on(one)
            except ValueError as error:
                raise ValueError(f"--sweep {name}: {error}") from None
        setup.look()
        place = checkpoint.begin()
        rows: list[dict[str, Any]] = []
        for name, (values, one) in zip(names, runs, strict=True):
            if not (place / name / SUMMARY).exists():
                own = Checkpoint(place / name, one.identity(), resume=True, force=False)
                try:
                    with own.kept(), output(place / name, False, SUMMARY) as inside:
                        run(one, setup, own, inside, progress)
                except RuntimeError as error:
                    rows.append({"values": values, "directory": name, "failed": str(error)})
                    detach(setup.model)
                    shutil.rmtree(own.directory, ignore_errors=True)
                    continue
            rows.append(_row(values, name, json.loads((place / name / SUMMARY).read_text())))
        if all("failed" in row for row in rows):
            raise RuntimeError(f"every run failed; {names[0]}: {rows[0]['failed']}")
        finished = [row["directory"] for row in rows if "failed" not in row]
        summary = {
            "task": job.task,
            "model": job.model,
            "data": setup.facts(job),
            "method": {"method": job.method.key},
            "baseline": setup.baseline,
            "teacher": setup.teacher and setup.teacher.facts(),
            "eval_data": setup.before,
            "sweep": {field: list(dict.fromkeys(values[field] for values, _ in runs)) for field in runs[0][0]},
            "runs": rows,
            "best": best(job.task, rows),
            "files": [PICTURE, SUMMARY, *finished],
        }
        report.draw_sweep(directory / PICTURE, summary)
        (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
        for name in finished:
            os.rename(place / name, directory / name)
    return summary


def _row(values: dict[str, str], name: str, summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "values": values,
        "directory": name,
        **{key: summary[key] for key in ("test", "validation", "eval_data", "adapter_bytes")},
        "trainable": summary["counts"]["trainable"],
        "training_seconds": summary["seconds"]["training"],
    }


def best(task: str, rows: list[dict[str, Any]]) -> str | None:
    """The directory of the run with the best main metric on the validation rows, the first of equals; None without."""
    rows = [row for row in rows if row.get("validation")]
    metric = tasks()[task].metrics[0]
    sign = 1 if metric.higher else -1
    return max(rows, key=lambda row: sign * row["validation"][metric.name])["directory"] if rows else None


def _plain(value: str) -> str:
    """As part of the name of a directory."""
    return re.sub(r"[^A-Za-z0-9.+-]", "_", value)
