"""NF4: weights in 4 bits, 16 levels and a scale per block. Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).

A tensor w is taken as flat, row-major, in blocks of `blocksize` elements, so a block may go on in the next row. Per
block, in fp32:

    absmax = max |w|      s = 1 / absmax      index = number of midpoints of neighbouring LEVELS below w * s
    w ~ LEVELS[index] * absmax, rounded once to the dtype asked for

A byte is (index[2i] << 4) | index[2i + 1], as in bitsandbytes; an odd last one has index 7, a zero, beside it. A block
of zeros has index 7 and absmax 0: s is at most the largest fp32, which the tiniest absmax would exceed. A block with a
NaN or Inf has absmax NaN, thus is NaN throughout when it is read, on every device.

Packed bytes may be a view of any dtype (quant_storage of FSDP); they are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nf4_absmax
from ._op import Cost, Op, Sample
from .nf4_absmax import checked_absmax, dynamic_map, each, fits, in_blocks, scaled, size_of

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
MIDPOINTS = tuple((low + high) / 2 for low, high in zip(LEVELS, LEVELS[1:], strict=False))
BLOCKSIZES = tuple(2**i for i in range(5, 13))  # 32 to 4096


# -- references -------------------------------------------------------------------------------------------------------


def _quantize_reference(w, blocksize):
    units, absmax = scaled(in_blocks(w.reshape(-1).float(), blocksize))
    midpoints = torch.tensor(MIDPOINTS, dtype=torch.float32, device=w.device)
    index = torch.bucketize(units, midpoints).to(torch.uint8).view(-1)[: w.numel()]
    index = F.pad(index, (0, w.numel() % 2), value=7)
    return ((index[::2] << 4) | index[1::2])[:, None], absmax


def weight(packed, absmax, shape, blocksize, dtype, absmax_q, code2, offset, blocksize2):
    """The reference of dequantize_nf4, in the wider of the dtypes of absmax and `dtype` until the end."""
    numel = math.prod(shape)
    if absmax_q is not None:
        absmax = nf4_absmax.dequantize_reference(absmax_q, absmax, code2, offset, blocksize2)
    levels = torch.tensor(LEVELS, dtype=torch.promote_types(absmax.dtype, dtype), device=packed.device)
    two = packed.contiguous().view(torch.uint8).reshape(-1).int()  # int, which indexes without a copy
    index = torch.stack((two >> 4, two & 15), -1).view(-1)[:numel]
    return (levels[index] * each(absmax, blocksize, numel)).to(dtype).view(shape)


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: N, K, blocksize, of the second level or 0. Rows start within blocks and bytes, and last blocks are cut short.
SHAPES = {
    "aligned": (16, 128, 64, 0),
    "nested": (40, 64, 32, 64),
    "straddling": (8, 80, 64, 0),
    "odd": (3, 65, 32, 0),
    "nested_odd": (67, 131, 32, 256),
    "three_chunks": (5, 328, 64, 0),
    "one_block": (6, 100, 4096, 0),
    "one_number": (1, 1, 64, 0),
    "no_weights": (0, 64, 64, 0),
    "many_rows": (70, 96, 128, 0),
}


class Packed(NamedTuple):
    """Everything that stands for a quantised [N, K]; the last four are None and 256 if absmax is not quantised."""

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int
    absmax_q: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None
    blocksize2: int = 256

    @property
    def nested(self) -> tuple:
        return self[4:]


def layouts(device: str) -> Iterator[tuple[str, Packed]]:
    """The test inputs that all readers of packed weights share."""
    for name, (n, k, blocksize, blocksize2) in SHAPES.items():
        made = torch.Generator().manual_seed(n + k)
        w = torch.randn(n, k, generator=made, dtype=torch.float32).to(device) * 0.1
        if name == "straddling":
            w.view(-1)[64:128] = 0
        packed, absmax = _quantize_reference(w, blocksize)
        if name == "many_rows":
            packed = packed.view(-1).view(torch.bfloat16)[:, None]
        if not blocksize2:
            yield name, Packed(packed, absmax, (n, k), blocksize)
            continue
        code = dynamic_map(device)
        q, absmax2, offset = nf4_absmax.quantize_reference(absmax, code, blocksize2)
        yield name, Packed(packed, absmax2, (n, k), blocksize, q, code, offset, blocksize2)


def _quantize_samples(dtype, device):
    for name, (n, k, blocksize, _) in SHAPES.items():
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k), dtype=torch.float64).to(device, dtype)
        yield Sample(name, (w, blocksize))
        if name == "aligned":
            yield Sample("transposed", (w.T, 256))


def _dequantize_samples(dtype, device):
    for name, p in layouts(device):
        yield Sample(name, (*p[:4], dtype, *p.nested))


def _quantize_cost(w, blocksize):
    return Cost(5 * w.numel(), size_of(w) + (w.numel() + 1) // 2 + 4 * -(-w.numel() // blocksize))


def _dequantize_cost(packed, absmax, shape, blocksize, dtype, absmax_q, code2, offset, blocksize2):
    n = math.prod(shape)
    return Cost(n, size_of(packed, absmax, absmax_q, code2) + n * dtype.itemsize)


_quantize = Op(
    "quantize_nf4",
    "(Tensor w, int blocksize) -> (Tensor, Tensor)",
    family="nf4",
    reference=_quantize_reference,
    samples=_quantize_samples,
    cost=_quantize_cost,
)

_dequantize = Op(
    "dequantize_nf4",
    "(Tensor packed, Tensor absmax, SymInt[] shape, int blocksize, ScalarType dtype, Tensor? absmax_q, Tensor? code2,"
    " Tensor? offset, int blocksize2) -> Tensor",
    family="nf4",
    reference=weight,
    samples=_dequantize_samples,
    cost=_dequantize_cost,
)

# -- the functions ----------------------------------------------------------------------------------------------------


def checked_blocksize(op: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{op}: blocksize is {blocksize}; expected one of {', '.join(map(str, BLOCKSIZES))}")


def checked(op: str, packed, absmax, numel: int, blocksize: int, absmax_q, code2, offset, blocksize2: int) -> None:
    """Raises ValueError unless the tensors are `numel` quantised weights."""
    checked_blocksize(op, blocksize)
    held, needed = packed.numel() * packed.element_size(), (numel + 1) // 2
    if held != -(-needed // packed.element_size()) * packed.element_size():
        raise ValueError(f"{op}: packed has {held} bytes; {numel} weights take {needed}, see quantize_nf4")
    blocks = -(-numel // blocksize)
    if absmax_q is None and code2 is None and offset is None:
        return fits(op, "absmax", absmax, torch.float32, blocks, packed)
    if absmax_q is None or code2 is None or offset is None:
        raise ValueError(f"{op}: quantised scales are absmax_q, code2 and offset together; give all three or none")
    fits(op, "absmax_q", absmax_q, torch.uint8, blocks, packed)
    checked_absmax(op, absmax_q, absmax, code2, offset, blocksize2)


def quantize_nf4(w: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """(packed uint8 [ceil(n / 2), 1], absmax fp32 [ceil(n / blocksize)]) of w, n elements of any shape.

    w fp32, bf16 or fp16 (fp64 is rounded to fp32 first); blocksize 32, 64, ... 4096. Bytes and scales are those that
    bitsandbytes stores; a block with a NaN or Inf has the scale NaN. Not differentiable. Raises ValueError on a
    blocksize or dtype that it does not know. Dettmers et al. 2023, arXiv:2305.14314.
    """
    checked_blocksize("quantize_nf4", blocksize)
    if not w.is_floating_point():
        raise ValueError(f"quantize_nf4: w is {w.dtype}; expected a floating dtype")
    return _quantize(w.detach(), blocksize)


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
    *,
    absmax_q: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> Tensor:
    """The weights of `quantize_nf4`, [*shape] in `dtype`: level times scale in fp32, rounded once.

    packed: the bytes, of any dtype and shape.   absmax fp32 [ceil(n / blocksize)], or with absmax_q (uint8, as many),
    code2 fp32 [256] and offset fp32 0-d from `quantize_absmax` that of the second level, [ceil(blocks / blocksize2)].
    Raises ValueError on what does not fit. Dettmers et al. 2023, arXiv:2305.14314.
    """
    checked("dequantize_nf4", packed, absmax, math.prod(shape), blocksize, absmax_q, code2, offset, blocksize2)
    return _dequantize(packed, absmax, list(shape), blocksize, dtype, absmax_q, code2, offset, blocksize2)
