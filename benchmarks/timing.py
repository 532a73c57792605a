"""Timing on a machine that others use too: rivals run in turn in one process, and figures are medians and ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def measure(
    rivals: dict[str, Callable[[], object]], *, seconds: float = 2.0, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """name -> {"wall", "cpu", "p20", "p80"} in seconds per call.

    Each round times every rival once over as many calls as fill a millisecond, so that a busy moment hits all alike.
    cpu is the process's CPU time: on a shared machine the steadier of the two.
    """
    calls = {name: _calls(call, device) for name, call in rivals.items()}
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    cpu: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds * len(rivals)
    while time.perf_counter() < end or len(next(iter(wall.values()))) < 5:
        for name, call in rivals.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            for _ in range(calls[name]):
                call()
            _wait(device)
            wall[name].append((time.perf_counter() - began) / calls[name])
            cpu[name].append((time.process_time() - began_cpu) / calls[name])
    return {name: {**_summary(wall[name]), "cpu": statistics.median(cpu[name])} for name in rivals}


def _summary(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5)
    return {"wall": statistics.median(times), "p20": fifths[0], "p80": fifths[-1]}


def _calls(call: Callable[[], object], device: str) -> int:
    for _ in range(3):
        call()
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return max(1, round(1e-3 / max(time.perf_counter() - began, 1e-7)))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
