"""Result directories that are whole or absent, and sizes in words."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output(out: str | os.PathLike, force: bool, marker: str) -> Iterator[Path]:
    """A hidden directory beside `out`, which it replaces at the end; whatever goes wrong leaves `out` as it was.

    marker: the file that every result has. force replaces an earlier result, known by it, and nothing else.
    FileNotFoundError, FileExistsError; ValueError where force would replace something else.
    """
    out = Path(out).expanduser().resolve()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no directory {out.parent}; create it first")
    if out.exists():
        if not force:
            raise FileExistsError(f"{out} exists; choose another directory, or --force to replace it")
        if not out.is_dir() or (any(out.iterdir()) and not (out / marker).exists()):
            raise ValueError(f"--force only replaces an earlier result; {out} is none, it has no {marker}")
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


def size(n: float) -> str:
    """Bytes in words: 1.2 kB."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
