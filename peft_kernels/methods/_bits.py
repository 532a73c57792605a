"""A mask of a matrix, a bit for each number, and the numbers that it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._kept import Kept


class Bits(nn.Module):
    """For a module: which numbers of a matrix of `shape` are kept.

    bits uint8 [ceil(out * in / 8)], a buffer: position 8 i + j of the matrix is bit j of byte i.
    """

    bits: Tensor
    shape: tuple[int, int]

    def keep_all(self, shape: tuple[int, int], device: torch.device) -> None:
        """Makes the buffer."""
        self.shape, self._kept = shape, Kept()
        every = packed(torch.ones(shape, dtype=torch.bool, device=device))
        self.register_buffer("bits", every)

    @property
    def mask(self) -> Tensor:
        """bool, of the matrix's shape"""
        with torch.inference_mode(False):  # a later call may keep it for its backward
            return self._kept.once("mask", lambda: unpacked(self.bits, self.shape), [self.bits])

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self.bits.copy_(packed(mask))

    def at(self, positions: Tensor) -> Tensor:
        """The mask that keeps these, flat."""
        return torch.zeros_like(self.mask).view(-1).index_fill_(0, positions, True).view(self.shape)

    @property
    def kept(self) -> int:
        """How many numbers the mask keeps."""
        return int(self.mask.sum())

    def dense(self, values: Tensor) -> Tensor:
        """The matrix, whole already or [kept] in ascending order of position; what is not kept is zero then."""
        return values if values.dim() == 2 else values.new_zeros(self.shape).masked_scatter(self.mask, values)

    def settled(self, values: nn.Parameter) -> nn.Parameter:
        """Of a whole matrix what is kept, a parameter of its own; `values` themselves if they are that."""
        if values.dim() != 2:
            return values
        return nn.Parameter(values.detach()[self.mask], requires_grad=values.requires_grad)

    def fitting(self, name: str, own: nn.Parameter, bits: Tensor, values: Tensor) -> nn.Parameter:
        """`own`, or one of the shape that a file's `values` of that name have; ValueError if its bits say otherwise."""
        checked(bits)
        if values.shape != self.shape and values.shape != (kept := int(unpacked(bits, self.shape).sum()),):
            expected = f"{self.shape} or what the mask keeps, ({kept},)"
            raise ValueError(f"{name} is {tuple(values.shape)}; expected {expected}")
        if values.shape == own.shape:
            return own
        return nn.Parameter(own.new_empty(values.shape), requires_grad=own.requires_grad)


def checked(bits: Tensor) -> None:
    """ValueError for numbers of another type, which would lose bits as they are copied."""
    if bits.dtype != torch.uint8:
        raise ValueError(f"bits is {bits.dtype}; expected uint8")


def packed(mask: Tensor) -> Tensor:
    """Bools of any shape -> uint8, eight in each; the last one filled up with zeros."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of packed."""
    single = bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return single.flatten()[: math.prod(shape)].view(shape).bool()
