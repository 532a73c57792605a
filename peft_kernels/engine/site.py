"""Where a tuner sits: `Site` knows the module's layout, `Base` is the frozen callable that a tuner sees below it."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import types
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .method import Tuner, as_matrix, promoted
from .packed import Packed, stand_in, unpacked
from .rows import Key, routing
from .taps import forget, renote, seen


def matches(path: str, pattern: str) -> bool:
    """A glob against a module path or the end of one: "query", "layer.1.*", "*.attention.*"."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, "*." + pattern)


class Rows(NamedTuple):
    """Some output rows of a fused linear: start to stop inside each of `groups` equal groups of its rows."""

    start: int
    stop: int
    groups: int = 1

    def of(self, t: Tensor, dim: int = 0) -> Tensor:
        """These rows of `t` along `dim`; of one group, a view."""
        if self.groups == 1:
            return t.narrow(dim, self.start, self.stop - self.start)
        dim %= t.dim()
        inner = t.unflatten(dim, (self.groups, -1)).narrow(dim + 1, self.start, self.stop - self.start)
        return inner.flatten(dim, dim + 1)


class Site:
    """A module, some output rows of a fused linear, or the span between two linears, that one tuner tunes.

    name: path of the module in the model.   role: the role it was picked by, or "".
    rows: the output features of a part of a fused linear, None for the whole module.
    entry: the linear where a span begins that ends in `module`, or None.
    norm: the LayerNorm of the sublayer that the module belongs to, or None.   prenorm: True: the norm's input is the
    residual and its output enters the sublayer; False: the norm comes after the addition; None: unknown.
    residual: the module whose input is what the model adds to the sublayer's output, or None.
    causal: whether a position sees no later ones, in the block that the module is in or, outside of blocks, in the last
    one; None: unknown.   padding: the module whose attention_mask tells padding here, or None: it does not matter.
    heads: of an attention's output linear the key-value heads; each is as many of its input features. None elsewhere.
    kind: "linear" (also transformers' Conv1D), "conv", "embedding", "norm", "span" or "module".
    filled: the tuner's numbers are to come from a file, so what else it would begin with need not exist.
    """

    entry: nn.Module | None = None
    norm: nn.Module | None = None
    prenorm: bool | None = None
    residual: nn.Module | None = None
    causal: bool | None = None
    padding: nn.Module | None = None
    heads: int | None = None
    filled: bool = False

    def __init__(self, name: str, module: nn.Module, role: str = "", rows: Rows | None = None, seed: int = 0):
        self.name, self.module, self.role, self.rows, self.seed = name, module, role, rows, seed
        self.layout = _layout(module)
        self._kind = _kind(module)
        self.plain = _plain(module)  # its function is the one its class is known for, so weights alone describe it
        self.lifted: Callable | None = None  # an instance `forward` found at attach: it is the innermost callable then
        self._drawn = 0

    def __repr__(self) -> str:
        rows = f"[{self.rows.start}:{self.rows.stop} of {self.rows.groups}]" if self.rows else ""
        return f"Site({self.name}{rows}, {self.kind})"

    def key(self, what: str) -> str:
        """Names an input that a tuner here sees: "entry" of its span, "residual" of its sublayer."""
        return f"{what} of {self.name}"

    @property
    def address(self) -> str:
        """The target that picks this site alone, "role@path"; without a role "@path"."""
        return f"{self.role}@{self.name}"

    def matches(self, patterns: tuple[str, ...]) -> bool:
        """Whether a role, glob or address among `patterns` names this site."""
        return any(p in (self.role, self.address, f"@{self.name}") or matches(self.name, p) for p in patterns)

    @property
    def kind(self) -> str:
        return self._kind if self.entry is None else "span"

    # -- the module's own weights, as [out, in] ---------------------------------------------------------------------
    # A convolution's in is channels x kernel; an embedding is a linear layer on one-hot rows: [width, vocabulary].

    @property
    def weight(self) -> Tensor:
        return self._rows(as_matrix(self._weight, self.layout))

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else self._rows(bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight; of a packed one, that in which it is read."""
        return self.module.dtype if isinstance(self.module, Packed) else self._weight.dtype

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self.module.weight).device

    @property
    def n_out(self) -> int:
        """Features of the output; of a module, those of its last linear."""
        if self.kind == "module":
            return self._linears()[-1].n_out
        if not isinstance(self.module, Packed):
            return self.weight.shape[0]
        return self.module.out_features if self.rows is None else self.rows.groups * (self.rows.stop - self.rows.start)

    @property
    def n_in(self) -> int:
        """Features of the input; of a span or module, those of its first linear."""
        if self.kind in ("module", "span"):
            return self._linears()[0].n_in
        return self.module.in_features if isinstance(self.module, Packed) else self.weight.shape[-1]

    def _linears(self) -> list[Site]:
        if self.entry is not None:
            return [Site(self.name, self.entry), Site(self.name, self.module)]
        inside = [Site(f"{self.name}.{path}", m) for path, m in base_modules(self.module) if _kind(m) == "linear"]
        if not inside:
            raise ValueError(f"{self.name}: {type(self.module).__name__} has no linear layer; its width is not known")
        return inside

    def read(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(weight [out, in], bias or None) of parameters by name."""
        bias = params.get("bias")
        return self._rows(as_matrix(params["weight"], self.layout)), None if bias is None else self._rows(bias)

    def written(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The inverse of read, for a whole module."""
        params = {"weight": self._stored(weight)}
        return params if bias is None else {**params, "bias": bias}

    @property
    def _weight(self) -> Tensor:
        return self.module.dense() if isinstance(self.module, Packed) else cast(Tensor, self.module.weight)

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight as a packed module would store it, with the gradient of the weight; elsewhere the weight."""
        if not isinstance(self.module, Packed):
            return weight
        return self.module.rounded(weight) + (weight - weight.detach())  # zeros, with the gradient

    def _rows(self, t: Tensor) -> Tensor:
        return t if self.rows is None else self.rows.of(t)

    def _stored(self, weight: Tensor) -> Tensor:
        """The inverse of as_matrix, for any number of output features."""
        if self.layout == "kernel":
            return weight.unflatten(1, self._weight.shape[1:])
        return as_matrix(weight, self.layout)

    # -- calls ------------------------------------------------------------------------------------------------------

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen module itself."""
        if self.module._forward_pre_hooks:
            renote(self.module, args, kwargs)
        if self.lifted is not None:
            return self.lifted(*args, **kwargs)
        return base_class(self.module).forward(self.module, *args, **kwargs)

    def apply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The module's function of x with other weights, of any number of output features."""
        module = self.module
        dtype = x.dtype if isinstance(module, Packed) else self.dtype  # packed weights take any
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if not self.plain:
            raise TypeError(
                f"{self.name}: {type(module).__name__} has no functional form; the tuner must write forward"
            )
        if self._kind == "linear":
            return F.linear(x, weight, bias)
        if isinstance(module, _CONVOLUTIONS):
            return module._conv_forward(x, self._stored(weight), bias)
        if isinstance(module, nn.Embedding):
            y = F.embedding(x, weight.T, module.padding_idx)
            scale = getattr(module, "embed_scale", None)
            return y if scale is None else y * scale
        assert isinstance(module, nn.LayerNorm)  # the last of the plain classes
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)

    def channels(self, y: Tensor) -> int:
        """The dimension of the output y that holds the features."""
        return y.dim() - self._weight.dim() + 1 if self.layout == "kernel" else y.dim() - 1

    # -- what a tuner asks for --------------------------------------------------------------------------------------

    def param(self, *shape: int, init: str | Callable[[Tensor, torch.Generator], Any] = "zeros") -> nn.Parameter:
        """A new trainable tensor on the site's device, in fp32 or wider.

        init: "zeros", "ones", "kaiming" (uniform, bound 1/sqrt(shape[-1])), or a function (tensor, generator) that
        fills it. Values depend on the attach seed, the site and the order of the calls alone, not on the device.
        """
        reference = next(self.module.parameters())
        device = _device(self, reference)
        dtype = promoted(self.dtype if isinstance(self.module, Packed) else reference.dtype)
        if device.type == "meta":
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        value = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32))
        place = f"{self.seed}/{self.name}/{self.rows}/{self._drawn}"
        self._drawn += 1
        generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
        if init == "zeros":
            value.zero_()
        elif init == "ones":
            value.fill_(1.0)
        elif init == "kaiming":
            bound = 1 / math.sqrt(max(shape[-1], 1))
            value.uniform_(-bound, bound, generator=generator)
        elif callable(init):
            init(value, generator)
        else:
            raise ValueError(f"init {init!r}; expected zeros, ones, kaiming or a function")
        return nn.Parameter(value.to(device, dtype))

    def replicate(self) -> nn.Module:
        """A trainable deep copy of the module (ties inside it stay ties), in its own dtype, packed weights dense.

        ValueError where the copy would hold a tuner or a forward that belongs to the module.
        """
        name, adapters = self.name or "the model", adapters_of(self.module)
        inside = [path for path, m in base_modules(self.module) if path and adapters_of(m) is not None]
        if inside:
            raise ValueError(f"{name} has a tuner at {inside[0]} in it, which a copy would hide; detach that first")
        if any("forward" in vars(m) for m in self.module.modules()):
            raise ValueError(f"{name} has an instance forward (an accelerate hook?); remove it first")
        replica = copy.deepcopy(self.module, {} if adapters is None else {id(adapters): None})
        if adapters is not None:
            del replica._modules["peft"]
            replica.__class__ = base_class(self.module)
        for hooks in (replica._forward_hooks, replica._forward_pre_hooks, replica._backward_hooks):
            hooks.clear()  # they run on the module itself, around the replica
        for inner in replica.modules():
            if isinstance(inner, Packed):
                unpack(inner, inner.dtype)
        for p in replica.parameters():
            p.requires_grad_(p.is_floating_point())
        return replica


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _layout(module: nn.Module) -> str:
    """How the module keeps its weight: "rows" [out, in], "columns" [in, out] or "kernel" [out, in, ...]."""
    if isinstance(module, _CONVOLUTIONS):
        return "kernel"
    columns = isinstance(module, nn.Embedding) or (_kind(module) == "linear" and not isinstance(module, nn.Linear))
    return "columns" if columns else "rows"


