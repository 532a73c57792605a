"""A training step of several rivals, each in processes of its own, in turn: its time, and the memory that it takes.

A benchmark has SIDES (name -> function of the options that makes a step), and calls `main`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Step(NamedTuple):
    """run() is one step and returns its loss; trainable: numbers; since: bytes that `peak_bytes` leaves out."""

    run: Callable[[], float]
    trainable: int
    since: int = 0


Side = Callable[[argparse.Namespace], Step]


def resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS")


def measure(name: str, side: Side, args: argparse.Namespace) -> dict[str, Any]:
    step = side(args)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here: making masks is not training
    wall, cpu, losses = [], [], []
    for _ in range(args.steps + 1):  # the first one warms up
        began = time.perf_counter(), time.process_time()
        losses.append(step.run())
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return {
        "side": name,
        "wall": statistics.median(wall[1:]),
        "cpu": statistics.median(cpu[1:]),
        "peak_bytes": _status("VmHWM") - step.since,
        "trainable": step.trainable,
        "losses": losses,
        **{key: value for key, value in vars(args).items() if key not in ("json", "side", "turns", "steps")},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main(file: str, doc: str, sides: Mapping[str, Side], **options: int | float) -> None:
    """The command line: every side `turns` times, a line each, and the medians over those of the first side."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, value in {**options, "steps": 5, "turns": 3}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--json", metavar="FILE", help="also write a line for each process")
    parser.add_argument("--side", choices=sides, help="one side in this process, as a line of JSON")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, sides[args.side], args)))
        return
    rows: list[dict[str, Any]] = []
    for _ in range(args.turns):
        for side in sides:
            words = [sys.executable, file, "--side", side]
            for name in (*options, "steps"):
                words += [f"--{name}", str(getattr(args, name))]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(_line(rows[-1], rows), flush=True)
    if args.json:
        with open(args.json, "w") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"\nmedians over the turns, over {rows[0]['side']}'s")
    for side in sides:
        print(_line({key: _median(rows, side, key) for key in ("wall", "cpu", "peak_bytes")} | {"side": side}, rows))


def _median(rows: list[dict[str, Any]], side: str, key: str) -> float:
    return statistics.median(row[key] for row in rows if row["side"] == side)


def _line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    wall, cpu, peak = (_median(rows, rows[0]["side"], key) for key in ("wall", "cpu", "peak_bytes"))
    return (
        f"{row['side']:<30} step {row['wall']:6.3f} s ({row['wall'] / wall:.2f})  cpu {row['cpu']:6.3f} s "
        f"({row['cpu'] / cpu:.2f})  peak {row['peak_bytes'] / 1e6:6.0f} MB ({row['peak_bytes'] / peak:.2f})"
    )


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
