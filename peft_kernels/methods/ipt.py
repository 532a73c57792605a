"""IPT: a prompt that a frozen decoder makes of k trained numbers. The decoder is that of an autoencoder of prompts.

P = W1 tanh(W0 z + b0) + b1                                  z [k], W0 [m, k], W1 [l d, m], P [l d]
stage 1    z = W P_i + b of the prompts P_i of several tasks, in turn; loss of task i + c mean((P - P_i)^2)
stage 2    W0, b0, W1 and b1 stay as they are, and z is trained
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..engine.attach import attach, detach, is_attached, tuners
from ..engine.batches import length
from ..engine.fit import fit
from ..engine.site import Site
from ..engine.store import CONFIG, read_config, read_weights, write
from ._phm import normal
from ._prompt import Prompt, PromptTuner
from ._saved import saved_prompt

_TINY = {"length": 3, "k": 4, "inner": 5}
_DECODER = "decoder"  # in the configuration beside a decoder's tensors


@dataclass(frozen=True)
class IPT(Prompt, roles=("backbone",), lr=1e-2, tiny=_TINY, kinds=("module",), family="additive"):
    """A prompt in a subspace that other tasks' prompts span. Qin et al. 2021, arXiv:2110.07867.

    `pk.IPT.autoencode` finds the subspace; the decoder is a part of the saved adapter, which needs no other file, and
    is the larger part by far. Without a decoder a random one is drawn from the seed of attach, and not saved: the
    subspace is random then, a baseline for what the tasks have in common.
    """

    length: int = 100  # rows of the prompt
    k: int = 250  # trained numbers
    inner: int = 768  # m
    decoder: str = ""  # the directory that autoencode wrote

    def __post_init__(self):
        super().__post_init__()
        if min(self.length, self.k, self.inner) < 1:
            raise ValueError(
                f"IPT length = {self.length}, k = {self.k}, inner = {self.inner}; expected at least 1 of each"
            )

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Of the decoder's tensors, in a model with embeddings of this width."""
        n = self.length * width
        return {"w0": (self.inner, self.k), "b0": (self.inner,), "w1": (n, self.inner), "b1": (n,)}

    @staticmethod
    def autoencode(
        model: nn.Module,
        tasks: Mapping[str | os.PathLike, Iterable],
        out: str | os.PathLike,
        *,
        k: int = 250,
        inner: int = 768,
        reconstruction: float = 200.0,
        force: bool = False,
        **training: Any,
    ) -> list[dict[str, Any]]:
        """Stage 1: trains the autoencoder on saved prompts, writes its decoder into the directory `out`; the log.

        tasks: directory of an adapter with a prompt, all of one length -> batches of its task, as for `pk.fit`; the
            tasks take turns, batch by batch. The model is the one that all of them run on, with their common head.
        reconstruction: c.   training: arguments of `pk.fit`, as epochs, lr, checkpoint and resume.
        The model is left as it was. FileExistsError if `out` holds something and force is not True; ValueError if the
        model has an adapter or prompts differ in shape.
        """
        if is_attached(model):
            raise ValueError("autoencode needs a model without adapters; pk.detach(model) first")
        if not tasks:
            raise ValueError("tasks is empty; expected directory of a saved prompt -> batches")
        if (Path(out) / CONFIG).exists() and not force:
            raise FileExistsError(f"{out} exists; choose another directory, or force=True to replace it")
        shapes = {place: tuple(saved_prompt(place).shape) for place in tasks}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"prompts differ in shape: {', '.join(f'{p} {s}' for p, s in shapes.items())}")
        (rows, width), *_ = shapes.values()
        method = _Autoencoder(rows, k, inner, sources=tuple(map(str, tasks)), reconstruction=reconstruction)
        attach(model, method)
        try:
            own = [tuner for _, tuner in tuners(model, "default") if isinstance(tuner, _AutoencoderTuner)]
            log = fit(model, _Turns(list(tasks.values()), own), **training)
            values = {name: getattr(own[0], name).detach() for name in method.shapes(width)}
            config = {"format": "peft_kernels", _DECODER: _described(method, width), "sources": list(method.sources)}
            write(model, out, "default", force, lambda _: (values, config))
        finally:
            detach(model)
        return log


