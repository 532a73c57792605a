"""The benchmark: kernels against the frozen linear and plain torch on named shapes, and what one call costs.

    python benchmarks/run.py [--only overhead|lora|rescale] [--device cpu|cuda] [--seconds 2] [--json FILE]

Every rival runs in turn in one process. A kernel whose result is wrong gets no row: the run stops. Ratios are what to
read; absolute times belong to the machine in the header.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import measure
from torch import Tensor

import peft_kernels as pk

# name: (rows, in, out, rank)
SHAPES = {
    "minilm 384x384, 512 tokens": (512, 384, 384, 8),
    "minilm 384x1536, 512 tokens": (512, 384, 1536, 8),
    "7b 4096x4096, decode 1": (1, 4096, 4096, 16),
    "7b 4096x4096, decode 16": (16, 4096, 4096, 16),
    "7b 4096x4096, training 512": (512, 4096, 4096, 16),
    "7b 4096x4096, training 2048": (2048, 4096, 4096, 16),
}


def leaf(*shape: int, device: str, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device, dtype=dtype) * scale).requires_grad_()


def both_ways(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], g: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(call(*inputs), inputs, g)


def lora_plain(x, w, bias, a, b, scale, p):
    """LoRA as anybody would write it in torch."""
    return F.linear(x, w, bias) + F.linear(F.linear(F.dropout(x, p), a), b) * scale


def lora_rows(device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Forward and backward of a LoRA layer over those of the frozen linear (gradient of x alone)."""
    for name, (rows, k, n, r) in SHAPES.items():
        x, w, bias = leaf(rows, k, device=device), leaf(n, k, device=device, scale=k**-0.5), leaf(n, device=device)
        w.requires_grad_(False), bias.requires_grad_(False)
        a, b = leaf(r, k, device=device, scale=k**-0.5), leaf(n, r, device=device)
        g = torch.randn(rows, n, device=device)
        rng = torch.tensor([1, 2], device=device)
        check(pk.ops.lora_linear(x, w, bias, a, b, 2.0), lora_plain(x, w, bias, a, b, 2.0, 0.0), name)
        for p in (0.0, 0.05):

            def ours(x, a, b, w=w, bias=bias, p=p, rng=rng):
                return pk.ops.lora_linear(x, w, bias, a, b, 2.0, p=p, rng=rng)

            def plain(x, a, b, w=w, bias=bias, p=p):
                return lora_plain(x, w, bias, a, b, 2.0, p)

            rivals = {
                "frozen": both_ways(lambda x, w=w, bias=bias: F.linear(x, w, bias), (x,), g),
                "ours": both_ways(ours, (x, a, b), g),
                "plain torch": both_ways(plain, (x, a, b), g),
            }
            yield from compared(
                "lora_linear", f"{name}, p={p}", measure(rivals, seconds=seconds, device=device), "frozen"
            )


def rescale_rows(device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Forward and backward of a rescaling over plain torch's."""
    for dtype in (torch.float32, torch.bfloat16):
        x, l = leaf(2048, 4096, device=device, dtype=dtype), leaf(4096, device=device)
        g = torch.randn(2048, 4096, device=device).to(dtype)
        check(pk.ops.rescale(x, l), (x * l).to(dtype), str(dtype))
        rivals = {
            "plain torch": both_ways(lambda x, l, dtype=dtype: (x * l).to(dtype), (x, l), g),
            "ours": both_ways(pk.ops.rescale, (x, l), g),
        }
        name = f"2048x4096 {str(dtype)[6:]}"
        yield from compared("rescale", name, measure(rivals, seconds=seconds, device=device), "plain torch")


def overhead_rows(device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """One call on a 4x64 input of rank 8: what the op layer itself costs beside plain torch."""
    x, y = torch.randn(4, 64, device=device), torch.randn(4, 64, device=device)
    a, b = leaf(8, 64, device=device), leaf(64, 8, device=device)
    g = torch.randn(4, 64, device=device)

    def plain(a, b):
        return y + F.linear(F.linear(x, a), b) * 2.0

    def ours(a, b):
        return pk.ops.lora_add(y, x, a, b, 2.0)

    def dispatched(a, b):
        return pk.ops.all_ops()["lora_add"].dispatch(y, x, a, b, 2.0, 0.0, None)[0]

    calls = {"plain torch": plain, "ours": ours, "ours through the dispatcher": dispatched}
    for mode in ("no grad", "forward with grad", "forward and backward"):
        rivals = {}
        for name, call in calls.items():
            if mode == "no grad":
                rivals[name] = torch.no_grad()(lambda call=call: call(a, b))
            elif mode == "forward with grad":
                rivals[name] = lambda call=call: call(a, b)
            else:
                rivals[name] = both_ways(call, (a, b), g)
        yield from compared(
            "lora_add", f"4x64 r=8, {mode}", measure(rivals, seconds=seconds, device=device), "plain torch"
        )


def compared(op: str, case: str, times: dict[str, dict[str, float]], yardstick: str) -> Iterator[dict[str, Any]]:
    for rival, t in times.items():
        ratio, ratio_cpu = t["wall"] / times[yardstick]["wall"], t["cpu"] / max(times[yardstick]["cpu"], 1e-12)
        yield {"op": op, "case": case, "rival": rival, **t, "over": yardstick, "ratio": ratio, "ratio_cpu": ratio_cpu}


def check(ours: Tensor, plain: Tensor, case: str) -> None:
    error = (ours - plain).abs().max().item()
    if not error <= 1e-2 * plain.abs().max().item():
        raise SystemExit(f"{case}: wrong result (largest error {error:.3g}); no row is written")


def header(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    out = {
        "device": device,
        "torch": torch.__version__,
        "peft_kernels": pk.__version__,
        "commit": commit.stdout.strip(),
    }
    if device == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        return {**out, "name": torch.cuda.get_device_name(), "capability": capability}
    return {**out, "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "isa": isa()}


def isa() -> str:
    try:
        from peft_kernels import _C
    except ImportError:
        return "none"
    return _C.cpu_isa()


SUITES = {"overhead": overhead_rows, "rescale": rescale_rows, "lora": lora_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SUITES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="per rival")
    parser.add_argument("--json", type=Path, help="also write the header and the rows as JSON lines")
    options = parser.parse_args()
    rows = [header(options.device)]
    print(json.dumps(rows[0]))
    print(f"{'case':<34} {'rival':<27}{'wall':>12}{'cpu':>12} {'ratio':>7} {'cpu':>6}")
    for name, suite in SUITES.items():
        if options.only not in (None, name):
            continue
        for row in suite(options.device, options.seconds):
            rows.append(row)
            times = "".join(f"{row[kind] * 1e6:>9.1f} us" for kind in ("wall", "cpu"))
            print(
                f"{row['case']:<34} {row['rival']:<27}{times} {row['ratio']:7.2f} {row['ratio_cpu']:6.2f}", flush=True
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
