"""attach and detach: swapping a module's class for one whose forward runs the tuners, and taking it back bit by bit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .loans import Lent, lend, restore
from .method import Loan, Method, Part, Source, Tuner, method_of, numbers, words
from .packed import Packed
from .roles import resolve
from .rows import Key, routing
from .site import Adapters, Site, adapted, adapters_of, base_class, base_modules, base_parameters, is_adapted
from .stack import Parts, Spanned, Stack
from .taps import tap, untap

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class Adapter:
    """What was attached under one name: the method, then the modules trained beside it."""

    parts: list[Part]
    seed: int

    def expanded(self) -> list[tuple[Part, bool]]:
        """(part, does it belong to the method) without recipes; a tuner's `part` is its number here."""
        return [(own, i == 0) for i, part in enumerate(self.parts) for own in part.method.expand(part)]


class Bank(Protocol):
    """Many adapters in one tuner per module: what routes need of a `pk.AdapterBank`."""

    @property
    def name(self) -> str:
        """Of the adapter that those tuners are."""

    @property
    def names(self) -> list[str]:
        """Of the adapters in it."""

    @property
    def running(self) -> int:
        """Routes of the model, in all threads."""

    def leased(self, names: Iterable[Any]) -> AbstractContextManager[dict[str, int]]:
        """Within the `with`, those of `names` that are in the bank stay what they are: name -> number for the op."""


@dataclass
class State:
    """What the engine remembers about a model, on its root module."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    requires_grad: dict[str, bool] = field(default_factory=dict)  # of the base parameters before the first attach
    buffers: dict[str, Tensor] = field(default_factory=dict)  # before it too: BatchNorm moves them while training
    merged: list[str] = field(default_factory=list)
    key: Key = field(default_factory=Key)  # for routes
    stash: dict[str, Any] | None = None  # the base's tensors before the merge; None: a parameter the merge created
    bank: Bank | None = None
    lent: list[Lent] = field(default_factory=list)


_KEY = "_peft_kernels"  # in vars(root)


def is_attached(model: nn.Module) -> bool:
    """Whether the model has an adapter."""
    return _KEY in vars(model)


def state_of(model: nn.Module) -> State:
    """The model's State; ValueError if nothing is attached to it."""
    state = vars(model).get(_KEY)
    if state is None:
        raise ValueError(f"{type(model).__name__} has no adapter; attach one with pk.attach(model, pk.LoRA())")
    return state


def names_of(model: nn.Module, name: str | None) -> list[str]:
    """[name], or every attached name for None; ValueError for an unknown one."""
    state = state_of(model)
    if name is not None and name not in state.adapters:
        banked = "" if state.bank is None else f"; the bank holds {', '.join(state.bank.names) or 'none'}"
        raise ValueError(f"no adapter {name!r}; attached are {', '.join(state.adapters)}{banked}")
    return list(state.adapters) if name is None else [name]


def all_adapters(model: nn.Module) -> Iterator[tuple[str, Adapters]]:
    """(path, module.peft) of the modules that carry tuners."""
    for path, module in base_modules(model):
        if (adapters := adapters_of(module)) is not None:
            yield path, adapters


def tuners(model: nn.Module, name: str) -> Iterator[tuple[str, Tuner]]:
    """(path of the site, tuner) of one adapter, in model order."""
    for path, adapters in all_adapters(model):
        if name in adapters.tuners:
            yield path, adapters.tuners[name]


