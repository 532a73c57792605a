"""Every case. Named shapes are a generator in FAMILIES; a new op appears by itself, on the first of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from ..check import outputs, with_leaves
from ..ops import all_ops
from .bottleneck_cases import bottleneck_cases, rescale_cases
from .case import Case, Problem, Run, of_reference
from .hadamard_cases import hadamard_cases
from .kron_cases import kron_cases
from .lora_cases import accelerate_cases, lora_cases, route_cases, slices_cases
from .nf4_cases import nf4_cases
from .prefix_cases import prefix_cases
from .select_cases import select_cases
from .sparse_cases import sparse_cases
from .split_cases import split_cases


def _sample_cases(device: str) -> Iterator[Case]:
    for op in all_ops().values():
        sample = next(iter(op.samples(torch.float32, "cpu")))
        first = next(a for a in sample.args if isinstance(a, Tensor) and a.dim())
        width = first.shape[-1]
        for mode in ("forward", "recorded", "full") if op.gradient else ("forward",):
            shape = f"sample {sample.id}"
            yield Case(op.name, shape, mode, "float32", first.numel() // width, width, 0, "default", _sample)


def _sample(case: Case, device: str, stack: ExitStack) -> Problem:
    op = all_ops()[case.op]
    sample = next(iter(op.samples(case.torch_dtype, device)))
    args, leaves = with_leaves(sample)
    g = torch.randn(outputs(op.reference(*args))[0].shape, device=device)  # of integers too, which have no gradient
    return Problem(
        "reference",  # not plain torch: nobody would write it so
        [Run(lambda: outputs(op(*args))[0], tuple(leaves))],
        {"reference": [Run(lambda: outputs(op.reference(*args))[0], tuple(leaves))]},
        g,
        *of_reference(op, sample.args, sample.differentiable, g, case.mode),
        forward=[op.cost(*args)],
    )


FAMILIES = (
    lora_cases,
    accelerate_cases,
    slices_cases,
    route_cases,
    nf4_cases,
    sparse_cases,
    rescale_cases,
    select_cases,
    split_cases,
    kron_cases,
    hadamard_cases,
    bottleneck_cases,
    prefix_cases,
    _sample_cases,
)


def cases(device: str) -> list[Case]:
    """Every case of a device, in the order in which they run."""
    return [case for family in FAMILIES for case in family(device)]
