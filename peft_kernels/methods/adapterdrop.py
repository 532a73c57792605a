"""AdapterDrop: Pfeiffer's adapters without those of the lowest layers.

Dropped before training, nothing is trained below layer `drop`, and backward ends there. With random=True every layer
has an adapter and each training step goes without those of the n lowest layers, n drawn from 0 to `drop`: what is
learned stands any such number of layers less, which `AdapterDrop.deploy` then takes away.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine.attach import Adapter, active, attach_parts, detach, names_of, rename, set_active, state_of, tuners
from ..engine.method import Tuner
from ..engine.roles import layer_of
from ..engine.site import Base, Site
from ..engine.store import fill, tensors
from ._kept import Kept
from ._shared import SharedTuner, share
from .pfeiffer import Pfeiffer, PfeifferTuner


@dataclass(frozen=True)
class AdapterDrop(
    Pfeiffer, roles=("down",), lr=1e-3, tiny={"reduction_factor": 2, "drop": 1}, family="additive", kernel="bottleneck"
):
    """Pfeiffer's adapters, none in the lowest layers, those of a decoder too. Rücklé et al. 2021, arXiv:2010.11918.

    With random=True all layers have one, and a number of the lowest that is drawn anew for each step of `pk.fit` or
    transformers' Trainer does without; evaluation runs all. The draws follow from the seed of attach. Not mergeable.
    """

    drop: int = 5  # layers
    random: bool = False  # draw how many are dropped, from 0 to `drop`, at each training step

    def __post_init__(self):
        super().__post_init__()
        if self.drop < 0:
            raise ValueError(f"AdapterDrop drop = {self.drop}; expected at least 0")

    def select(self, sites: list[Site]) -> list[Site]:
        sites = super().select(sites)
        if lost := [site.name for site in sites if layer_of(site.name) is None]:
            raise ValueError(f"AdapterDrop at {lost[0]}, which is in no layer; choose other targets")
        above = [site for site in sites if cast(int, layer_of(site.name)) >= self.drop]
        if sites and not above:
            deepest = max(cast(int, layer_of(site.name)) for site in sites)
            raise ValueError(f"AdapterDrop drop = {self.drop} leaves no adapter; expected at most {deepest}")
        return sites if self.random else above

    def attached(self, tuners: list[Tuner]) -> None:
        if self.random:
            share(cast("list[SharedTuner]", tuners), "state")
            self.step(tuners, 0.0)

    def step(self, tuners: list[Tuner], progress: float) -> None:
        if self.random and tuners:
            cast(AdapterDropTuner, tuners[0]).lender.draw()

    @staticmethod
    def deploy(model: nn.Module, drop: int, name: str = "default") -> nn.Module:
        """Takes the adapters of the lowest `drop` layers away for good, and returns the model.

        The adapter is then AdapterDrop(drop=drop), the last in the stack; what `pk.save` writes holds no more.
        ValueError if `name` is no AdapterDrop, or has dropped more already.
        """
        part, *others = state_of(model).adapters[names_of(model, name)[0]].parts
        method, running = part.method, active(model)
        if not isinstance(method, AdapterDrop):
            raise ValueError(f"adapter {name!r} is {type(method).__name__}; expected AdapterDrop")
        if not method.random and drop < method.drop:
            raise ValueError(f"adapter {name!r} has none in the lowest {method.drop} layers; give drop at least that")
        seed, values = state_of(model).adapters[name].seed, tensors(model, name)
        trainable = any(p.requires_grad for _, t in tuners(model, name) for p in t.parameters())
        smaller = replace(part, method=replace(method, drop=drop, random=False))
        attach_parts(model, f"{name}-less", Adapter([smaller, *others], seed))
        fill(model, f"{name}-less", {key: values[key] for key in tensors(model, f"{name}-less")}, None)
        for _, tuner in tuners(model, f"{name}-less"):
            tuner.requires_grad_(trainable)
        detach(model, name)
        rename(model, f"{name}-less", name)
        return set_active(model, running)


class AdapterDropTuner(PfeifferTuner, SharedTuner, method=AdapterDrop):
    lender: AdapterDropTuner
    state: Tensor  # int64 [2]: how many draws there were, how many layers are dropped now

    def __init__(self, cfg: AdapterDrop, site: Site):
        super().__init__(cfg, site)
        self.random, self.most, self.seed, self.layer = cfg.random, cfg.drop, site.seed, cast(int, layer_of(site.name))
        self.fresh = not cfg.random  # otherwise the layer's output may come back as it is
        if cfg.random:
            self.register_buffer("state", torch.zeros(2, dtype=torch.int64, device=self.adapter.up_bias.device))
            self._kept = Kept()

    def draw(self) -> None:
        """The number of dropped layers of the next step. It depends on the seed and the number of draws alone."""
        if self.state.is_meta:
            return
        number = int(self.state[0]) + 1
        dropped = random.Random(f"{self.seed}/{number}").randint(0, self.most)
        self.state.copy_(torch.tensor([number, dropped]))

    def forward(self, base: Base, x: Tensor, **how: Any) -> Tensor:
        if not (self.random and self.training):
            return super().forward(base, x, **how)
        state = self.lender.state
        if torch.compiler.is_compiling():  # one graph for every number: the adapter runs, times 0 or 1
            return super().forward(base, x, scale=(state[1] <= self.layer).to(x.device, torch.float32), **how)
        dropped = self.lender._kept.once("dropped", lambda: int(state[1]), [state])
        return base(x) if self.layer < dropped else super().forward(base, x, **how)
