"""Two versions of the kernels on one machine: the working tree against a git ref, in processes that take turns.

    python benchmarks/compare.py --base REF [--turns 3] [any option of peft-kernels bench]

Both are installed, binaries included, into directories of their own under build/compare. The yardstick is torch's and
thus the same on both sides, so the ratio over it is the figure that a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_kernels.bench.results import by_case, duration

ROOT = Path(__file__).parents[1]
SIDES = ("base", "head")


def install(source: Path, target: Path) -> None:
    """The package of a source tree in a directory that PYTHONPATH can name."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--upgrade"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)


def git(*words: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.decode().strip()}")
    return done.stdout


def checkout(ref: str, where: Path) -> Path:
    """The files of a commit in a directory of its own, where its build stays; git archive leaves no worktree behind."""
    commit = git("rev-parse", "--verify", f"{ref}^{{commit}}").decode().strip()
    target = where / commit
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as files:
        files.extractall(target, filter="data")
    if not (target / "peft_kernels" / "bench").is_dir():
        raise SystemExit(f"--base {ref} has no peft-kernels bench; choose a later commit")
    return target


def run(package: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one process."""
    words = [sys.executable, "-m", "peft_kernels", "bench", "--no-rivals", "--json", *options]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(words, cwd=package, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: a wrong result, which is a row
        raise SystemExit(f"peft-kernels bench in {package} ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def compared(turns: dict[str, list[list[dict[str, Any]]]]) -> Iterator[tuple[str, ...]]:
    """A line for each of ours: seconds before and after, and the medians of after over before."""
    yield ("case", "ours", "base", "head", "head / base", "of the ratios over the yardstick")
    sides = [[by_case(rows) for rows in turns[side]] for side in SIDES]
    for case in sides[0][0]:
        for name in (name for name in sides[0][0][case] if name.startswith("ours")):
            try:
                pairs = [(base[case][name], head[case][name]) for base, head in zip(*sides, strict=True)]
            except KeyError:
                yield (case, name, "", "", "", "only in some of the runs")
                continue
            medians = [statistics.median(row["wall_p50"] for row in column) for column in zip(*pairs, strict=True)]
            changes = (statistics.median(b[key] / a[key] for a, b in pairs) for key in ("wall_p50", "ratio"))
            yield (case, name, *map(duration, medians), *(f"{change:.3f}" for change in changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, metavar="REF", help="what the working tree is compared with")
    parser.add_argument("--turns", type=int, default=3, help="processes of each side; default %(default)s")
    options, passed = parser.parse_known_args()
    where = ROOT / "build" / "compare"
    install(checkout(options.base, where), where / "base")
    install(ROOT, where / "head")
    turns: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
    for turn in range(options.turns):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            print(f"turn {turn + 1} of {options.turns}, {side}", file=sys.stderr)
            turns[side].append(run(where / side, passed))
    lines = list(compared(turns))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