def attach(
    model: nn.Module,
    method: Method,
    targets: Sequence[str] | str | None = None,
    *,
    exclude: Iterable[str] = (),
    layers: Sequence[int] | int | None = None,
    name: str = "default",
    seed: int = 0,
    train: Iterable[str] = (),
) -> nn.Module:
    """Attaches `method` to the model in place and returns the model.

    targets: roles (q k v o up gate down attn ffn norm embed block stack head model) or globs over module paths, "@path"
        for exactly one module and "role@path" for one with its role; default the method's own roles.
    exclude: the same, left out.   layers: layer numbers, negative from the end.
    name: several adapters may be attached; they stack in the order of attachment.
    train: roles or globs of modules trained whole, such as ("head",). They too become separate tensors.
    seed: the initial values depend on it and on the module's path alone.
    The base model's parameters are frozen and stay bit-equal; only the adapter's are trainable.
    Raises ValueError when nothing matches, on a bad name or value, and where a swapped module would not be seen.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"attach got a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(method, Method):
        raise ValueError(f"attach got {method!r}; expected a method instance such as pk.LoRA(rank=8)")
    targets = method.roles if targets is None else words(targets)
    if not targets and method.roles:
        raise ValueError("targets is empty; expected roles or globs over module paths")
    part = Part(method, targets, words(exclude), numbers(layers))
    parts = [replace(part, method=method.solved(model, part))]
    if train := words(train):
        parts.append(Part(method_of("head")(), train))
    return attach_parts(model, name, Adapter(parts, seed))


def attach_parts(model: nn.Module, name: str, adapter: Adapter, *, filled: bool = False) -> nn.Module:
    """Attaches a complete Adapter, all or nothing.   filled: its numbers are to come from a file (Site.filled)."""
    state = vars(model).get(_KEY) or State()
    check_name(name)
    if name in state.adapters:
        raise ValueError(f"adapter {name!r} is attached already; choose another name or pk.detach(model, {name!r})")
    _refuse_banked(state, name)
    if name == "training":
        raise ValueError("adapter name 'training' is a flag of every torch module; choose another")
    if state.merged:
        raise RuntimeError(f"{', '.join(state.merged)} is merged; pk.unmerge(model) before attaching another adapter")
    for path, adapters in all_adapters(model):
        if foreign := set(adapters.tuners) - set(state.adapters):
            raise ValueError(
                f"{path or 'the model'} carries {min(foreign)!r}, attached through another module; "
                "use that module throughout, or detach it there first"
            )
    chosen = chosen_sites(model, adapter)
    _guard(model, chosen)
    whole = tuple({site.name for _, cfg, site in chosen if site.name and cfg.tuner.opaque})
    if any([part.method.prepare(model, whole) for part, _ in adapter.expanded()]):
        chosen = chosen_sites(model, adapter)  # sites know their modules' layouts
    for _, _, site in chosen:
        adapted(type(site.module))  # a class that cannot be extended stops here, before anything is changed
        site.filled = filled
    made = [(level, site, cfg.tuner(cfg, site)) for level, cfg, site in chosen]
    for level, _, tuner in made:
        tuner.part = level
    sources = [(site, source) for _, site, tuner in made for source in _sources(tuner, site)]
    loans = [loan for _, site, tuner in made for loan in _loans(tuner, site)]
    built = _by_module(made)
    with torch.no_grad():
        for level, (part, _) in enumerate(adapter.expanded()):
            part.method.attached([tuner for own, _, tuner in made if own == level])

    if not state.adapters:
        state.requires_grad = {path: p.requires_grad for path, p in base_parameters(model)}
        state.buffers = {path: b.clone() for path, b in base_buffers(model)}
    for _, p in base_parameters(model):
        p.requires_grad_(False)
    for site, tuner in built:
        _swap(site).tuners[name] = tuner.train(site.module.training)
    for site, source in sources:
        tap(source.module, site.key(source.what), source.output, source.argument)
        top = adapters_of(site.module).tuners[name]  # type: ignore[union-attr]  # swapped above
        top.taps = (*top.taps, site.key(source.what))
    lend(state.lent, name, loans)
    state.adapters[name] = adapter
    state.active.append(name)
    vars(model)[_KEY] = state
    refresh(model)
    return model


def check_name(name: object) -> None:
    """ValueError for what cannot be the name of an adapter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"adapter name {name!r}; expected letters, digits, '_' and '-'")


def _refuse_banked(state: State, name: str) -> None:
    if state.bank is not None and name in state.bank.names:
        raise ValueError(f"adapter {name!r} is in the model's bank; choose another name or evict it there")


