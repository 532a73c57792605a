"""Double quantisation: the scales of NF4 weights in 8 bits. Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).

In fp32, around one offset, the mean of the finite scales (summed in fp64), blocks of `blocksize2` scales have a scale
absmax2 each:

    d = absmax - offset      absmax2 = max |d|      q = index of the nearest of code to d / absmax2, the lower of two
    absmax ~ code[q] * absmax2 + offset

The division is a product with 1 / absmax2 as in NF4 itself, and product and sum round apart. A block with a NaN, which
stands for weights that were not finite, is NaN throughout.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import Cost, Op, Sample


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The default 8-bit code of `quantize_absmax`: 256 rising fp32 numbers from -0.993 to 1, finer towards 0.

    The signed map of dynamic tree quantisation: seven decades, the i-th of which has 2^i numbers of each sign.
    Dettmers 2016, arXiv:1511.04561.
    """
    return _dynamic_map().to(device)


@functools.cache
def _dynamic_map() -> Tensor:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, device="cpu", dtype=torch.float32)
        decade = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2.0
        values += [*decade.tolist(), *(-decade).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


# -- references -------------------------------------------------------------------------------------------------------


def in_blocks(flat: Tensor, size: int) -> Tensor:
    """flat [n] as [blocks, size], the last one padded with zeros."""
    return F.pad(flat, (0, -flat.shape[0] % size)).view(-1, size)


def scaled(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks / absmax, absmax [blocks]), fp32; absmax is NaN where a block is not finite."""
    absmax = blocks.abs().amax(1)
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    return blocks * absmax.reciprocal().clamp(max=torch.finfo(torch.float32).max)[:, None], absmax


def each(scales: Tensor, size: int, n: int) -> Tensor:
    """The scale of each of n elements."""
    return scales.reshape(-1, 1).expand(-1, size).reshape(-1)[:n]


def quantize_reference(absmax, code, blocksize2):
    absmax, code = absmax.float(), code.float()
    finite = absmax.isfinite()
    total = torch.where(finite, absmax, 0).sum(dtype=torch.float64)
    offset = (total / finite.sum().clamp(min=1)).float()
    units, absmax2 = scaled(in_blocks(absmax - offset, blocksize2))
    q = torch.bucketize(units, ((code[1:].double() + code[:-1].double()) / 2).float())
    return q.to(torch.uint8).view(-1)[: absmax.shape[0]], absmax2, offset


def dequantize_reference(q, absmax2, code, offset, blocksize2):
    return code[q.reshape(-1).long()] * each(absmax2, blocksize2, q.numel()) + offset


# -- test inputs and costs --------------------------------------------------------------------------------------------


def _absmax_samples(dtype, device):
    for n, blocksize2 in ((1, 256), (700, 256), (129, 64)):
        absmax = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(device)
        absmax, code = (t.to(torch.promote_types(dtype, torch.float32)) for t in (absmax + 0.5, dynamic_map(device)))
        yield f"of_{n}", absmax, code, blocksize2


def _quantize_samples(dtype, device):
    for name, *args in _absmax_samples(dtype, device):
        yield Sample(name, tuple(args))


def _dequantize_samples(dtype, device):
    for name, absmax, code, blocksize2 in _absmax_samples(dtype, device):
        q, absmax2, offset = quantize_reference(absmax, code, blocksize2)
        yield Sample(name, (q, absmax2.to(code.dtype), code, offset.to(code.dtype), blocksize2))


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


_quantize = Op(
    "quantize_absmax",
    "(Tensor absmax, Tensor code, int blocksize2) -> (Tensor, Tensor, Tensor)",
    family="nf4",
    reference=quantize_reference,
    samples=_quantize_samples,
    cost=lambda absmax, code, blocksize2: Cost(10 * absmax.numel(), 5 * absmax.numel()),
)

_dequantize = Op(
    "dequantize_absmax",
    "(Tensor q, Tensor absmax2, Tensor code, Tensor offset, int blocksize2) -> Tensor",
    family="nf4",
    reference=dequantize_reference,
    samples=_dequantize_samples,
    cost=lambda q, absmax2, code, offset, blocksize2: Cost(2 * q.numel(), size_of(absmax2, code) + 5 * q.numel()),
)


# -- the functions ----------------------------------------------------------------------------------------------------


def fits(op: str, name: str, t: Tensor, dtype: torch.dtype, n: int, like: Tensor) -> None:
    if t.dtype != dtype or t.numel() != n or t.device != like.device:
        raise ValueError(
            f"{op}: {name} is {t.dtype} {tuple(t.shape)} on {t.device}; expected {n} of {dtype} on {like.device}"
        )


def checked_absmax(op: str, q: Tensor, absmax2: Tensor, code: Tensor, offset: Tensor, blocksize2: int) -> None:
    """Raises ValueError unless the tensors are quantised scales."""
    checked_blocksize2(op, blocksize2)
    fits(op, "absmax (of the second level)", absmax2, torch.float32, -(-q.numel() // blocksize2), q)
    fits(op, "code", code, torch.float32, 256, q)
    fits(op, "offset", offset, torch.float32, 1, q)


def checked_blocksize2(op: str, blocksize2: int) -> None:
    if blocksize2 < 1:
        raise ValueError(f"{op}: blocksize2 is {blocksize2}; expected at least 1")


def quantize_absmax(absmax: Tensor, code: Tensor | None = None, blocksize2: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """(q uint8 [n], absmax2 fp32 [ceil(n / blocksize2)], offset fp32 0-d) of the scales absmax fp32 [n].

    code: 256 rising fp32 numbers, default `dynamic_map()`. A NaN makes the scales of its block NaN and no others.
    Raises ValueError on what does not fit. Dettmers et al. 2023, arXiv:2305.14314.
    """
    checked_blocksize2("quantize_absmax", blocksize2)
    code = dynamic_map(absmax.device) if code is None else code
    fits("quantize_absmax", "absmax", absmax, torch.float32, absmax.numel(), absmax)
    fits("quantize_absmax", "code", code, torch.float32, 256, absmax)
    return _quantize(absmax.detach().reshape(-1), code, blocksize2)


def dequantize_absmax(q: Tensor, absmax2: Tensor, code: Tensor, offset: Tensor, blocksize2: int = 256) -> Tensor:
    """The scales of `quantize_absmax`, fp32 [n]: code[q] * absmax2 + offset, two roundings.

    q uint8 [n]   absmax2 fp32 [ceil(n / blocksize2)]   code fp32 [256]   offset fp32 0-d
    Raises ValueError on what does not fit. Dettmers et al. 2023, arXiv:2305.14314.
    """
    fits("dequantize_absmax", "q", q, torch.uint8, q.numel(), q)
    checked_absmax("dequantize_absmax", q, absmax2, code, offset, blocksize2)
    return _dequantize(q, absmax2, code, offset, blocksize2)