def _described(cfg: IPT, width: int) -> dict[str, int]:
    return {"length": cfg.length, "k": cfg.k, "inner": cfg.inner, "width": width}


def _decoder(cfg: IPT, width: int) -> dict[str, Tensor]:
    """The tensors that autoencode wrote; ValueError if they are not for these fields and this model."""
    place = Path(cfg.decoder).expanduser()
    config, digest = read_config(place)
    found, expected = config.get(_DECODER), _described(cfg, width)
    if found is None:
        raise ValueError(f"{place} holds no decoder; give a directory that pk.IPT.autoencode wrote")
    if found != expected:
        raise ValueError(f"the decoder in {place} is for {_text(found)}; IPT here has {_text(expected)}")
    return read_weights(place, digest)


def _text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


class _Coder(PromptTuner):
    """w0, b0, w1 and b1, parameters or buffers."""

    w0: Tensor
    b0: Tensor
    w1: Tensor
    b1: Tensor

    def decoded(self, z: Tensor) -> Tensor:
        """The prompt [length, width] of z [k]."""
        h = torch.tanh(F.linear(z, self.w0, self.b0))
        return F.linear(h, self.w1, self.b1).view(self.length, self.width)


class IPTTuner(_Coder, method=IPT):
    def __init__(self, cfg: IPT, site: Site):
        super().__init__(cfg, site)
        self.z = site.param(cfg.k, init=normal(0.02))
        given = _decoder(cfg, self.width) if cfg.decoder and not site.filled else {}
        for name, shape in cfg.shapes(self.width).items():
            init = "zeros" if cfg.decoder else _within(1 / math.sqrt(cfg.k if name.endswith("0") else cfg.inner))
            value = site.param(*shape, init=init).detach()
            if given:
                value.copy_(given[name])
            self.register_buffer(name, value, persistent=bool(cfg.decoder))

    def prompt(self) -> Tensor:
        return self.decoded(self.z)


def _within(bound: float) -> Any:
    """Uniform in the bound; the same numbers in every dtype."""

    def fill(t: Tensor, generator: Generator) -> None:
        t.copy_(torch.empty(t.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))

    return fill


# -- stage 1 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Autoencoder(IPT):
    lr: ClassVar[float] = 1e-3

    sources: tuple[str, ...] = ()
    reconstruction: float = 200.0


class _AutoencoderTuner(_Coder, method=_Autoencoder):
    w: nn.Parameter
    b: nn.Parameter

    def __init__(self, cfg: _Autoencoder, site: Site):
        super().__init__(cfg, site)
        self.weight = cfg.reconstruction
        n = self.length * self.width
        for name, shape in {"w": (cfg.k, n), "b": (cfg.k,), **cfg.shapes(self.width)}.items():
            fan_in = {"w": n, "b": n, "w0": cfg.k, "b0": cfg.k}.get(name, cfg.inner)
            self.register_parameter(name, site.param(*shape, init=_within(1 / math.sqrt(fan_in))))
        self.given = [saved_prompt(place).flatten().to(self.w) for place in cfg.sources]
        self.task = 0

    def prompt(self) -> Tensor:
        return self.decoded(F.linear(self.given[self.task], self.w, self.b))

    def penalty(self) -> Tensor:
        return self.weight * F.mse_loss(self.prompt().flatten(), self.given[self.task])


class _Turns:
    """The batches of several tasks in turn, each announced to the tuners before it comes."""

    def __init__(self, tasks: list[Iterable], tuners: list[_AutoencoderTuner]):
        self.tasks, self.tuners = tasks, tuners
        self.lengths = [length(batches) for batches in tasks]

    def __len__(self) -> int:
        return sum(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        for batches in self.tasks:
            if hasattr(batches, "set_epoch"):
                batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return self._turns([iter(batches) for batches in self.tasks])

    def _turns(self, iterators: list[Iterator]) -> Iterator[Any]:
        for turn in range(max(self.lengths)):
            for task, iterator in enumerate(iterators):
                if turn < self.lengths[task]:
                    batch = next(iterator)
                    for tuner in self.tuners:
                        tuner.task = task
                    yield batch
