"""Intrinsic SAID: all weights move in one random subspace of few dimensions.

    W'_i = W_i + lam_i P_i(theta)       theta [d - number of tensors], one vector for all; lam_i one number per tensor
    P_i = c_i H G Pi H B                the Fastfood projection; c_i so that it keeps norms on average

theta starts at 0 and every lam_i at 1. The random matrices follow from the seed of attach, the path of the module and
the name of the tensor: a file holds theta and the lam_i. A tensor of fewer than len(theta) numbers, rounded up to a
power of two, sees that many numbers of theta, as in the authors' code.
Aghajanyan et al. 2020, arXiv:2012.13255; Li et al. 2018, arXiv:1804.08838; Le et al. 2013, arXiv:1408.3060.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..engine.method import Changes, Method, Tuner
from ..engine.site import Base, Site
from ..ops.hadamard import LARGEST, padded
from ._shared import SharedTuner, share


@dataclass(frozen=True)
class SAID(
    Method,
    roles=("*",),
    lr=3e-2,
    tiny={"d": 300},
    kinds=("linear", "conv", "norm", "embedding"),
    family="reparametrised",
    kernel="hadamard",
):
    """Trains d numbers, spread over all weights by a random projection. Aghajanyan et al. 2020, arXiv:2012.13255.

    d and lr are those of the authors' released runs. RMSNorms stay as they are. Few numbers are trained and stored, but
    memory is not small: the projection of a tensor of D numbers takes 4 bytes (6 where more than 2^15 numbers of theta
    enter) for each of D rounded up to a power of two, beside the weights and in no file. A training step makes the
    tuned weight of a layer twice, in its forward and in its backward; between them it is not held.
    """

    d: int = 20_000  # trained numbers, those of theta and one for each tensor
    structure_aware: bool = True  # a trained factor for each tensor; without them it is the paper's DID
    compat_grad_scale: bool = False  # theta's gradient from a tensor over its padded size: what the authors' code does

    def __post_init__(self):
        super().__post_init__()
        if self.d < 1:
            raise ValueError(f"SAID d = {self.d}; expected at least 1")

    def select(self, sites: list[Site]) -> list[Site]:
        return [site for site in super().select(sites) if site.plain or site.kind != "norm"]

    def attached(self, tuners: list[Tuner]) -> None:
        own = cast("list[SAIDTuner]", tuners)
        factors = sum(len(tuner.projections) for tuner in own) if self.structure_aware else 0
        if self.d <= factors:
            raise ValueError(
                f"SAID d = {self.d} for {factors} tensors with a factor each; expected more than {factors}"
            )
        for tuner in own:
            tuner.project(self.d - factors)
        own[0].theta = nn.Parameter(own[0].theta.new_zeros(self.d - factors))
        share(own, "theta")


@dataclass
class Projection:
    """P of one tensor: what it is made from, and its matrices, which no file, state_dict or pickle holds.

    Copies share the matrices, which nobody writes.
    """

    seed: int
    numel: int
    d: int = 0  # numbers of theta that enter
    norm: float = 1.0
    matrices: tuple[Tensor, Tensor, Tensor] | None = None  # sign [d], pi_mod [n] and g [n]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The matrices, on this device from here on; made anew where they are not yet or on the meta device."""
        if self.matrices is None or self.matrices[0].device != device:
            with torch.inference_mode(False):  # a later call may keep them for its backward
                if self.matrices is None or self.matrices[0].is_meta:
                    self.matrices = ops.fastfood_state(self.seed, self.numel, self.d)
                    self.norm = ops.fastfood_norm(self.matrices[2], self.numel)
                sign, pi_mod, g = self.matrices
                self.matrices = sign.to(device), pi_mod.to(device), g.to(device)
        return self.matrices

    def __deepcopy__(self, memo: Any) -> Projection:
        return dataclasses.replace(self)

    def __reduce__(self) -> tuple:
        return _again, (self.seed, self.numel, self.d, self.matrices is not None)


def _again(seed: int, numel: int, d: int, made: bool) -> Projection:
    projection = Projection(seed, numel, d)
    if made:  # not in the first call, which may be compiled
        projection.on(torch.device("cpu"))
    return projection


class SAIDTuner(SharedTuner, method=SAID):
    lender: SAIDTuner
    theta: nn.Parameter  # [d - number of tensors], of the lender
    lam: nn.Parameter | None  # [tensors]: of the weight, of the bias

    def __init__(self, cfg: SAID, site: Site):
        super().__init__(cfg, site)
        vector = site.kind == "norm"
        self.shape = (site.n_out,) if vector else (site.n_out, site.n_in)
        sizes = {"weight": math.prod(self.shape), "bias": 0 if site.bias is None else site.n_out}
        if sizes["weight"] > LARGEST:
            raise ValueError(f"SAID at {site.name}, which has {sizes['weight']:,} weights; at most 2^26, so exclude it")
        place = f"{site.seed}/{site.name}/{site.rows}"
        self.projections = [Projection(_hashed(f"{place}/{name}"), size) for name, size in sizes.items() if size]
        self.turned, self.shrinks = site.layout == "columns", cfg.compat_grad_scale
        self.theta = site.param(0)
        self.lam = site.param(len(self.projections), init="ones") if cfg.structure_aware else None

    def project(self, d: int) -> None:
        """Makes the projections of d numbers."""
        for p in self.projections:
            p.d = min(d, padded(p.numel))
            if not self.theta.is_meta:
                p.on(self.theta.device)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._tuned(weight, bias, self.lender.theta, self.lam)

    def _tuned(self, weight: Tensor, bias: Tensor | None, *given: Any) -> tuple[Tensor, Tensor | None]:
        own = self._moved(0, weight.T if self.turned else weight, *given)  # in the order of the module's own memory
        return own.T if self.turned else own, None if bias is None else self._moved(1, bias, *given)

    def _moved(self, i: int, base: Tensor, theta: Tensor, lam: Tensor | None) -> Tensor:
        """base + lam P(theta) of the weight (0) or the bias (1)."""
        p = self.projections[i]
        sign, pi_mod, g = p.on(base.device)
        theta = theta[: p.d].to(base.device)
        if self.shrinks:
            constant = theta.detach()
            theta = constant + (theta - constant) / len(g)  # zeros, with the gradient
        scale = p.norm if lam is None else p.norm * lam[i].to(base.device)
        return ops.fastfood(theta, sign, pi_mod, g, p.numel, scale, base=base)

    def forward(self, base: Base, *args: Any) -> Any:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or len(self.shape) < 2 or not torch.is_grad_enabled():
            return super().forward(base, *args)

        def run(weight: Tensor, bias: Tensor | None, theta: Tensor, lam: Tensor | None, *args: Any) -> Any:
            return site.apply(*self._tuned(weight, bias, theta, lam), *args)

        site = base.site  # a base may hold outputs
        # The tuned weight is made again in backward: nothing of its size is held until then.
        given = *base.effective(), self.lender.theta, self.lam
        return checkpoint(run, *given, *args, use_reentrant=False, preserve_rng_state=False)

    def changes(self) -> Changes:
        weight, *bias = [p.numel for p in self.projections]
        return Changes(weight, sum(bias), min(self.shape) if len(self.shape) > 1 else 0)


def _hashed(place: str) -> int:
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little")
