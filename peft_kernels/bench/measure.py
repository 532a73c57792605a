"""Time, memory and ceilings on a machine that others use too: rivals take turns, figures are quantiles and ratios."""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[], object]

ROUNDS = 5  # at least, however long they take
ROUND = 1e-3  # seconds that the calls of one rival fill in a round, so that the clock's own cost does not count


class Times(NamedTuple):
    """Seconds per call, one number for each round."""

    wall: list[float]
    cpu: list[float]  # of the whole process: on a shared machine the steadier of the two


def measure(rivals: Mapping[str, Sequence[Call]], seconds: float, device: str) -> dict[str, Times]:
    """The times of every rival, whose calls are the same work on different memory and are gone through in a circle.

    Each round times every rival once over, so that a busy moment hits all alike.
    """
    calls = {name: (itertools.cycle(own), _calls(own, device)) for name, own in rivals.items()}
    times = {name: Times([], []) for name in rivals}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < ROUNDS or time.perf_counter() < end:
        rounds += 1
        for name, (circle, n) in calls.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            for call in itertools.islice(circle, n):
                call()
            wait(device)
            times[name].wall.append((time.perf_counter() - began) / n)
            times[name].cpu.append((time.process_time() - began_cpu) / n)
    return times


def _calls(calls: Sequence[Call], device: str) -> int:
    """How many calls fill a round, after two to warm up."""
    for call in (calls[0], calls[-1]):
        call()
    wait(device)
    return max(1, round(ROUND / max(_once(calls[0], device), 1e-7)))


def _once(call: Call, device: str) -> float:
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[-1]


def ratio(values: Sequence[float], over: Sequence[float]) -> float:
    """The median of the ratios of each round: what slows a whole round down falls out of it."""
    return statistics.median(a / max(b, 1e-12) for a, b in zip(values, over, strict=True))


def peak_bytes(call: Call, device: str) -> int:
    """The most bytes that torch's allocator held during the call beyond what it held before.

    Results, what is kept for the backward and workspaces are in it; inputs, weights and what MKL or a kernel takes from
    malloc are not.
    """
    if device == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr otherwise
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None  # there is one once the profiler has stopped
    events = (event for event in profile.kineto_results.events() if event.name() == "[memory]")
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(0, 0, *itertools.accumulate(changes))


# -- ceilings ---------------------------------------------------------------------------------------------------------


def cache_bytes(device: str) -> int:
    """Size of the last-level cache; 64 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=64 << 20)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes per second of a copy from and to memory, read and written ones counted."""
    source = torch.ones(max(4 * cache_bytes(device), 1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / _best(lambda: target.copy_(source), device)


@functools.cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations per second of torch's own square matrix product."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, device)


def _best(call: Call, device: str, seconds: float = 0.5) -> float:
    call()
    times, end = [_once(call, device)], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(_once(call, device))
    return min(times)
