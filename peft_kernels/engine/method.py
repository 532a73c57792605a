"""What a method writes: a `Method` (the user's call, the saved JSON, the documentation) and its `Tuner`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .rows import Routing, by_rows

if TYPE_CHECKING:
    from .site import Base, Site

FAMILIES = ("additive", "selective", "reparametrised", "hybrid")  # Lialin et al. 2023, arXiv:2303.15647

_registry: dict[str, type[Method]] = {}


def methods() -> dict[str, type[Method]]:
    """Registry key -> method class, by the alphabet."""
    return dict(sorted(_registry.items()))


def method_of(key: str) -> type[Method]:
    """The method class of a registry key; ValueError lists the known ones."""
    if key not in _registry:
        raise ValueError(f"unknown method {key!r}; expected one of {', '.join(_registry)}")
    return _registry[key]


@dataclass(frozen=True)
class Phase:
    """A stretch of a training, of `steps` optimizer steps, with an optimizer and a learning-rate schedule of its own.

    lr: None is the rate that `pk.fit` was given, or the method's own.
    """

    name: str
    steps: int
    lr: float | None = None


@dataclass(frozen=True)
class Stats:
    """What `pk.calibrate` measured of the tensors that a tuner watches, in fp32 and in their shapes.

    samples: rows seen.   grad: name -> g, the mean of the gradient over the rows.
    curved: where `Method.curvature` asks, name -> H g, H the Hessian of the mean loss in all that the method watches.
    """

    samples: int
    grad: dict[str, Tensor]
    curved: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Method:
    """A parameter-efficient method: a frozen dataclass whose fields are its hyper-parameters.

    Subclass keywords: `roles` (default targets), `lr` (a sensible learning rate), `tiny` (fields for tests on small
    models), `family` (one of FAMILIES), `kernel` (the folders of csrc whose ops it runs on, as words; none: plain
    torch), `key` (registry key; default the class name in lower case), `kinds` (of sites it can tune; None: any).
    Without `roles` the class is an abstract one and not registered.
    """

    key: ClassVar[str]
    family: ClassVar[str]
    kernel: ClassVar[tuple[str, ...]]
    roles: ClassVar[tuple[str, ...]]
    lr: ClassVar[float]
    tiny: ClassVar[dict[str, Any]]
    kinds: ClassVar[tuple[str, ...] | None]
    tuner: ClassVar[type[Tuner]]
    identity: ClassVar[bool] = True  # attached and untrained, it leaves the function of the model as it is
    expected: bool = False  # Tuner.observe sees every class, weighted with its probability, and no labels
    samples: int = 0  # rows after which pk.calibrate stops unless it is told how many batches to read; 0: all

    def __init_subclass__(
        cls,
        *,
        roles: tuple[str, ...] | None = None,
        lr: float = math.nan,
        tiny: dict[str, Any] | None = None,
        family: str = "",
        kernel: str = "",
        key: str | None = None,
        kinds: tuple[str, ...] | None = ("linear",),
    ):
        if roles is None or tiny is None:
            return
        if family not in FAMILIES:
            raise ValueError(f"class {cls.__name__} has family = {family!r}; expected one of {', '.join(FAMILIES)}")
        cls.family, cls.kernel = family, tuple(kernel.split())
        cls.key, cls.roles, cls.lr, cls.tiny, cls.kinds = key or cls.__name__.lower(), roles, lr, tiny, kinds
        _registry[cls.key] = cls

    def __post_init__(self) -> None:
        """Checks every field against its annotation; a word or a list where a tuple belongs becomes one."""
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type).split("[")[0]
            if kind == "tuple" and isinstance(value, (str, list)):
                value = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, field.name, value)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            good = {
                "int": number and isinstance(value, int),
                "float": number and math.isfinite(value),
                "bool": isinstance(value, bool),
                "tuple": isinstance(value, tuple),
                "dict": isinstance(value, dict),
            }.get(kind, True)
            if not good:
                raise ValueError(f"{type(self).__name__} {field.name} = {value!r}; expected {field.type}")

    def select(self, sites: list[Site]) -> list[Site]:
        """Of the sites that match the targets, those the method can tune."""
        return [s for s in sites if self.kinds is None or s.kind in self.kinds]

    def at(self, site: Site) -> Method:
        """The method's fields at one site, where patterns override them."""
        return self

    def prepare(self, model: nn.Module, whole: tuple[str, ...]) -> bool:
        """Before it is attached: may change the base once and for all, as by quantising it; whether it did.

        whole: paths of the modules that the same adapter trains whole.
        """
        return False

    def spelled(self, encode: Callable[[str], list[int]], names: Sequence[str]) -> Method:
        """Before a training on texts attaches it: the method with the tokens that its words mean.

        encode: text -> ids without special tokens; encode.mask is the id of [MASK], or None.
        names: of the classes; empty where the task has none.
        """
        return self

    def expand(self, part: Part) -> list[Part]:
        """What attaching this method as `part` comes to; a recipe has several parts."""
        return [part]

    def ejected(self) -> Method:
        """What is left of it once what only training needed is gone, as the network that makes a prefix."""
        return self

    @property
    def curvature(self) -> bool:
        """Whether `pk.calibrate` is to measure Stats.curved, by a second pass over the batches."""
        return False

    def with_ranks(self, ranks: dict[str, int]) -> Method:
        """A low-rank method with these ranks, by Site.address; written where the tuner has `factors`."""
        raise NotImplementedError(f"{self.key} has no rank")

    def solved(self, model: nn.Module, part: Part) -> Method:
        """What `pk.attach` attaches as `part`, and `pk.save` saves: the method with what follows from the model."""
        return self

    def phases(self, total_steps: int) -> list[Phase]:
        """How a training of `total_steps` optimizer steps is divided; the steps of the phases add up to it."""
        return [Phase("train", total_steps)]

    # What decides over several sites, such as the best k of all their numbers, overrides these; a tuner its own ones.
    # `tuners` are those that this method has in one adapter, in model order.

    def attached(self, tuners: list[Tuner]) -> None:
        """The tuners have been made, by attach or to be filled from a file."""

    def enter(self, tuners: list[Tuner], phase: str) -> None:
        """A phase begins: `Tuner.enter` of each."""
        for tuner in tuners:
            tuner.enter(phase)

    def step(self, tuners: list[Tuner], progress: float) -> None:
        """An optimizer step is done: `Tuner.step` of each."""
        for tuner in tuners:
            tuner.step(progress)

    def calibrate(self, measured: list[tuple[Tuner, Stats]], beside: int) -> None:
        """`pk.calibrate` has measured: `Tuner.calibrate` of each.

        beside: how many numbers the modules have that the same adapter trains whole, such as a head.
        """
        for tuner, stats in measured:
            tuner.calibrate(stats)

    def loss(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor | None:
        """A term that training adds to the task loss: a second pass, distillation. It may call the model again.

        batch: as it came from `batches`, on the model's device.   outputs: what the model made of it.
        """
        return None

    def to_json(self) -> dict[str, Any]:
        return {"method": self.key, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Method:
        """The inverse of to_json; ValueError on an unknown method or field."""
        values = dict(data)
        cls = method_of(values.pop("method", ""))
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"{cls.key} has no field {sorted(unknown)}; it has {sorted(known)}")
        return cls(**{name: _rich(value) for name, value in values.items()})


def fields(method: Method | type[Method]) -> tuple[dataclasses.Field, ...]:
    """The hyper-parameters of a method."""
    return dataclasses.fields(method)  # type: ignore[arg-type]  # every subclass is a dataclass


def needed(method: type[Method]) -> list[str]:
    """The fields that have no default."""
    return [f.name for f in fields(method) if f.default is f.default_factory is dataclasses.MISSING]


@dataclasses.dataclass(frozen=True)
class Part:
    """A method with the targets it is attached to; empty targets are the method's own.

    lr: the learning rate of a part of a recipe that has one itself; None: the method's.
    lines: of a part from a recipe file, where each of these fields is written there, for errors.
    """

    method: Method
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    lr: float | None = None
    lines: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def rate(self) -> float:
        return self.method.lr if self.lr is None else self.lr

    @contextmanager
    def located(self) -> Iterator[None]:
        """Within the `with`, a ValueError begins with the place in the recipe file, if there is one."""
        try:
            yield
        except ValueError as error:
            if not self.lines:
                raise
            word = str(error).partition(" ")[0]  # of what resolve says about layers and exclude
            place = self.lines.get(word) or self.lines.get("targets") or self.lines["method"]
            raise ValueError(f"{place}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        return {name: _plain(getattr(self, name)) for name in _PART}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Part:
        """The inverse of to_json; all but the method may be left out. ValueError on an unknown key."""
        if unknown := set(data) - set(_PART):
            raise ValueError(f"a part has no field {sorted(unknown)}; it has {sorted(_PART)}")
        return Part(
            Method.from_json(data["method"]),
            words(data.get("targets", ())),
            words(data.get("exclude", ())),
            numbers(data.get("layers")),
        )


_PART = ("method", "targets", "exclude", "layers")  # of its JSON


def _plain(value: Any) -> Any:
    """A field as JSON: methods inside methods become objects."""
    if isinstance(value, (Method, Part)):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _rich(value: Any) -> Any:
    """The inverse of _plain: the object of a method has its key under "method", that of a part the method's object."""
    if isinstance(value, list):
        return [_rich(item) for item in value]
    if isinstance(value, dict) and "method" in value:
        return Part.from_json(value) if isinstance(value["method"], dict) else Method.from_json(value)
    return value


class NotMergeable(RuntimeError):
    """The method has no weight-space form, so it cannot be merged."""


class Changes(NamedTuple):
    """How many original numbers a merge gives another value, and an upper bound of the rank of that change.

    Where factors replace the weight, the rank is that of their product.
    """

    weight: int = 0
    bias: int = 0
    rank: int = 0

    def over(self, other: Changes) -> Changes:
        """Both at the same place: a number that both change is changed once."""
        return Changes(max(self.weight, other.weight), max(self.bias, other.bias), self.rank + other.rank)

    def beside(self, other: Changes) -> Changes:
        """Both, at different places."""
        return Changes(self.weight + other.weight, self.bias + other.bias, self.rank + other.rank)


def overlaid(changes: Iterable[dict[Any, Changes]]) -> dict[Any, Changes]:
    """The changes of tuners at one module, by rows."""
    out: dict[Any, Changes] = {}
    for blocks in changes:
        for rows, change in blocks.items():
            out[rows] = out.get(rows, Changes()).over(change)
    return out


class Source(NamedTuple):
    """A module whose first input, output or argument (by name; None: not given) a tuner sees as base.seen(what)."""

    what: str
    module: nn.Module
    output: bool = False
    argument: str = ""


class Loan(NamedTuple):
    """An attribute of a module that has another value while a tuner is attached; detach puts the old object back."""

    module: nn.Module
    name: str
    value: Any


class Tuner(nn.Module):
    """The trainable part of a method at one site. Write at least one of `fold` and `forward`.

    fold(weight [out, in], bias [out] or None) -> the same pair, tuned: pure, in plain torch; makes it mergeable.
    forward(base, *args): around-advice on the frozen callable `base`; without it, the site runs with folded weights.
    Where both exist they must agree (the fold law).
    """

    fresh: bool = False  # forward returns a tensor nobody else holds, which a tuner above may write into
    opaque: ClassVar[bool] = False  # forward never calls the modules below: nothing else may tune them
    needs_residual: ClassVar[bool] = False  # forward calls base.seen("residual")
    # forward takes gate=, of shape [B, 1, 1] or, in causal stacks, [B, S, 1], by which it scales its effect itself.
    gated: ClassVar[bool] = False
    part: int | None = None  # which part of its adapter made it; None for a tuner inside or around others
    taps: tuple[str, ...] = ()  # inputs of other modules noted for it
    # fold is linear in the distance of the numbers from those of a new tuner: several tuners' distances may be added.
    additive: ClassVar[bool] = False
    rounds: ClassVar[bool] = False  # on a packed layer it runs with what the format stores of the folded weight
    rates: Mapping[str, float] = {}  # parameter -> a learning rate of its own, whatever that of the method or phase

    def __init_subclass__(cls, *, method: type[Method] | None = None):
        if method is not None:
            method.tuner = cls

    def __init__(self, cfg: Method, site: Site):
        super().__init__()
        self.cfg, self.site_name = cfg, site.name

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotMergeable(f"{self.site_name}: {type(self).__name__} has no weight-space form")

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base.site.apply(*self.folded_over(base), *args, **kwargs)

    def folded_over(self, base: Base) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) with everything below and the tuner folded in."""
        weight, bias = self.fold(*base.effective())
        return base.site.rounded(weight) if self.rounds else weight, bias

    @classmethod
    def forward_many(cls, base: Any, tuners: dict[int, Tuner], route: Routing, *args: Any, **kwargs: Any) -> Any:
        """A routed call: `tuners` of this class by adapter number, each for the rows that `route` gives it.

        base(*args) is the output for all rows of everything below; rows of other numbers keep it. The default runs
        every tuner on its rows; a method with a batched kernel overrides it and reads `route.expanded(rows)`.
        """
        return by_rows(base, tuners, route, args, kwargs)

    def sources(self, site: Site) -> list[Source]:
        """What forward reads by base.seen of modules that run inside its site; asked for once, by attach."""
        return []

    def lends(self, site: Site) -> list[Loan]:
        """Attributes of modules that it needs to have another value; asked for once, by attach."""
        return []

    def ejected(self) -> dict[str, Tensor]:
        """What takes the place of all its parameters and modules once training is over; {}: they stay."""
        return {}

    @property
    def mergeable(self) -> bool:
        return self.folds()

    @classmethod
    def folds(cls) -> bool:
        """Whether there is a weight-space form."""
        return cls.fold is not Tuner.fold or cls.folded is not Tuner.folded

    def folded(self, site: Site, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The site's own parameters by name -> their values with this tuner folded in."""
        return site.written(*self.fold(*site.read(params)))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(a [r, in], b [out, r]) in float64, where fold adds b @ a to the weight; a scale is shared evenly by both."""
        return None

    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Gives the tuner the numbers for which `factors` returns a product equal to b @ a."""
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def changes(self) -> Changes:
        """What a merge changes of the original numbers at the site; by default nothing."""
        return Changes()

    def changes_by_rows(self) -> dict[Any, Changes]:
        """The same by block of output rows of a fused linear; None stands for the whole module."""
        return {None: self.changes()}

    # -- training: what pk.fit and pk.hf.Callback call, all of it optional ------------------------------------------

    def enter(self, phase: str) -> None:
        """A phase of the method begins. May change values, requires_grad and the parameters; called without grad mode.

        A resume enters the phases again and then fills in the saved values, so what a phase decides from values
        belongs into parameters and buffers, whose shapes do not depend on those values.
        """

    def step(self, progress: float) -> None:
        """After each optimizer step, without grad mode; progress in (0, 1] of the training. A resume repeats a call."""

    def penalty(self) -> Tensor | None:
        """A 0-d term that training adds to the loss."""
        return None

    def ready(self) -> str:
        """ "" if training may start, else what must come first."""
        return ""

    def watched(self, site: Site) -> dict[str, Tensor]:
        """Name -> tensor whose gradients `pk.calibrate` collects: a parameter of the base or of the tuner, or a view.

        Where the weight is watched as site.module.weight, site.read(stats.grad) is its gradient as [out, in].
        """
        return {}

    def observe(self, site: Site, x: Tensor, dy: Tensor, samples: Tensor, weight: Tensor | None) -> None:
        """Called for each backward pass of `pk.calibrate`, without grad mode, by a tuner of a linear that overrides it.

        x [tokens, in] is the input of the frozen linear at the site and dy [tokens, out] the gradient of its output,
        in both of which row n of the batch has tokens samples[n] to samples[n + 1] (int64); the loss is the sum over
        rows of each row's own.   weight [n] fp32: how much each row counts; None: 1.
        """

    def calibrate(self, stats: Stats) -> None:
        """Called once at the end of `pk.calibrate`, without grad mode, if anything is watched or observed."""

    # -- files --------------------------------------------------------------------------------------------------------

    def reshape(self, values: dict[str, Tensor]) -> None:
        """Before the tensors of a file, by name in the tuner, are copied into its own: may give these their shapes.

        What has the shape already stays: an optimizer may hold it. ValueError if the values cannot be right.
        """

    def touched(self) -> Tensor | None:
        """Flat positions (int64) of the weight [out, in] outside which fold leaves every bit; None: it may anywhere."""
        return None

    def extra_repr(self) -> str:
        return f"{sum(p.numel() for p in self.parameters(recurse=False)):,} numbers"


class Replica(Tuner):
    """A trainable copy of the whole module at the site: what full tuning and a trained head are."""

    opaque = True
    additive = True

    def __init__(self, cfg: Method, site: Site):
        super().__init__(cfg, site)
        if site.rows is not None:
            raise ValueError(
                f"{site.role} is some rows of {site.name}, and {cfg.key} trains whole modules; "
                f"target that module, as '*.{site.name.rpartition('.')[2]}'"
            )
        if site.entry is not None:
            raise ValueError(
                f"{site.role or 'the span'} ends in {site.name} and is no module there, and {cfg.key} trains whole "
                "modules; target its linears, as ('up', 'down')"
            )
        self.copy = site.replicate()
        self.layout = site.layout

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return self.copy(*args, **kwargs)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = dict(self.copy.named_parameters(recurse=False))
        return as_matrix(own["weight"], self.layout), own.get("bias")

    def folded(self, site: Site, params: dict[str, Tensor]) -> dict[str, Tensor]:
        own = (*self.copy.named_parameters(), *self.copy.named_buffers())
        return {name: t.detach() for name, t in own if name in params and t.is_floating_point()}

    def changes(self) -> Changes:
        own = list(self.copy.parameters())
        return Changes(sum(p.numel() for p in own), 0, sum(largest_rank(p) for p in own))


def largest_rank(p: Tensor) -> int:
    """Of a change of `p` as a matrix [out, in], a convolution's kernel flattened; vectors have none."""
    return min(len(p), p[0].numel()) if p.dim() > 1 and len(p) else 0


def promoted(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a base of `dtype` is tuned: at least fp32."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def as_matrix(weight: Tensor, layout: str) -> Tensor:
    """A weight as its module keeps it -> [out, in]."""
    if layout == "columns":
        return weight.T
    return weight.flatten(1) if layout == "kernel" else weight


def words(value: Any) -> tuple[str, ...]:
    """One word or several -> a tuple of them."""
    return (value,) if isinstance(value, str) else tuple(value)


def numbers(layers: Any) -> tuple[int, ...] | None:
    """A layer number or several -> a tuple of them; None for all layers."""
    chosen = None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    if chosen is not None and not all(isinstance(n, int) for n in chosen):
        raise ValueError(f"layers = {layers!r}; expected layer numbers such as 0, [0, 1] or [-1]")
    return chosen