def _plain(module: nn.Module) -> bool:
    cls: Any = base_class(module) if adapters_of(module) is not None else type(module)
    if isinstance(module, Packed):
        return True
    if isinstance(module, nn.Embedding):  # transformers' scaled ones multiply the rows afterwards
        return module.max_norm is None and (cls.forward is nn.Embedding.forward or hasattr(module, "embed_scale"))
    # transformers' Conv1D and FalconLinear have a forward of their own that is F.linear.
    if _kind(module) == "linear" and not isinstance(module, nn.Linear) or type(module).__name__ == "FalconLinear":
        return True
    return cls.forward in [known.forward for known in (nn.Linear, nn.LayerNorm, *_CONVOLUTIONS)]


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Linear) or (name == "Conv1D" and hasattr(module, "nf")):
        return "linear"
    if isinstance(module, _CONVOLUTIONS):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if name.endswith(("LayerNorm", "RMSNorm")) else "module"


def _device(site: Site, weight: Tensor) -> torch.device:
    """Where the site's tuner lives: beside the weight, or where an offloaded weight is executed."""
    if weight.device.type != "meta":
        return weight.device
    hook = getattr(site.module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    return weight.device


class Base:
    """The callable below a tuner: the frozen module, or the tuners attached before it on top of that."""

    def __init__(self, site: Site, below: Base | None = None, tuner: Tuner | None = None):
        self.site, self.below, self.tuner = site, below, tuner
        # W may be used directly: nothing sits between this tuner and a dense linear.
        whole = site.kind == "linear" and site.plain and site.rows is None
        alone = tuner is None and whole and site.lifted is None
        self.packed = site.module if alone and isinstance(site.module, Packed) else None  # the same with a packed one
        self.innermost = alone and self.packed is None
        # The output belongs to the caller, who may write into it.
        self.fresh = alone if tuner is None else tuner.fresh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.tuner is None:
            return self.site.call(*args, **kwargs)
        return self.tuner(self.below, *args, **kwargs)

    def seen(self, what: str) -> Any:
        """In this call: "residual", what the model adds to the sublayer's output; "entry", the input of the span; what
        Tuner.sources names."""
        return seen(self.site.key(what)) if self.below is None else self.below.seen(what)

    def beside(self, module: nn.Module, *args: Any) -> Any:
        """module(*args), of another module of the model: its own tuners see the rows of this call and their route."""
        return module(*args) if self.below is None else self.below.beside(module, *args)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of everything below, as if it were merged."""
        if self.tuner is None or self.below is None:
            return self.site.weight, self.site.bias
        return self.tuner.folded_over(self.below)


class Adapters(nn.Module):
    """`module.peft`: the tuners at one module by adapter name, bottom of the stack first, and the active chain."""

    site: Site
    chain: Base  # the active tuners on top of each other
    many: Base | Many  # each batch row with its own tuner
    key: Key  # of the model, for routes
    seen: tuple[str, ...]  # inputs noted for the tuners here, dropped after the call

    def __init__(self, site: Site):
        super().__init__()
        # Past nn.Module's attribute rules, or an adapter could not be called "site" or "chain".
        vars(self).update(site=site, chain=Base(site), many=Base(site), key=Key(), seen=())

    @property
    def module(self) -> nn.Module:
        return self.site.module

    # Tuners live in _modules without add_module: an adapter may be called "train" or "half" like an attribute.

    @property
    def tuners(self) -> dict[str, Tuner]:
        return cast(dict[str, Tuner], self._modules)

    def activate(self, names: list[str], numbers: dict[str, int]) -> None:
        """Rebuilds the chain from the named tuners, in attach order, and `many` from all by their adapter's number."""
        chain: Base = Base(self.site)
        for name, tuner in self.tuners.items():
            if name in names:
                chain = Base(self.site, chain, tuner)
        many: Base | Many = Base(self.site)
        classes = dict.fromkeys(type(tuner) for tuner in self.tuners.values())
        for cls in classes:
            many = Many(many, cls, {numbers[n]: t for n, t in self.tuners.items() if type(t) is cls}, self)
        seen = tuple(key for tuner in self.tuners.values() for key in tuner.taps)
        vars(self).update(chain=chain, many=many, seen=seen)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module with its tuners: what the swapped class's forward calls."""
        chain = self.chain if routing(self.key) is None else self.many
        if not self.seen:
            return chain(*args, **kwargs)
        try:
            return chain(*args, **kwargs)
        finally:  # a recomputation ends with an exception as soon as it has what backward needs
            forget(self.seen)


class Many:
    """The callable of a routed module: the tuners of one class on their rows, the callable below on the others."""

    innermost = False
    packed = None
    fresh = False

    def __init__(self, below: Base | Many, cls: type[Tuner], tuners: dict[int, Tuner], adapters: Adapters):
        self.site: Site = below.site
        self.below, self.cls, self.tuners, self.adapters = below, cls, tuners, adapters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route = routing(self.adapters.key)
        assert route is not None
        return self.cls.forward_many(self.below, self.tuners, route, *args, **kwargs)

    def seen(self, what: str) -> Tensor:
        return self.below.seen(what)


def _members(self: nn.Sequential) -> list[nn.Module]:
    return [m for m in self._modules.values() if m is not None and not isinstance(m, Adapters)]


# A Sequential takes all its children for steps of its own: ours is none.
_SEQUENTIAL: dict[str, Any] = {
    "__iter__": lambda self: iter(_members(self)),
    "__len__": lambda self: len(_members(self)),
    "__getitem__": lambda self, i: nn.Sequential(*_members(self)[i]) if isinstance(i, slice) else _members(self)[i],
}

_adapted: dict[type, type] = {}


def adapted(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass a module with tuners gets: the same name, signature, parameters and pickling as `cls`."""
    if cls in _adapted:
        return _adapted[cls]

    named = [p.name for p in inspect.signature(cls.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    first = named[1] if len(named) > 1 else None  # after self

    @functools.wraps(cls.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:  # tuners take the input by position
            args = (kwargs.pop(first),)
        return self.peft.run(*args, **kwargs)

    def __reduce_ex__(self, protocol):  # noqa: N807
        return _rebuild, (cls,), self.__dict__

    names = ("__module__", "__qualname__", "__doc__")
    namespace = {**{n: getattr(cls, n) for n in names}, "forward": forward, "__reduce_ex__": __reduce_ex__}
    if issubclass(cls, nn.Sequential):
        namespace |= _SEQUENTIAL
    _adapted[cls] = types.new_class(cls.__name__, (cls,), exec_body=lambda ns: ns.update(namespace, base_class=cls))
    return _adapted[cls]


def base_class(module: nn.Module) -> Any:
    """The class that an adapted module had before."""
    return type(module).base_class  # type: ignore[attr-defined]


class Unpacked(NamedTuple):
    """What a packed linear was before `unpack`."""

    cls: type[Packed]
    parameters: dict[str, Any]
    buffers: dict[str, Any]

    def restore(self, module: nn.Module) -> None:
        _become(module, self.cls)
        module._parameters.update(self.parameters)
        module._buffers.update(self.buffers)


def unpack(module: Packed, dtype: torch.dtype) -> Unpacked:
    """Turns a packed linear into a dense one of `dtype`, in place; what is returned undoes it."""
    cls = type(module) if adapters_of(module) is None else base_class(module)
    before = Unpacked(cls, dict(module._parameters), dict(module._buffers))
    values = {
        "weight": module.dense(dtype),
        "bias": None if module.bias is None else module.bias.detach().to(dtype, copy=True),
    }
    for name, value in values.items():
        module._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=False)
    module._buffers.clear()
    _become(module, nn.Linear)
    return before


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls if adapters_of(module) is None else adapted(cls)


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    swapped = adapted(cls)
    return swapped.__new__(swapped)


def adapters_of(module: nn.Module) -> Adapters | None:
    """`module.peft`, or None where nothing is attached."""
    found = module._modules.get("peft")
    return found if isinstance(found, Adapters) else None


def is_adapted(module: nn.Module) -> bool:
    """Whether the module's class is ours, with no other laid over it."""
    return "base_class" in type(module).__dict__ and adapters_of(module) is not None


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base model: tuners are left out, shared modules come once, by their first path."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen or isinstance(module, Adapters):
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, prefix)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(path, parameter) of the base model; a tied parameter comes once."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield f"{path}.{name}" if path else name, p


def base_numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """base_parameters, a packed weight as the one that it stands for (on the meta device)."""
    modules = dict(base_modules(model))
    for path, p in base_parameters(model):
        place, _, name = path.rpartition(".")
        yield path, stand_in(modules[place], name, p)


def base_values(module: nn.Module) -> dict[str, Tensor]:
    """Floating parameters and buffers of the base in `module`, by path; packed weights dense, in fp32 or wider."""
    return {
        f"{path}.{name}" if path else name: t for path, inner in base_modules(module) for name, t in unpacked(inner)
    }
