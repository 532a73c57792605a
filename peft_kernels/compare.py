"""A comparison: many methods with their defaults on one task, each in a process of its own, and what they must beat."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import comparison
from .bench.runner import about
from .engine.method import methods
from .engine.store import replacing
from .methods import FullTuning, Head
from .resume import digest
from .train import Job
from .trial import BASELINES, job_to

LOG, PICTURE = "comparison.json", "comparison.png"
BESIDE = (FullTuning.key, Head.key)  # compared with whatever is asked for

Tell = Callable[[str, float], None]


def chosen(words: str) -> list[str]:
    """The keys of "all", a comma list or globs such as lora,*adapter*, in the order of the registry."""
    patterns = ["*" if word == "all" else word for word in words.split(",")]
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in methods()):
            raise ValueError(f"--method {pattern}; expected all, or keys or globs among {', '.join(methods())}")
    return [key for key in methods() if any(fnmatchcase(key, pattern) for pattern in patterns)]


def compare(
    jobs: Sequence[Job],
    left_out: dict[str, str],
    *,
    second: str | None = None,
    threads: int | None = None,
    seconds: float = 2.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs each job and returns the summary, which is OUT/comparison.json, written anew after each method.

    jobs: the same but for the method.   left_out: method -> why it is not compared.   second: a file with another task,
    on whose texts a linear probe shows what an adapter that stays on has left of the base's features.
    threads: of each process.   seconds: for each measurement of the inference time.
    A method that fails is a row with its reason; with resume=True in the jobs it is tried again, and the methods that
    have figures in an earlier log are not. FileExistsError; ValueError for a log of another comparison.
    KeyboardInterrupt says how to go on.
    """
    from tqdm.auto import tqdm

    job = jobs[0]
    log = Log(job, second, threads, left_out)
    wanted = [one for one in jobs if not log.has(one)]
    todo: list[tuple[str, Job]] = [(one.method.key, one) for one in wanted]
    if not log.has_baselines(second):
        todo.insert(0, ("baselines", job))
    with (
        tqdm(total=len(todo), desc="methods", disable=not progress, dynamic_ncols=True) as bar,
        tqdm(total=1.0, leave=False, disable=not progress, dynamic_ncols=True, bar_format=_INNER) as inner,
    ):

        def tell(stage: str, done: float) -> None:
            inner.set_description_str(f"{name}, {stage}", refresh=False)
            inner.n = round(done, 3)
            inner.refresh()

        try:
            for name, one in todo:
                inner.reset()
                tell("starting", 0.0)
                words = {"job": job_to(one), "second": second, "threads": threads, "seconds": seconds}
                log.add(one, trial({**words, "baselines": name == "baselines"}, tell), name == "baselines")
                bar.update()
        except KeyboardInterrupt:
            where = f"{log.path} has {log.done(jobs)} of {len(jobs)} methods; the same command with --resume goes on"
            raise KeyboardInterrupt(where if log.path.exists() else "") from None
    log.draw()
    return log.summary


_INNER = "{desc} {percentage:3.0f}%|{bar}| {elapsed}"


