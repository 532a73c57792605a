"""The diagonal of the empirical Fisher matrix: sums of squared gradients. Sung et al. 2021, arXiv:2111.09839.

    f += weight * g^2                                         any parameter whose gradient g is that of one sample
    f[i, j] += sum_n weight_n (sum_t dy[t, i] x[t, j])^2      a linear layer, t over the rows of sample n

The second is exact for a whole batch after one backward pass: the gradient of sample n is made tile by tile, squared
and added. (dy^2)^T x^2 would be the Fisher of single tokens, the same only where each sample has one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._op import Cost, Op, Sample, write
from ._tensors import as_rows, nbytes


def _accum_reference(f, g, weight, absolute):
    wide = g.to(torch.promote_types(torch.promote_types(f.dtype, g.dtype), torch.float32))
    return (f + weight * (wide.abs() if absolute else wide.square())).to(f.dtype)


def _linear_reference(f, dy, x, cu_samples, weight):
    if isinstance(cu_samples, FakeTensor):  # has no numbers, and the result the layout of f whatever they are
        return f.clone()
    dtype = torch.promote_types(torch.promote_types(f.dtype, dy.dtype), torch.float32)
    total, dy, x = f.to(dtype, copy=True), as_rows(dy).to(dtype), as_rows(x).to(dtype)
    for n, (begin, end) in enumerate(itertools.pairwise(cu_samples.tolist())):
        square = (dy[begin:end].T @ x[begin:end]).square()
        total = total + (square if weight is None else weight[n] * square)
    return total.to(f.dtype)


# id: shape, weight, absolute
_ACCUM = {
    "odd": ((3, 17), 0.5, False),
    "one": ((1,), 1.0, False),
    "absolute": ((5, 33), 2.0, True),
    "empty": ((0, 4), 1.0, False),
    "long": ((515, 67), 0.25, False),
    "transposed": ((12, 20), -1.0, False),
    "mixed": ((9, 41), 1.0, False),
}


def _accum_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, (shape, weight, absolute) in _ACCUM.items():
        made = torch.Generator().manual_seed(sum(shape))
        f, g = (torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype) for _ in range(2))
        if name == "transposed":
            g = g.T.contiguous().T
        if name == "mixed":
            f = f.to(torch.promote_types(dtype, torch.float32))
        yield Sample(name, (f.abs(), g, weight, absolute))


# id: leading dims of x, in, out, rows at which samples start and end, with weights
_LINEAR = {
    "odd": ((3, 5), 17, 13, (0, 5, 10, 15), True),
    "one_row": ((1,), 8, 4, (0, 1), False),
    "short_samples": ((23,), 33, 21, (0, 0, 1, 1, 9, 23, 23), True),
    "single_rows": ((6,), 20, 12, tuple(range(7)), False),
    "no_samples": ((4,), 6, 5, (0,), False),
    "no_rows": ((0,), 6, 5, (0, 0), True),
    "rows_of_none": ((12,), 9, 10, (2, 7, 10), False),
    "one_column": ((9,), 1, 1, (0, 4, 9), True),
    "wide": ((70,), 300, 130, (0, 30, 70), True),
    "transposed": ((6, 4), 20, 12, (0, 8, 24), False),
    "mixed": ((10,), 40, 24, (0, 3, 10), True),
}


def _linear_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, (lead, k, n, cu, weighted) in _LINEAR.items():
        made = torch.Generator().manual_seed(k)
        shapes = (n, k), (*lead, n), (*lead, k)
        f, dy, x = (torch.randn(s, generator=made, dtype=torch.float64).to(device, dtype) for s in shapes)
        low = torch.promote_types(dtype, torch.float32)
        if name == "transposed":
            dy, x = dy.transpose(0, 1), x.transpose(0, 1)
        f = f.abs() if name == "odd" else f.abs().to(low)
        weight = torch.rand(len(cu) - 1, generator=made, dtype=torch.float64).to(device, low) if weighted else None
        whole = torch.int32 if name == "odd" else torch.int64
        yield Sample(name, (f, dy, x, torch.tensor(cu, dtype=whole, device=device), weight))


_accum = Op(
    "fisher_accum",
    "(Tensor f, Tensor g, float weight, bool absolute) -> Tensor",
    family="sparse",
    reference=_accum_reference,
    samples=_accum_samples,
    cost=lambda f, g, weight, absolute: Cost(3 * g.numel(), nbytes(f, f, g)),
)

_linear = Op(
    "fisher_linear",
    "(Tensor f, Tensor dy, Tensor x, Tensor cu_samples, Tensor? weight) -> Tensor",
    family="sparse",
    reference=_linear_reference,
    samples=_linear_samples,
    cost=lambda f, dy, x, cu_samples, weight: Cost(
        2 * dy.numel() * x.shape[-1] + 3 * f.numel() * (len(cu_samples) - 1), nbytes(f, f, dy, x)
    ),
)


@torch.no_grad()
def fisher_accum_(f: Tensor, g: Tensor, *, weight: float = 1.0, absolute: bool = False) -> None:
    """f += weight * g^2, or weight * |g|, written into f in one pass; without autograd.

    f, g of one shape and device, fp32, bf16, fp16 or fp64, computed in fp32 at least; f is best fp32 or wider.
    Raises ValueError on shapes or devices that do not fit.
    """
    if f.shape != g.shape or f.device != g.device:
        raise ValueError(
            f"fisher_accum_: f is {tuple(f.shape)} on {f.device}, g {tuple(g.shape)} on {g.device}; "
            "expected one shape and device"
        )
    write(f, _accum.call_(f, g, weight, absolute))


@torch.no_grad()
def fisher_linear_(f: Tensor, dy: Tensor, x: Tensor, cu_samples: Tensor, *, weight: Tensor | None = None) -> None:
    """f += sum_n weight[n] * (dy_n^T x_n)^2: the exact Fisher of each sample of a linear layer, written into f.

    f [out, in], best fp32   dy [..., out] and x [..., in] of one dtype, fp32, bf16, fp16 or fp64, the gradient of the
        summed losses with respect to the layer's output, and its input; their rows are numbered in order
    cu_samples int [N + 1]: sample n has the rows cu_samples[n] to cu_samples[n + 1]; rows of none are left out
    weight [N] or None for 1 each, such as the probability of the label that dy is for
    No gradient of a sample exists but for a tile of it. Without autograd.
    Raises ValueError on shapes, dtypes or devices that do not fit, and on the CPU on cu_samples that do not ascend.
    """
    if dy.shape[:-1] != x.shape[:-1] or f.shape != (*dy.shape[-1:], *x.shape[-1:]) or dy.dtype != x.dtype:
        raise ValueError(
            f"fisher_linear_: f is {tuple(f.shape)}, dy {dy.dtype} {tuple(dy.shape)}, x {x.dtype} {tuple(x.shape)}; "
            "expected [out, in], [..., out] and [..., in], dy and x of one dtype"
        )
    if cu_samples.dim() != 1 or not len(cu_samples) or cu_samples.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"fisher_linear_: cu_samples is {cu_samples.dtype} {tuple(cu_samples.shape)}; "
            "expected int32 or int64 [N + 1]"
        )
    if weight is not None and weight.shape != (len(cu_samples) - 1,):
        raise ValueError(f"fisher_linear_: weight is {tuple(weight.shape)}; expected [{len(cu_samples) - 1}]")
    if len({t.device for t in (f, dy, x, cu_samples, weight) if t is not None}) > 1:
        raise ValueError("fisher_linear_: its tensors are on several devices; move them to one device")
    if type(cu_samples) is Tensor and cu_samples.device.type == "cpu":  # elsewhere it would wait for the device
        ends = [0, *cu_samples.tolist(), dy.shape[:-1].numel()]
        if ends != sorted(ends):
            raise ValueError(f"fisher_linear_: cu_samples is {ends[1:-1]}; expected ascending, 0 to {ends[-1]} rows")
    write(f, _linear.call_(f, dy, x, cu_samples, weight))
