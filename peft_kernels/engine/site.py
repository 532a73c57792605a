"""Where a tuner sits: `Site` knows the module's layout, `Base` is the frozen callable that a tuner sees below it."""

from __future__ import annotations

import copy
import functools
import math
import types
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .method import Tuner, promoted


def matches(path: str, pattern: str) -> bool:
    """A glob against a module path or the end of one: "query", "layer.1.*", "*.attention.*"."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, "*." + pattern)


class Site:
    """A module, or some output rows of a fused linear, that one tuner tunes.

    name: path of the module in the model.   role: the role it was picked by, or "".
    rows: (start, stop) of the output features for a part of a fused linear, None for the whole module.
    kind: "linear" (also transformers' Conv1D), "embedding", "norm" or "module".
    """

    def __init__(
        self, name: str, module: nn.Module, role: str = "", rows: tuple[int, int] | None = None, seed: int = 0
    ):
        self.name, self.module, self.role, self.rows, self.seed = name, module, role, rows, seed
        self.kind = _kind(module)
        # transformers' Conv1D keeps [in, out]; everybody above sees [out, in].
        self.transposed = self.kind == "linear" and not isinstance(module, nn.Linear)
        # Its function is the one its class is known for, so weights alone describe it.
        self.plain = self.transposed or _original(module).forward in (nn.Linear.forward, nn.LayerNorm.forward)
        self.lifted: Callable | None = None  # an instance `forward` found at attach: it is the innermost callable then
        self._drawn = 0

    def __repr__(self) -> str:
        rows = f"[{self.rows[0]}:{self.rows[1]}]" if self.rows else ""
        return f"Site({self.name}{rows}, {self.kind})"

    @property
    def address(self) -> str:
        """The target that picks this site alone, "role@path"; without a role "@path"."""
        return f"{self.role}@{self.name}"

    def matches(self, patterns: tuple[str, ...]) -> bool:
        """Whether a role, glob or address among `patterns` names this site."""
        return any(p in (self.role, self.address, f"@{self.name}") or matches(self.name, p) for p in patterns)

    # -- the module's own weights, as [out, in] ---------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        return self._rows(self._oriented(self._weight))

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else self._rows(bias)

    @property
    def n_out(self) -> int:
        return self.weight.shape[0]

    @property
    def n_in(self) -> int:
        return self.weight.shape[-1]

    def read(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(weight [out, in], bias or None) of parameters by name."""
        bias = params.get("bias")
        return self._rows(self._oriented(params["weight"])), None if bias is None else self._rows(bias)

    def written(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The inverse of read, for a whole module."""
        params = {"weight": self._oriented(weight)}
        return params if bias is None else {**params, "bias": bias}

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, self.module.weight)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def _rows(self, t: Tensor) -> Tensor:
        return t if self.rows is None else t[self.rows[0] : self.rows[1]]

    # -- calls ------------------------------------------------------------------------------------------------------

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen module itself."""
        if self.lifted is not None:
            return self.lifted(*args, **kwargs)
        return base_class(self.module).forward(self.module, *args, **kwargs)

    def apply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The module's function of x with other weights."""
        dtype = self._weight.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if self.kind == "linear" and self.plain:
            return F.linear(x, weight, bias)
        if isinstance(self.module, nn.LayerNorm) and self.plain:
            return F.layer_norm(x, self.module.normalized_shape, weight, bias, self.module.eps)
        raise TypeError(
            f"{self.name}: {type(self.module).__name__} has no functional form; the tuner must write forward"
        )

    # -- what a tuner asks for --------------------------------------------------------------------------------------

    def param(self, *shape: int, init: str | Callable[[Tensor, torch.Generator], Any] = "zeros") -> nn.Parameter:
        """A new trainable tensor on the site's device, in fp32 or wider.

        init: "zeros", "ones", "kaiming" (uniform, bound 1/sqrt(shape[-1])), or a function (tensor, generator) that
        fills it. Values depend on the attach seed, the site and the order of the calls alone, not on the device.
        """
        reference = next(self.module.parameters())
        device = _device(self, reference)
        dtype = promoted(reference.dtype)
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
        """A trainable deep copy of the module (ties inside it stay ties), in the module's own dtype."""
        adapters = adapters_of(self.module)
        replica = copy.deepcopy(self.module, {} if adapters is None else {id(adapters): None})
        if adapters is not None:
            del replica._modules["peft"]
            replica.__class__ = base_class(self.module)
        for hooks in (replica._forward_hooks, replica._forward_pre_hooks, replica._backward_hooks):
            hooks.clear()  # they run on the module itself, around the replica
        for p in replica.parameters():
            p.requires_grad_(p.is_floating_point())
        return replica


def _original(module: nn.Module) -> Any:
    return base_class(module) if adapters_of(module) is not None else type(module)


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Linear) or (name == "Conv1D" and hasattr(module, "nf")):
        return "linear"
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
        self.innermost = tuner is None and whole and site.lifted is None
        # The output belongs to the caller, who may write into it.
        self.fresh = self.innermost if tuner is None else tuner.fresh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.tuner is None:
            return self.site.call(*args, **kwargs)
        return self.tuner(self.below, *args, **kwargs)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of everything below, as if it were merged."""
        if self.tuner is None or self.below is None:
            return self.site.weight, self.site.bias
        return self.tuner.fold(*self.below.effective())


class _PartBase:
    """The base of a tuner that sees some output rows of a fused linear: y was computed for all rows at once."""

    innermost = False
    fresh = False  # y is a view of the fused output

    def __init__(self, site: Site, rows: slice, base: Base, x: Tensor, y: Tensor):
        self.site, self.rows, self.base, self.x, self.y = site, rows, base, x, y

    def __call__(self, x: Tensor) -> Tensor:
        if x is self.x:
            return self.y[..., self.rows]
        return self.site.apply(*self.effective(), x)  # the tuner changed the input: its rows are computed anew

    def effective(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.base.effective()
        return weight[self.rows], None if bias is None else bias[self.rows]


class Parts(Tuner):
    """The tuners of one adapter on a fused linear, one per block of output rows (q, k, v in one matrix)."""

    fresh = True

    def __init__(self, parts: dict[str, tuple[Site, Tuner]]):
        nn.Module.__init__(self)
        self.sites = {label: site for label, (site, _) in parts.items()}
        for label, (site, tuner) in parts.items():
            self.site_name = site.name
            self._modules[label] = tuner

    def parts(self) -> Iterator[tuple[Site, slice, Tuner]]:
        for label, site in self.sites.items():
            start, stop = site.rows or (0, site.n_out)
            yield site, slice(start, stop), cast(Tuner, self._modules[label])

    @property
    def mergeable(self) -> bool:
        return all(tuner.mergeable for _, _, tuner in self.parts())

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base(x)
        tuned = [(rows, tuner(_PartBase(site, rows, base, x, y), x).to(y.dtype)) for site, rows, tuner in self.parts()]
        return _assemble(y, tuned, dim=-1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weights, biases = [], []
        for _, rows, tuner in self.parts():
            w, b = tuner.fold(weight[rows], None if bias is None else bias[rows])
            weights.append((rows, w))
            if b is not None:
                biases.append((rows, b))
        if biases and bias is None:
            bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        return _assemble(weight, weights, dim=0), None if bias is None else _assemble(bias, biases, dim=0)

    def changes(self) -> tuple[int, int]:
        changed, rank = zip(*(tuner.changes() for _, _, tuner in self.parts()), strict=True)
        return sum(changed), sum(rank)


def _assemble(whole: Tensor, parts: list[tuple[slice, Tensor]], dim: int) -> Tensor:
    """`whole` with the given ranges along `dim` replaced, without writing into it."""
    pieces, at = [], 0
    for rows, part in sorted(parts, key=lambda item: item[0].start):
        if rows.start > at:
            pieces.append(whole.narrow(dim, at, rows.start - at))
        pieces.append(part)
        at = rows.stop
    if at < whole.shape[dim]:
        pieces.append(whole.narrow(dim, at, whole.shape[dim] - at))
    return torch.cat(pieces, dim=dim)


class Adapters(nn.Module):
    """`module.peft`: the tuners at one module by adapter name, bottom of the stack first, and the active chain."""

    site: Site
    chain: Base

    def __init__(self, site: Site):
        super().__init__()
        # Past nn.Module's attribute rules, or an adapter could not be called "site" or "chain".
        vars(self).update(site=site, chain=Base(site))

    @property
    def module(self) -> nn.Module:
        return self.site.module

    # Tuners live in _modules without add_module: an adapter may be called "train" or "half" like an attribute.

    @property
    def tuners(self) -> dict[str, Tuner]:
        return cast(dict[str, Tuner], self._modules)

    def activate(self, names: list[str]) -> None:
        """Rebuilds the chain from the named tuners, in attach order."""
        chain = Base(self.site)
        for name, tuner in self.tuners.items():
            if name in names:
                chain = Base(self.site, chain, tuner)
        vars(self)["chain"] = chain


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

    @functools.wraps(cls.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.peft.chain(*args, **kwargs)

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
