"""Routed calls of low-rank tuners: the updates of all adapters of a batch in one op."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..engine.rows import Routing, refuse
from ..engine.site import Base

if TYPE_CHECKING:
    from .lora import LoRATuner


def in_one_op(base: Any, tuners: dict[int, Any], route: Routing, args: tuple, kwargs: dict) -> tuple | None:
    """A routed call with the low-rank updates of all adapters, made in one op; None where it takes several.

    (y; the tuners of which y has the updates and nothing else; the adapter number of each row; whether what is made of
    the tuners' numbers may be kept until one of these changes).
    """
    ps = {t.dropout if t.training else 0.0 for t in tuners.values()}
    x = args[0] if len(args) == 1 and not kwargs else None
    if base.site.kind != "linear" or len(ps) > 1 or x is None or x.dim() < 2:
        return None
    refuse(base, args, kwargs)
    rows = route.rows(x.shape[0], base.site.name or "the model")
    x = x if x.shape[0] == rows else x.expand(rows, *x.shape[1:])
    ids = route.expanded(rows).to(x.device)
    keep = not (torch.is_grad_enabled() or any(t.training for t in tuners.values()))
    compiling = torch.compiler.is_compiling()
    if not compiling and len(set(route.numbers)) == 1 and route.numbers[0] in tuners:
        return tuners[route.numbers[0]](Base(base.site), x), {}, ids, keep  # as if it were active alone
    if not (keep or compiling):
        tuners = {number: t for number, t in tuners.items() if number in route.numbers}
    if not tuners:
        return base(x), tuners, ids, keep
    bank = (*_bank(tuners, route, keep), ids)
    r_max = max(t.a.shape[0] for t in tuners.values())
    p, rng = next(iter(tuners.values())).draw(x)
    # Other layouts may round otherwise than F.linear does, and rows without an adapter are to keep their bits.
    if base.innermost and base.site.layout == "rows":
        return ops.multi_lora_linear(x, *base.effective(), *bank, p=p, rng=rng, r_max=r_max), tuners, ids, keep
    return ops.multi_lora_add(base(x), x, *bank, p=p, rng=rng, r_max=r_max), tuners, ids, keep


def _bank(tuners: dict[int, LoRATuner], route: Routing, keep: bool) -> tuple:
    """(a, bt, r_indptr, scaling) of tuners by adapter number; the numbers between have rank 0.

    keep: the factors are put together once, until one of them changes; otherwise at every call, differentiably.
    """
    own = [tuners[number] for number in sorted(tuners)]
    ranks, scales = [0] * (max(tuners) + 1), [0.0] * (max(tuners) + 1)
    for number, tuner in tuners.items():
        ranks[number], scales[number] = tuner.a.shape[0], tuner.scale
    a: list[Tensor] = [t.a for t in own]
    b: list[Tensor] = [t.b for t in own]

    def together() -> tuple[Tensor, Tensor]:
        return torch.cat(a), torch.cat([f.T for f in b])

    factors = own[0]._kept.once("bank", together, [*a, *b]) if keep else together()
    device, dtype = a[0].device, torch.promote_types(a[0].dtype, torch.float32)
    key = device, dtype, *ranks, *scales
    indptr = route.once(("r_indptr", *key), lambda: torch.tensor([0, *itertools.accumulate(ranks)], device=device))
    return *factors, indptr, route.once(("scaling", *key), lambda: torch.tensor(scales, dtype=dtype, device=device))
