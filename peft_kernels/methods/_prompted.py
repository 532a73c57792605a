"""What a model needs beside its prompt (_prompt.py): decoders that see its rows, and places where it enters."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..engine.method import Method, Tuner
from ..engine.roles import roles_of
from ..engine.rows import Routing
from ..engine.site import Base, Site, adapters_of, base_modules
from ..engine.taps import noted
from ._sequence import filled, remembered

STATES = "encoder_hidden_states"
_TABLES = ("position_embeddings", "wpe", "embed_positions")


class Filled:
    """A callable whose output gets zeros in front, as many as the longest prompt has rows more."""

    innermost = False
    packed = None
    fresh = False

    def __init__(self, inner: Any, longest: int):
        self.inner, self.longest, self.site = inner, longest, getattr(inner, "site", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {k: v for k, v in kwargs.items() if k in ("input_ids", "inputs_embeds") and v is not None}
        tokens = next(iter(named.values()), None)
        if tokens is None:
            tokens = next(a for a in args if isinstance(a, Tensor))
        return filled(self.inner(*args, **kwargs), tokens.shape[1] + self.longest)

    def seen(self, what: str) -> Tensor:
        return self.inner.seen(what)


def kept(module: nn.Module) -> int:
    """Rows of the longest prompt at a module whose output has them; 0 without."""
    adapters = adapters_of(module)
    tops: list[Any] = [] if adapters is None else list(adapters.tuners.values())
    inside = ([t.length for t in top.modules() if getattr(t, "keep", False)] for top in tops)
    return max(map(sum, inside), default=0)


def takes_embeddings(site: Site) -> bool:
    """Whether a module may be called with embeddings in place of tokens; ValueError if it makes none either."""
    if "inputs_embeds" in inspect.signature(site.module.forward).parameters:
        return True
    if "embeddings" not in site.module._modules:
        raise ValueError(f"{site.name or 'the model'} takes no embeddings and makes none; target the role backbone")
    return False


def width_of(site: Site) -> int:
    """Features of the embeddings that a module takes or makes."""
    module: Any = site.module
    return getattr(module.get_input_embeddings(), "embedding_dim", None) or module.config.hidden_size


def first_position(module: nn.Module) -> int:
    """The number of the first position: 0, or what RoBERTa's family begins with."""
    return getattr(getattr(module, "embeddings", None), "padding_idx", -1) + 1


def check_positions(site: Site, l: int, n: int) -> None:
    """ValueError if a table of positions is too short for l rows of a prompt and n tokens."""
    for path, m in base_modules(site.module):
        if path.rpartition(".")[2] in _TABLES and isinstance(m, nn.Embedding):
            most = m.num_embeddings - getattr(m, "offset", 0) - first_position(site.module)
            if l + n > most:
                raise ValueError(
                    f"{site} has {most} positions, too few for {n} tokens behind a prompt of {l}; shorten one of them"
                )


def crosses(module: nn.Module) -> bool:
    """Whether there is attention to another module's output in it."""
    config = getattr(module, "config", None)
    return any("cross.attn" in roles_of(config, path) for path, _ in base_modules(module))


def embeddings_of(site: Site) -> Site:
    """Where a prompt enters a model of images."""
    name = f"{site.name}.embeddings".lstrip(".")
    return Site(name, cast(nn.Module, site.module.embeddings), Appended.key, seed=site.seed)


# -- the parameterless parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory(Method):
    """At a decoder: it sees the rows of a prompt in the encoder's output."""

    key: ClassVar[str] = "memory"


class MemoryTuner(Tuner, method=Memory):
    prompt: Any  # the encoder's tuner

    def __init__(self, cfg: Method, site: Site):
        super().__init__(cfg, site)
        self.names = tuple(inspect.signature(site.module.forward).parameters)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base(**self.widened(args, kwargs))

    def widened(self, args: tuple, kwargs: dict[str, Any], lengths: Tensor | None = None) -> dict[str, Any]:
        """A call by name whose mask has the prompts' rows. lengths [batch]: of each row's; None: all that there are."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states, mask = given.get(STATES), given.get("encoder_attention_mask")
        if states is None or (mask is None and lengths is None):
            return given
        if mask is None:
            mask = states.new_ones(len(states), states.shape[1] - kept(self.prompt.module), dtype=torch.int64)
        more = states.shape[1] - mask.shape[-1]
        return {**given, "encoder_attention_mask": remembered(mask, more, lengths)}

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Tuner], route: Routing, *args: Any, **kwargs: Any) -> Any:
        own = cast("dict[int, MemoryTuner]", tuners)
        lengths = torch.zeros(max(max(route.numbers), *own) + 2, dtype=torch.int64)
        for number, tuner in own.items():
            lengths[number + 1] = tuner.prompt.length
        one = next(iter(own.values()))
        states = {**dict(zip(one.names, args, strict=False)), **kwargs}.get(STATES)
        rows = None if states is None else lengths.to(states.device)[route.expanded(len(states)) + 1]
        return base(**one.widened(args, kwargs, rows))


@dataclass(frozen=True)
class Appended(Method):
    """At the embeddings of a model of images: a prompt that is noted comes behind what they make."""

    key: ClassVar[str] = "appended"


class AppendedTuner(Tuner, method=Appended):
    mark: str

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return self.appended(base(*args, **kwargs))

    def appended(self, x: Tensor) -> Tensor:
        """x [batch, n, width] and what is noted of P."""
        p = noted(self.mark)
        return x if p is None else torch.cat([x, p.to(x).expand(len(x), *p.shape[-2:])], dim=1)

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Tuner], route: Routing, *args: Any, **kwargs: Any) -> Any:
        x = base(*args, **kwargs)
        for tuner in tuners.values():
            x = cast(AppendedTuner, tuner).appended(x)
        return x