def chosen_sites(model: nn.Module, adapter: Adapter) -> list[tuple[int, Method, Site]]:
    """(part number, method, site) part by part in model order; a module trained whole belongs to that part alone."""
    chosen: list[tuple[int, Method, Site]] = []
    parts = adapter.expanded()
    for level, (part, _) in enumerate(parts):
        with part.located():
            sites = _sites_of(model, part, adapter.seed + level)
            if part.method.tuner.opaque:
                before = {site.name for _, cfg, site in chosen if cfg.tuner.opaque}
                sites = [site for site in sites if not _inside(site.name, before)]
                names = {site.name for site in sites}
                chosen = [c for c in chosen if not _inside(c[2].name, names)]
            chosen += [(level, part.method.at(site), site) for site in sites]
    whole = {site.name for _, cfg, site in chosen if cfg.tuner.opaque}
    chosen = [c for c in chosen if not (c[2].name and _inside(c[2].name.rpartition(".")[0], whole))]
    if not any(parts[level][1] for level, _, _ in chosen):
        raise ValueError(
            f"all targets of {adapter.parts[0].method.key} are trained whole already; choose other targets"
        )
    return chosen


def _sites_of(model: nn.Module, part: Part, seed: int) -> list[Site]:
    """What a part of an adapter tunes, before it is known what other parts train whole."""
    default = part.targets == part.method.roles
    found = resolve(model, part.targets, exclude=part.exclude, layers=part.layers, seed=seed, default=default)
    sites = part.method.select(found)
    if not sites:
        kinds = ", ".join(sorted({s.kind for s in found})) or "nothing"
        raise ValueError(f"{part.method.key} cannot tune what {part.targets} match ({kinds}); choose other targets")
    return sites


def _inside(path: str, names: set[str]) -> bool:
    """Whether a module is one of `names` or inside one."""
    parts = path.split(".")
    return bool(names) and ("" in names or any(".".join(parts[: i + 1]) in names for i in range(len(parts))))


def places(chosen: list[tuple[int, Method, Site]]) -> list[str]:
    """Where each of these tuners is in the tensors of its adapter: the path of its module and its place in there."""
    out = []
    for level, _, site in chosen:
        own = sorted({(n, s.entry is not None) for n, _, s in chosen if s.name == site.name})
        inside = [str(own.index((level, site.entry is not None)))] if len(own) > 1 else []
        if site.rows is not None:
            inside.append(site.role)
        elif site.entry is not None:
            inside.append("tuner")  # of a Spanned
        out.append(".".join(filter(None, (site.name, *inside))))
    return out


def _by_module(built: list[tuple[int, Site, Tuner]]) -> list[tuple[Site, Tuner]]:
    """One (site of the module, tuner) per module: row blocks are gathered, several parts stacked."""
    grouped: dict[str, dict[tuple[int, bool], list[tuple[Site, Tuner]]]] = {}
    for level, site, tuner in built:
        grouped.setdefault(site.name, {}).setdefault((level, site.entry is not None), []).append((site, tuner))
    out = []
    for levels in grouped.values():
        tuners = []
        for _, members in sorted(levels.items(), key=lambda item: item[0]):
            site, tuner = members[0]
            if any(s.rows is None for s, _ in members) and len(members) > 1:
                raise ValueError(f"{site.name} is targeted both whole and by rows ({[s.role for s, _ in members]})")
            if site.rows is not None:
                tuner = Parts({s.role: (s, t) for s, t in members})
            elif site.entry is not None:
                tuner = Spanned(site, tuner)
            tuners.append(tuner)
        plain = site.rows is None and site.entry is None
        stack = Stack({str(i): t for i, t in enumerate(tuners)}) if len(tuners) > 1 else tuners[0]
        out.append((site if plain else Site(site.name, site.module), stack))
    return out


def _sources(tuner: Tuner, site: Site) -> list[Source]:
    """What a tuner here, or one inside it, must see of other modules."""
    sources = [Source("entry", site.entry)] if site.entry is not None else []
    inner = [t for t in tuner.modules() if isinstance(t, Tuner)]
    if any(t.needs_residual for t in inner):
        if site.residual is None:
            raise ValueError(f"{tuner.cfg.key} needs the residual at {site.name}, which is not known there; use a role")
        sources.append(Source("residual", site.residual))
    return [*sources, *(source for t in inner for source in t.sources(site))]


