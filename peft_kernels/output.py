"""Where a job writes: OUT, which is whole or absent, and OUT.checkpoint beside it, from which a run continues."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .engine.checkpoint import RECORD

LOG, PICTURE, SUMMARY, JOB = "log.jsonl", "curves.png", "summary.json", "job.json"


def resolved(out: str) -> Path:
    """OUT as an absolute path; FileNotFoundError if there is no directory to write it into."""
    path = Path(out).expanduser().resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no directory {path.parent}; create it first")
    return path


@contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A hidden directory beside `out`, which it replaces at the end; whatever goes wrong leaves `out` as it was."""
    if out.exists():
        if not force:
            raise FileExistsError(f"{out} exists; choose another --out, or --force to replace it")
        if not out.is_dir() or (any(out.iterdir()) and not (out / SUMMARY).exists()):
            raise ValueError(f"--force only replaces an earlier result; {out} is none, it has no {SUMMARY}")
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_name(temporary.name + "-old")
        if out.exists():
            os.rename(out, old)
        os.rename(temporary, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Checkpoint:
    """The directory OUT.checkpoint: what an interrupted job left, with the job itself in it.

    job: option -> value, everything that a resumed job must have in common with the interrupted one.
    """

    def __init__(self, out: Path, job: dict[str, Any], *, resume: bool, force: bool):
        self.directory = out.with_name(out.name + ".checkpoint")
        self.job, self.resume = json.loads(json.dumps(job)), resume
        self.resumed = False  # there is something to go on from
        if not self.directory.exists():
            return
        if not resume and not force:
            raise FileExistsError(f"{self.directory} exists; continue that run with --resume, or discard it with --force")
        try:
            before = json.loads((self.directory / JOB).read_text())
        except (OSError, ValueError):
            raise ValueError(f"{self.directory} is no checkpoint, it has no {JOB}; move it away") from None
        for option, value in self.job.items() if resume else ():
            if before.get(option) != value:
                raise ValueError(
                    f"--resume: the interrupted run had {option} = {json.dumps(before.get(option))}, this one has "
                    f"{json.dumps(value)}; give the same, or --force without --resume to start again"
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
        except KeyboardInterrupt:
            if not self.directory.exists():
                raise
            raise KeyboardInterrupt(
                f"the checkpoint is {self.directory}; the same command with --resume continues from there"
            ) from None
        shutil.rmtree(self.directory, ignore_errors=True)


def digest(path: str) -> str:
    """sha256 of a file; "" if there is none, which reading it says better."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
