"""Runs cases: a row for each rival, checked before it is timed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..check import compare
from ..ops import BackendError, all_ops, backend
from . import measure
from .case import SELECTIONS, Case, Problem, Run, evaluate, roofline, timed
from .cases import cases
from .rivals import OTHERS, missing

# Cases of a layer or model -> the op that it runs on; "": plain torch, as the backend "reference" is.
LAYERS = {"accelerate": "lora_linear", "route": "multi_lora_linear", "ia3": "rescale", "prefix": ""}
LOOSE = 0.05  # of the largest number: what a rival may be off before it is taken for something else
LIMIT = 2.0  # a case is left out if a round of it takes so many times the seconds it has in all
RIVALS = 5  # in a round, about


@dataclass(frozen=True)
class Options:
    """selection: "quick", "default" or "all".   words: only cases whose name has each of them.
    backends: of ours; None for all that are here.   seconds: for each case.   rivals: False for the yardstick alone.
    compiled: HF PEFT and ours also under torch.compile.
    """

    selection: str = "default"
    words: tuple[str, ...] = ()
    device: str = "cpu"
    backends: tuple[str, ...] | None = None
    seconds: float = 4.0
    rivals: bool = True
    compiled: bool = False


def selected(options: Options) -> list[Case]:
    """The cases that the options name, the headlines first: a run may be cut short. ValueError if there are none."""
    wanted = SELECTIONS[: SELECTIONS.index(options.selection) + 1]
    found = [case for case in cases(options.device) if case.selection in wanted]
    found = [case for case in found if all(word in case.name for word in options.words)]
    found.sort(key=lambda case: wanted.index(case.selection))
    if not found:
        raise ValueError(f"no case of the {options.selection} ones has {' '.join(options.words)!r} in its name")
    return found


def run(chosen: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """A row for each rival of each case.

    A row without figures has "missing" (why it was not timed) or "failed" (what is wrong with its result).
    """
    facts = about(options.device)
    for case in chosen:
        facts["load"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        named = {**_described(case), **facts}
        # Kernels sum in fp32, so a CPU that is slow in 16 bits is no excuse for them, only for torch.
        gemm = {dtype: measure.gemm_rate(options.device, dtype) for dtype in (case.torch_dtype, torch.float32)}
        rates = max(gemm.values()), measure.copy_rate(options.device)
        needed = RIVALS * roofline([case.work()], gemm[case.torch_dtype], rates[1])
        if needed > LIMIT * options.seconds:
            yield {**named, "rival": "all", "missing": f"a round takes about {needed:.0f} s; raise --seconds"}
            continue
        for row in _rows(case, options, rates):
            yield {**named, **row}


def _described(case: Case) -> dict[str, Any]:
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name != "build"}
    fields["rank"] = list(case.ranks) if len(case.ranks) > 1 else case.rank  # as JSON has it
    return {"case": case.name, **fields}


def _rows(case: Case, options: Options, rates: tuple[float, float]) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    calls: dict[str, list[measure.Call]] = {}
    with ExitStack() as stack:
        torch.manual_seed(0)
        problem = case.build(case, options.device, stack)
        expected = problem.plain(), problem.truth()
        for name, own, runs in _entries(case, problem, options):
            row: dict[str, Any] = {"rival": name, "over": problem.over, "backend": own}
            rows.append(row)
            if isinstance(runs, str):
                row["missing"] = runs
                continue
            try:
                with backend(own) if own else contextlib.nullcontext():
                    wrong, row["error"] = _checked(case, problem, row, runs[0], *expected)
                    own_calls = [_on(timed(run, problem.g, case.mode), own) for run in runs]
            except BackendError as error:
                row["missing"] = str(error)
                continue
            except Exception as error:  # whatever a broken kernel raises must not cost the other cases their rows
                wrong = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if wrong:
                row["failed"] = wrong
            else:
                calls[name] = own_calls
        del expected
        times = measure.measure(calls, options.seconds, options.device) if calls else {}
        costs = {"backward": problem.backward, "full": problem.forward + problem.backward}
        for row in rows:
            if own_times := times.get(name := row["rival"]):
                row |= _figures(own_times, times.get(problem.over))
                row["peak_bytes"] = measure.peak_bytes(calls[name][0], options.device)
                if name not in OTHERS:
                    row |= _rates(costs.get(case.mode, problem.forward), own_times, rates)
            yield row


def _entries(case: Case, problem: Problem, options: Options) -> Iterator[tuple[str, str | None, list[Run] | str]]:
    """(name, backend of ours, runs or why there are none): the yardstick, the rivals, ours."""
    found: list[tuple[str, str | None, list[Run] | str]] = []
    found += [(name, None, runs) for name, runs in problem.rivals.items() if options.rivals or name == problem.over]
    found += [(f"ours ({name})", name, problem.ours) for name in _backends(case, options)]
    yield from found
    if options.compiled:
        torch._dynamo.config.recompile_limit = 256  # a graph for each layer of the pool
        for name, own, runs in found:
            if name.startswith(("ours", "HF PEFT")) and not isinstance(runs, str):
                yield f"{name}, compiled", own, [run._replace(call=torch.compile(run.call)) for run in runs]


def _backends(case: Case, options: Options) -> list[str]:
    """Of the options, or those that are here."""
    if options.backends is not None:
        return list(options.backends)
    if not (name := LAYERS.get(case.op, case.op)):
        return ["reference"]
    op = all_ops()[name]
    here = [name for name, absent in op.backends(options.device).items() if not absent]
    return [name for name in here if name != "reference"] or here


def _on(call: measure.Call, name: str | None) -> measure.Call:
    """The call with every op on the backend of that name."""
    if name is None:
        return call

    def forced() -> object:
        with backend(name):
            return call()

    return forced


def _checked(
    case: Case, problem: Problem, row: dict[str, Any], run: Run, plain: list[Tensor], truth: list[Tensor]
) -> tuple[str, float | None]:
    """("" or what is wrong, of ours the largest error over the allowed one): a rival is held to a rough agreement."""
    if row["backend"] is None:
        if row["rival"] in OTHERS or not problem.same:
            return "", None
        error = _error(evaluate(run, problem.g, "forward")[0], truth[0])
        return ("" if error <= LOOSE else f"off by {error:.2g} of the largest number"), None
    found = evaluate(run, problem.g, case.mode)
    law = [compare(*tensors) for tensors in zip(found, plain, truth, strict=True)]
    what = ("output", *(f"gradient {i}" for i in range(len(law) - 1)))
    wrong = [f"{name}: {text}" for name, (_, text) in zip(what, law, strict=True) if text]
    return "; ".join(wrong), max(ratio for ratio, _ in law)


def _error(out: Tensor, truth: Tensor) -> float:
    if not out.numel():  # a gradient that the case does not ask for
        return 0.0
    return (out.double() - truth).abs().max().item() / max(truth.abs().max().item(), 1e-30)


def _figures(times: measure.Times, over: measure.Times | None) -> dict[str, Any]:
    out: dict[str, Any] = {"rounds": len(times.wall)}
    for kind in ("wall", "cpu"):
        own = getattr(times, kind)
        out |= dict(zip((f"{kind}_p20", f"{kind}_p50", f"{kind}_p80"), measure.quantiles(own), strict=True))
        out["ratio" if kind == "wall" else "ratio_cpu"] = measure.ratio(own, getattr(over, kind)) if over else None
    return out


def _rates(costs: Sequence, times: measure.Times, rates: tuple[float, float]) -> dict[str, float]:
    seconds = measure.quantiles(times.wall)[1]
    return {
        "gb_s": sum(cost.bytes for cost in costs) / seconds / 1e9,
        "tflop_s": sum(cost.flops for cost in costs) / seconds / 1e12,
        "roofline": roofline(costs, *rates) / seconds,
        "ceiling_tflop_s": rates[0] / 1e12,
        "ceiling_gb_s": rates[1] / 1e9,
    }


# -- where it ran -----------------------------------------------------------------------------------------------------


def about(device: str) -> dict[str, Any]:
    """The machine and what runs on it, the same in every row of a run."""
    packages = {
        name: metadata.version(name) for name in ("torch", "triton", "peft", "bitsandbytes") if not missing(name)
    }
    out = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "versions": {"peft_kernels": __version__, **packages},
        "device": device,
    }
    if device == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        return {**out, "device_name": torch.cuda.get_device_name(), "capability": capability}
    return {**out, "device_name": _cpu(), "threads": torch.get_num_threads(), "isa": _isa()}


def _commit() -> str:
    """Of the checkout that this file is in, "-dirty" if files differ from it; "" where there is none."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return ""
    words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _isa() -> str:
    try:
        from .. import _C  # type: ignore[attr-defined]  # the binary may be absent
    except ImportError:
        return "none"
    return _C.cpu_isa()