def _loans(tuner: Tuner, site: Site) -> list[Loan]:
    """What a tuner here, or one inside it, wants lent."""
    return [loan for t in tuner.modules() if isinstance(t, Tuner) for loan in t.lends(site)]


def _guard(model: nn.Module, chosen: list[tuple[int, Method, Site]]) -> None:
    """Refuses what would be silently wrong."""
    ancestors = dict(base_modules(model))
    meta = all(p.device.type == "meta" for _, p in base_parameters(model))
    for _, cfg, site in chosen:
        parts = site.name.split(".") if site.name else []
        line = [ancestors.get(".".join(parts[:i]), model) for i in range(len(parts))]
        for module in [*line, site.module]:
            if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
                raise ValueError(f"{site.name} is under fully_shard; attach first, then fully_shard the model")
        if any(isinstance(module, nn.MultiheadAttention) for module in line):
            raise ValueError(
                f"{site.name} is inside torch.nn.MultiheadAttention, which reads weights without calling the module, "
                "so a tuner there would never run; exclude it"
            )
        for module in line:
            if isinstance(module, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
                raise ValueError(
                    f"{site.name} is inside torch.nn.TransformerEncoderLayer, whose fast path skips the tuner; call "
                    "torch.backends.mha.set_fastpath_enabled(False) first"
                )
            if (above := adapters_of(module)) is not None and any(t.opaque for t in above.tuners.values()):
                raise ValueError(
                    f"{site.name} is inside a module that is trained whole, so a tuner there would never run"
                )
        here = adapters_of(site.module)
        if cfg.tuner.opaque and here is not None and not all(t.opaque for t in here.tuners.values()):
            raise ValueError(
                f"{cfg.key} replaces {site.name or 'the model'} whole and would hide a tuner there; detach that first"
            )
        for path, p in base_parameters(site.module):
            if type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor":
                raise ValueError(f"{site.name}.{path} is a DTensor; attach before sharding the model")
            if p.device.type == "meta" and not meta and not hasattr(site.module, "_hf_hook"):
                raise ValueError(
                    f"{site.name}.{path} is on the meta device while others are not; load its values first"
                )


def _swap(site: Site) -> Adapters:
    """Gives the site's module its `peft` and the class that runs it; a second adapter finds them there."""
    module = site.module
    if (adapters := adapters_of(module)) is None:
        site.lifted = vars(module).pop("forward", None)
        module.__class__ = adapted(type(module))
        adapters = module._modules["peft"] = Adapters(site)
    return adapters


def refresh(model: nn.Module) -> None:
    """Rebuilds every chain from the active, unmerged adapters."""
    state = state_of(model)
    running = [n for n in state.active if n not in state.merged]
    order = {name: i for i, name in enumerate(state.adapters)}
    for _, adapters in all_adapters(model):
        adapters.activate(running, order)
        vars(adapters)["key"] = state.key


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes one adapter (None: all) off the model and returns the model, its classes, flags and bits as before.

    A merge is undone first; one made with stash=False stays in the weights (merge, then detach, gives a plain model).
    RuntimeError if a class was laid over ours since attach (FSDP2), or an instance forward still calls it.
    """
    from .merge import unmerge  # merge builds on attach

    state = state_of(model)
    names = names_of(model, name)
    leaving = [a for _, a in all_adapters(model) if all(n in names for n in a.tuners)]
    taps = _taps(model)
    for module in (a.module for a in leaving):
        if not is_adapted(module):
            raise RuntimeError(
                f"a class was laid over {type(module).__name__} after attach (fully_shard?); undo that before detach"
            )
        planted = vars(module).get("forward")
        if planted is not None and getattr(planted, "__func__", None) is not type(module).forward:
            raise RuntimeError(
                f"{type(module).__name__} got an instance forward after attach (an accelerate hook?); remove it first"
            )
    refuse_routed(state, "detach")
    merged_for_good = bool(state.merged) and state.stash is None
    if state.merged and not merged_for_good:
        unmerge(model)
    for adapters in leaving:
        module, lifted = adapters.module, adapters.site.lifted
        vars(module).pop("forward", None)  # a bound leftover of our class, as removed hooks leave behind
        del module._modules["peft"]
        module.__class__ = base_class(module)
        if lifted is not None:
            vars(module)["forward"] = lifted
    for _, adapters in all_adapters(model):
        for n in names:
            adapters.tuners.pop(n, None)
    taps -= _taps(model)
    for module in model.modules() if taps else ():
        untap(module, taps)
    restore(state.lent, names)
    for n in names:
        del state.adapters[n]
    if state.bank is not None and state.bank.name in names:
        state.bank = None
    state.active = [n for n in state.active if n not in names]
    state.merged = [n for n in state.merged if n not in names]
    if state.adapters:
        refresh(model)
        return model
    for path, p in base_parameters(model):
        p.requires_grad_(state.requires_grad.get(path, p.requires_grad))
    for path, b in base_buffers(model):
        if path in state.buffers and not merged_for_good:
            b.copy_(state.buffers[path])
    del vars(model)[_KEY]
    return model


def _taps(model: nn.Module) -> set[str]:
    return {key for _, a in all_adapters(model) for tuner in a.tuners.values() for key in tuner.taps}


def refuse_routed(state: State, what: str) -> None:
    """RuntimeError inside a pk.route of this thread: the numbers of its rows would no longer hold."""
    if routing(state.key) is not None:
        raise RuntimeError(f"{what} inside pk.route; leave the with block first")
    if state.bank is not None and state.bank.running:
        raise RuntimeError(f"{what} while {state.bank.running} routes of other threads run; let them end first")


def rename(model: nn.Module, old: str, new: str) -> nn.Module:
    """Gives an adapter another name; its place in the stack stays."""
    state = state_of(model)
    names_of(model, old)
    if not _NAME.fullmatch(new) or new in state.adapters:
        raise ValueError(f"adapter name {new!r}; expected a new name of letters, digits, '_' and '-'")
    _refuse_banked(state, new)
    if state.bank is not None and old == state.bank.name:
        raise ValueError(f"{old!r} is the model's bank, which keeps its name; rename an adapter")
    for _, adapters in all_adapters(model):
        renamed = [(new if n == old else n, t) for n, t in adapters.tuners.items()]
        adapters.tuners.clear()
        adapters.tuners.update(renamed)
    state.adapters = {(new if n == old else n): a for n, a in state.adapters.items()}
    state.active = [new if n == old else n for n in state.active]
    for held in state.lent:
        held.adapters = [new if n == old else n for n in held.adapters]
    state.merged = [new if n == old else n for n in state.merged]
    refresh(model)
    return model


def active(model: nn.Module) -> list[str]:
    """The names of the active adapters, bottom of the stack first."""
    return list(state_of(model).active)


def set_active(model: nn.Module, names: Sequence[str] | str) -> nn.Module:
    """Makes exactly these adapters run; they stack in the order of attachment. RuntimeError while merged."""
    state = state_of(model)
    names = words(names)
    for n in names:
        names_of(model, n)
    if state.merged:
        raise RuntimeError(
            f"{', '.join(state.merged)} is merged; pk.unmerge(model) before changing the active adapters"
        )
    state.active = [n for n in state.adapters if n in names]
    refresh(model)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the `with`, the model is the frozen base (heads too). RuntimeError while merged."""
    before = active(model)
    set_active(model, [])
    try:
        yield model
    finally:
        if (state := vars(model).get(_KEY)) is not None:
            set_active(model, [n for n in before if n in state.adapters])


def base_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, buffer) of the base model."""
    for path, module in base_modules(model):
        for name, b in () if isinstance(module, Packed) else module._buffers.items():  # which are a part of its weight
            if b is not None:
                yield f"{path}.{name}" if path else name, b
