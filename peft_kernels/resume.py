"""OUT.checkpoint beside OUT: from which an interrupted job continues."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .engine.checkpoint import RECORD

JOB = "job.json"


class Checkpoint:
    """The directory OUT.checkpoint: what an interrupted job left, with the job itself in it.

    job: option -> value, everything that a resumed job must have in common with the interrupted one.
    """

    def __init__(self, out: str | Path, job: dict[str, Any], *, resume: bool, force: bool):
        out = Path(out).expanduser().resolve()
        self.directory = out.with_name(out.name + ".checkpoint")
        self.job, self.resume = json.loads(json.dumps(job)), resume
        self.resumed = False  # there is something to go on from
        if not self.directory.exists():
            return
        if not resume and not force:
            raise FileExistsError(
                f"{self.directory} exists; continue from it with --resume, or discard it with --force"
            )
        try:
            before = json.loads((self.directory / JOB).read_text())
        except (OSError, ValueError):
            raise ValueError(f"{self.directory} is no checkpoint, it has no {JOB}; move it away") from None
        for option in {**before, **self.job} if resume else ():
            was, now = (json.dumps(known.get(option)) for known in (before, self.job))
            if was != now:
                raise ValueError(
                    f"--resume: the interrupted run had {option} = {was}, this one has {now}; "
                    "give the same, or --force without --resume to start again"
                )

    def begin(self) -> Path:
        """The directory, ready to be written into: an old one is discarded unless it is to be resumed."""
        if self.directory.exists() and not self.resume:
            shutil.rmtree(self.directory)
        self.resumed = (self.directory / RECORD).exists()
        self.directory.mkdir(exist_ok=True)
        (self.directory / JOB).write_text(json.dumps(self.job, indent=1) + "\n")
        return self.directory

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Until the job is done; an interrupt then says where the checkpoint is."""
        try:
            yield
        except BaseException as stop:
            if self.directory.exists() and {path.name for path in self.directory.iterdir()} <= {JOB}:
                shutil.rmtree(self.directory)  # nothing to go on from
            if not isinstance(stop, KeyboardInterrupt) or not self.directory.exists():
                raise
            raise KeyboardInterrupt(
                f"the checkpoint is {self.directory}; the same command with --resume continues from there"
            ) from None
        shutil.rmtree(self.directory, ignore_errors=True)


def digest(path: str) -> str:
    """sha256 of a file; "" if there is none, which reading it says better."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
