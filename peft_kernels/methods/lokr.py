"""LoKr: the change of a weight is a Kronecker product, whose factors may be of low rank. Yeh et al. 2023.

    y = W x + bias + (alpha / r) (w1 kron w2) x        w1 [out_l, in_m], w2 [out_k, in_n]

out = out_l out_k and in = in_m in_n are divisors as near the square root as decompose_factor lets them be. Where r is
less than half the larger side of w2 it is w2_a w2_b with r between them, with decompose_both w1 as well. A convolution
has the channels of its group for `in` and its kernel in w2, of which use_effective_conv2d makes

    w2[o, i, k] = sum over p, q of  t2[p, q, k] w2_a[p, o] w2_b[q, i]        Hyeon-Woo et al. 2022, arXiv:2108.06098

These are the formula, the names and the shapes of Hugging Face PEFT, whose files `pk.hf.load` reads and `pk.hf.save`
writes. w1 kron w2 is never made for a linear layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..engine.method import Changes, Tuner
from ..engine.site import Base, Site
from ._patterns import Ranked
from .krona import split, with_product

ZEROS = ("w1", "w2")


@dataclass(frozen=True)
class LoKr(
    Ranked,
    roles=("q", "v"),
    lr=2e-2,
    tiny={"rank": 1, "decompose_both": True, "rank_dropout": 0.25},
    kinds=("linear", "conv"),
    family="reparametrised",
    kernel="kron rescale",
):
    """A Kronecker product of low-rank factors is added to each weight. Yeh et al. 2023, arXiv:2309.14859.

    Fields are those of Hugging Face PEFT's LoKrConfig, and so is what it computes.
    """

    rank: int = 8  # between the factors of w2, and of w1
    alpha: float = 8.0  # the product is scaled by alpha / rank
    decompose_both: bool = False  # w1 too is a product of two factors
    decompose_factor: int = -1  # the size of w1 where it divides the layer's, else a bound of it; -1: near the root
    use_effective_conv2d: bool = False  # w2 of a convolution is a Tucker decomposition
    rank_dropout: float = 0.0  # probability in training that an output feature of the product is dropped
    rank_dropout_scale: bool = False  # the others are divided by the part that is kept
    module_dropout: float = 0.0  # probability in training that the product of a site is left out of a call
    zero: str = "w1"  # the factor that is zero at first: w1 as in PEFT, or w2 as in LyCORIS
    rank_pattern: dict[str, int] = field(default_factory=dict)  # role or glob -> rank there
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # role or glob -> alpha there

    def __post_init__(self):
        super().__post_init__()
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"LoKr {name} = {getattr(self, name)}; expected a probability from 0 to 1")
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ValueError(f"LoKr decompose_factor = {self.decompose_factor}; expected at least 1, or -1")
        if self.zero not in ZEROS:
            raise ValueError(f"LoKr zero = {self.zero!r}; expected one of {', '.join(ZEROS)}")

    def divided(self, n: int) -> tuple[int, int]:
        """n as (left, right), the sizes of w1 and w2."""
        factor = self.decompose_factor
        if factor > 0 and n % factor == 0:
            return factor, n // factor
        return split(n, max(factor, 0))


def _kaiming(t: Tensor, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(max(t[0].numel(), 1))
    return t.uniform_(-bound, bound, generator=generator)


class LoKrTuner(Tuner, method=LoKr):
    fresh = True
    w1: nn.Parameter | None
    w1_a: nn.Parameter
    w1_b: nn.Parameter
    w2: nn.Parameter | None
    w2_a: nn.Parameter
    w2_b: nn.Parameter
    t2: nn.Parameter | None

    def __init__(self, cfg: LoKr, site: Site):
        super().__init__(cfg, site)
        self.cfg: LoKr = cfg
        self.scale, r = cfg.alpha / cfg.rank, cfg.rank
        kernel = tuple(cast(nn.Conv2d, site.module).kernel_size) if site.kind == "conv" else ()
        (out_l, out_k), (in_m, in_n) = cfg.divided(site.n_out), cfg.divided(site.n_in // math.prod(kernel))
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"):
            self.register_parameter(name, None)

        def drawn(name: str, *shape: int, zero: bool = False) -> None:
            setattr(self, name, site.param(*shape, init="zeros" if zero else _kaiming))

        first = cfg.zero == "w1"
        if cfg.decompose_both and r < max(out_l, in_m) / 2:
            drawn("w1_a", out_l, r, zero=first)
            drawn("w1_b", r, in_m)
        else:
            drawn("w1", out_l, in_m, zero=first)
        if r >= max(out_k, in_n) / 2:
            drawn("w2", out_k, in_n, *kernel, zero=not first)
        elif cfg.use_effective_conv2d and math.prod(kernel) > 1:
            drawn("t2", r, r, *kernel, *([1] if len(kernel) == 1 else []))  # as PEFT has it
            drawn("w2_a", r, out_k)
            drawn("w2_b", r, in_n, zero=not first)
        else:
            drawn("w2_a", out_k, r)
            drawn("w2_b", r, in_n * math.prod(kernel), zero=not first)
        self.sizes = (out_l, in_m), (out_k, in_n * math.prod(kernel))

    def left(self) -> Tensor:
        """w1, [out_l, in_m]."""
        return self.w1 if self.w1 is not None else (self.w1_a @ self.w1_b).to(self.w1_a.dtype)  # autocast makes less

    def right(self) -> Tensor:
        """w2, [out_k, in_n], with the kernel of a convolution [out_k, in_n * kernel]."""
        if self.w2 is not None:
            return self.w2.flatten(1)
        if self.t2 is None:
            made = self.w2_a @ self.w2_b
        else:
            made = torch.einsum("pqk,po,qi->oik", self.t2.flatten(2), self.w2_a, self.w2_b).flatten(1)
        return made.to(self.w2_a.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * torch.kron(self.left(), self.right()), bias

    def draw(self, n_out: int, device: torch.device) -> Tensor | None:
        """By what the output features of the product are multiplied in one call, [n_out]; None: by 1."""
        cfg = self.cfg
        if not (self.training and (cfg.rank_dropout or cfg.module_dropout)):
            return None
        kept = (torch.rand(1, device=device) > cfg.module_dropout).float().expand(n_out)
        if cfg.rank_dropout:
            rows = (torch.rand(n_out, device=device) > cfg.rank_dropout).float()
            share = rows.mean().clamp(min=1 / n_out) if cfg.rank_dropout_scale else 1.0  # of none: zeros
            kept = kept * rows / share
        return kept

    def forward(self, base: Base, x: Tensor) -> Tensor:
        site = base.site
        kept = self.draw(site.n_out, x.device)
        if kept is None:
            if site.kind != "linear":
                return super().forward(base, x)
            return with_product(base, base(x), x, self.left(), self.right(), self.scale)
        if site.kind == "linear":
            change = ops.kron_linear(x, self.left().T, self.right().T, scale=self.scale)
            return base(x) + ops.rescale(change, kept)
        change = site.apply(self.scale * torch.kron(self.left(), self.right()), None, x)
        return base(x) + change * kept.view(-1, *[1] * (change.dim() - 1 - site.channels(change))).to(change.dtype)

    def changes(self) -> Changes:
        left, right = self.sizes
        ranks = [min(left), min(right)]
        if self.w1 is None:
            ranks[0] = min(ranks[0], self.cfg.rank)
        if self.w2 is None:
            ranks[1] = min(ranks[1], self.cfg.rank)
        return Changes(weight=math.prod(left) * math.prod(right), rank=math.prod(ranks))