def trial(words: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """What trial.py says of one job: {"found": ...} or {"failed": why}; the process ends with this call."""
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        found: dict[str, Any] = {}
        try:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(json.dumps(words))
            child.stdin.close()
            for line in child.stdout:
                event = json.loads(line)
                if "stage" in event:
                    tell(event["stage"], event["done"])
                else:
                    found = event
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        if found:
            return found
        if code == 130:  # a Ctrl-C that reached it first
            raise KeyboardInterrupt
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return {"failed": f"the process ended with {how}{f': {said[-1]}' if said else ''}"}


class Log:
    """OUT/comparison.json: what was compared, and a row for each method that is through."""

    def __init__(self, job: Job, second: str | None, threads: int | None, left_out: dict[str, str]):
        self.out = Path(job.out).expanduser().resolve()
        self.path = self.out / LOG
        alike = {
            k: v for k, v in job_to(job).items() if k not in ("method", "out", "resume", "force", "checkpoint_every")
        }
        alike |= {"threads": threads, "second": second}
        alike |= {"sha256 of the data": [digest(file) for file in filter(None, (job.data, second))]}
        self.alike = json.loads(json.dumps(alike))
        self.summary: dict[str, Any] = {
            "model": job.model,
            "data": job.data,
            "machine": about("cuda" if job.on_cuda else "cpu"),
            "versions": {},
            "settings": self.alike,
            "second": None,
            "head": None,
            "rows": [],
        }
        self.summary["versions"] = self.summary["machine"].pop("versions")
        if not self.out.parent.is_dir():
            raise FileNotFoundError(f"{self.out}: there is no directory {self.out.parent}; create it first")
        if self.out.exists() and job.resume:
            self._go_on()
        elif self.out.exists():
            self._start_again(job.force)
        self.summary["left_out"] = [{"method": key, "reason": why} for key, why in left_out.items()]

    def _go_on(self) -> None:
        try:
            before = json.loads(self.path.read_text())
            settings = before["settings"]
        except (OSError, ValueError, KeyError):
            raise ValueError(
                f"{self.out} holds no comparison that could go on, it has no {LOG}; move it away"
            ) from None
        for option in {**settings, **self.alike}:
            was, now = (json.dumps(known.get(option)) for known in (settings, self.alike))
            if was != now:
                raise ValueError(
                    f"--resume: the comparison in {self.out} had {option} = {was}, this one has {now}; give the same, "
                    "or --force without --resume to start again"
                )
        self.summary |= {name: before[name] for name in ("second", "head", "rows")}

    def _start_again(self, force: bool) -> None:
        if not force:
            raise FileExistsError(f"{self.out} exists; go on with --resume, or --force to replace it")
        if not self.out.is_dir() or (any(self.out.iterdir()) and not self.path.exists()):
            raise ValueError(f"--force only replaces an earlier result; {self.out} is none, it has no {LOG}")
        shutil.rmtree(self.out)

    def has(self, job: Job) -> bool:
        """Whether the method has figures, with these settings."""
        row = self._row(job.method.key)
        return row is not None and "failed" not in row and row["settings"] == _settings(job)

    def has_baselines(self, second: str | None) -> bool:
        return all(self._row(key) for key in BASELINES)

    def done(self, jobs: Sequence[Job]) -> int:
        return sum(self.has(job) for job in jobs)

    def _row(self, key: str) -> dict[str, Any] | None:
        return next((row for row in self.summary["rows"] if row["method"] == key), None)

    def add(self, job: Job, said: dict[str, Any], baselines: bool) -> None:
        if baselines:
            if "failed" in said:
                raise RuntimeError(f"the base model alone failed: {said['failed']}")
            found = said["found"]
            rows = [{**row, "family": "baseline"} for row in found["rows"]]
            self.summary |= {"second": found["second"], "head": found["head"]}
        else:
            key = job.method.key
            family = "baseline" if key in BESIDE else job.method.family
            about_it: dict[str, Any] = {"method": key, "family": family, "settings": _settings(job)}
            rows = [{**about_it, **(said["found"] if "found" in said else {"failed": said["failed"]})}]
        for row in rows:
            row["second_task"] = self._kept(row)
        new = {row["method"] for row in rows}
        self.summary["rows"] = [row for row in self.summary["rows"] if row["method"] not in new] + rows
        self.write()

    def _kept(self, row: dict[str, Any]) -> float | None:
        """Of the base's accuracy on the second task, which probes of the base keep as it is."""
        if self.summary["second"] is None or "failed" in row:
            return None
        if row["method"] in BASELINES:
            return 1.0
        return row["second_accuracy"] / self.summary["second"]

    def write(self) -> None:
        with replacing(self.out, LOG) as temporary:
            (temporary / LOG).write_text(json.dumps(self.summary, indent=1) + "\n")

    def draw(self) -> None:
        self.write()
        with replacing(self.out, PICTURE) as temporary:
            comparison.draw(temporary / PICTURE, self.summary)


def _settings(job: Job) -> dict[str, Any]:
    """Of the method, as a file has them."""
    return {name: value for name, value in json.loads(json.dumps(job.method.to_json())).items() if name != "method"}
