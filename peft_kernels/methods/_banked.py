"""The one tuner per module that a `pk.AdapterBank` keeps all its adapters in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..engine.method import Method, Tuner
from ..engine.rows import Routing, refuse
from ..engine.site import Base, Site


@dataclass(frozen=True)
class Banked(Method):
    """Room for `slots` LoRA adapters at each module; in no registry, as it is neither trained nor saved."""

    key: ClassVar[str] = "bank"
    roles: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    slots: int
    ranks: int  # of one slot
    dtype: torch.dtype | None = None
    at_module: Mapping[str, int] = field(default_factory=dict)  # module path -> ranks there

    def at(self, site: Site) -> Banked:
        return replace(self, ranks=self.at_module.get(site.name, self.ranks))


class BankedTuner(Tuner, method=Banked):
    """Slot s has the rows s * ranks to (s + 1) * ranks of both factors, of which its adapter fills the first ones.

    To the op these are adapters 2 s, what is filled, and 2 s + 1, what is not and no row ever names: so filling a slot
    changes one number of r_indptr, the end of 2 s, and no adapter that others are reading.
    """

    a: Tensor  # [slots * ranks, in]
    bt: Tensor  # [slots * ranks, out]
    r_indptr: Tensor  # int32 [2 slots + 1]
    scaling: Tensor  # fp32 [2 slots]

    def __init__(self, cfg: Banked, site: Site):
        super().__init__(cfg, site)
        self.ranks = cfg.ranks
        reference = site.param(0)  # where the site's tuners live, and in which dtype
        if reference.is_meta:
            raise ValueError(f"{site.name} is on the meta device; load its values before making a bank")
        device, dtype, rows = reference.device, cfg.dtype or reference.dtype, cfg.slots * cfg.ranks
        starts = torch.arange(cfg.slots + 1, dtype=torch.int32, device=device) * cfg.ranks
        for name, value in {
            "a": torch.zeros(rows, site.n_in, dtype=dtype, device=device),
            "bt": torch.zeros(rows, site.n_out, dtype=dtype, device=device),
            "r_indptr": starts.repeat_interleave(2)[:-1].contiguous(),
            "scaling": torch.zeros(2 * cfg.slots, device=device),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def put(self, slot: int, a: Tensor, bt: Tensor, scale: float) -> None:
        """An adapter's a [r, in] and bt [r, out] at this module; r may be 0."""
        start, ranks = slot * self.ranks, len(a)
        self.a[start : start + ranks].copy_(a)
        self.bt[start : start + ranks].copy_(bt)
        self.scaling[2 * slot].fill_(scale)
        self.r_indptr[2 * slot + 1].fill_(start + ranks)

    @staticmethod
    def number(slot: int) -> int:
        """Of the slot's adapter, for the op."""
        return 2 * slot

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Any], route: Routing, *args: Any, **kwargs: Any) -> Any:
        """The rows of banked adapters in one op; the others are those of `base`."""
        if route.slots is None or not (torch.compiler.is_compiling() or route.banked):
            return base(*args, **kwargs)
        (tuner,), (x,) = tuners.values(), args
        refuse(base, args, kwargs)
        if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{base.site.name}: a bank's adapters have no gradients, as they may be swapped before the backward; "
                "call the model under torch.no_grad()"
            )
        if x.dim() < 2:
            raise ValueError(f"{base.site.name} gets {tuple(x.shape)}; a route needs a tensor with batch rows")
        rows = route.rows(x.shape[0], base.site.name)
        if x.shape[0] != rows:
            x = x.expand(rows, *x.shape[1:])
        ids = route.expanded(rows, route.slots).to(x.device)
        bank = tuner.a, tuner.bt, tuner.r_indptr, tuner.scaling, ids
        # Other layouts may round otherwise than F.linear does, and rows without an adapter are to keep their bits.
        if base.innermost and base.site.layout == "rows":
            weight, bias = base.effective()
            return ops.multi_lora_linear(x, weight, bias, *bank, r_max=tuner.ranks)
        return ops.multi_lora_add(base(x), x, *bank, r_max=tuner.ranks)

    def _apply(self, fn: Any, recurse: bool = True) -> BankedTuner:
        exact = self.scaling
        super()._apply(fn, recurse)
        self.scaling = exact.to(self.scaling.device)  # model.half() is about the factors
        return self

    def extra_repr(self) -> str:
        return f"{len(self.scaling) // 2} slots of {self.ranks} ranks"
