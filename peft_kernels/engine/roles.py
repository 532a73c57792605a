"""How targets are resolved to sites, by the table of roles in families.py.

`stack` and `backbone` are no patterns of that table: the one is each module that holds a list of blocks, such as an
encoder, the other the nearest module from there upward that takes embeddings in the place of tokens, or makes them.

A target is a role, a glob or an address (`Site.address`): `@path` is exactly one module, `role@path`
the same with its role, for a fused linear the rows of that role.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch import nn

from .families import FAMILIES, Family
from .site import Rows, Site, base_modules, matches

# Every word that is a role and not a glob.
ROLES: tuple[str, ...] = (
    "q",
    "k",
    "v",
    "o",
    "up",
    "gate",
    "down",
    "attn",
    "ffn",
    "norm",
    "embed",
    "block",
    "stack",
    "backbone",
    "head",
    "model",
)
ROLES += tuple(f"cross.{role}" for role in ("q", "k", "v", "o", "attn"))

# The sublayer a role belongs to. Cross-attention first: its modules have the roles q k v o attn as well.
_SUBLAYERS = {
    "cross.attn": tuple(role for role in ROLES if role.startswith("cross.")),
    "attn": ("q", "k", "v", "o", "attn"),
    "ffn": ("up", "gate", "down", "ffn"),
}


def family(model: nn.Module) -> Family | None:
    """The model's row of the table, or None."""
    return FAMILIES.get(_model_type(model))


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def roles_of(config: Any, path: str) -> list[str]:
    """The roles of the table that a module at `path` has in a model with this config: a fused linear has several."""
    row = FAMILIES.get(getattr(config, "model_type", ""))
    patterns = ((role, p.partition("[")[0]) for role, own in row.roles.items() for p in own) if row else ()
    return [role for role, pattern in patterns if ">" not in pattern and _match(pattern, path)]


def layer_of(path: str) -> int | None:
    """The layer a module belongs to: the first number in its path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


# What one site is: (path of its module, rows or None, path of a span's entry or None).
Key = tuple[str, Rows | None, str | None]


def resolve(
    model: nn.Module,
    targets: Sequence[str],
    *,
    exclude: Iterable[str] = (),
    layers: Sequence[int] | None = None,
    seed: int = 0,
    default: bool = False,
) -> list[Site]:
    """The sites that roles, globs or spans of globs ("*.fc1>*.fc2") pick, in model order.

    ValueError for a target that matches nothing; default: of a method's own roles those that the model lacks are left
    out as long as it has one, as not every feed-forward layer has a gate. Excluding a role of other families leaves
    out nothing. A site knows the LayerNorm of its sublayer and, as a span, its entry.
    """
    if not targets:
        raise ValueError("targets is empty; expected roles or globs over module paths")
    modules = dict(base_modules(model))
    leave = [pattern for pattern in exclude if not _foreign(model, modules, pattern)]
    skipped = {key for pattern in leave for key, _ in _picks(model, modules, pattern)}
    chosen: dict[Key, str] = {}
    if default:
        targets = [target for target in targets if _has(model, modules, target)] or targets
    for target in targets:
        picks = list(_picks(model, modules, target))
        if not picks:
            raise ValueError(f"target {target!r} matches nothing in {type(model).__name__}; {_hint(model, modules)}")
        for key, role in picks:
            if key not in skipped and (key[0], None, None) not in skipped:
                chosen.setdefault(key, role)
    if not chosen:
        raise ValueError(f"exclude leaves none of the targets {tuple(targets)}")
    order = {path: i for i, path in enumerate(modules)}
    ordered = sorted(chosen, key=lambda key: (order[key[0]], key[1] or (), key[2] or ""))
    sites = []
    for path, rows, entry in ordered:
        site = Site(path, modules[path], chosen[path, rows, entry], rows, seed)
        site.entry = None if entry is None else modules[entry]
        site.norm, site.prenorm, site.residual = _norm(model, modules, path)
        site.causal, site.padding = _sight(model, modules, path)
        if site.role in ("o", "cross.o"):
            site.heads = _heads(cast(Any, model.config), path)
        sites.append(site)
    return _in_layers(sites, layers)


def picked(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Paths of the modules that roles, globs or addresses name and of all that is in them.

    A role that the model's family does not have, or that has no family, names nothing; ValueError for another pattern
    that matches nothing.
    """
    modules, row = dict(base_modules(model)), family(model)
    tops: set[str] = set()
    for pattern in patterns:
        if pattern in ROLES and pattern != "model" and not _listed(row, pattern):
            continue
        found = {key[0] for key, _ in _picks(model, modules, pattern)}
        if not found and pattern not in ROLES:
            raise ValueError(f"{pattern!r} matches nothing in {type(model).__name__}; {_hint(model, modules)}")
        tops |= found
    return {path for path in modules if "" in tops or any(top in tops for top in _prefixes(path))}


def _picks(model: nn.Module, modules: dict[str, nn.Module], target: str) -> Iterator[tuple[Key, str]]:
    """(key, role) of what a role, a glob, a span of globs or an address names."""
    if not isinstance(target, str) or not target:
        raise ValueError(f"target {target!r}; expected a role ({' '.join(ROLES)}) or a glob over module paths")
    role, at, place = target.partition("@")
    if at and not role:
        if place in modules:
            yield (place, None, None), _role(model, modules, (place, None, None))
    elif at and role in ROLES:
        yield from ((key, role) for key, _ in _picks(model, modules, role) if key[0] == place)
    elif target == "model":
        yield ("", None, None), "model"
    elif target == "stack" and (family(model) or not any(matches(path, target) for path in modules if path)):
        blocks = (path for (path, _, _), _ in _picks(model, modules, "block"))
        for path in dict.fromkeys(".".join(block.split(".")[:-2]) for block in blocks):
            yield (path, None, None), target
    elif target == "backbone" and (family(model) or not any(matches(path, target) for path in modules if path)):
        stacks = [path for (path, _, _), _ in _picks(model, modules, "stack")]
        for path in dict.fromkeys(_backbone(modules, stack) for stack in stacks):
            yield (path, None, None), target
    elif target in ROLES and (family(model) or not any(matches(path, target) for path in modules if path)):
        for pattern in _patterns(model, target):
            for path in modules:
                if key := _key(model, modules, pattern, path):
                    yield key, target
    elif ">" in target:
        yield from ((key, _role(model, modules, key)) for key in _spans(modules, target))
    else:
        # `*` is every layer but what is trained whole or not at all unless it is named: embeddings and the task head.
        row = family(model)
        heads = row.roles["head"] if row and target == "*" else ()
        for path, module in modules.items():
            if target == "*" and isinstance(module, nn.Embedding):
                continue
            if path and matches(path, target) and not any(_match(h, p) for p in _prefixes(path) for h in heads):
                key = (path, None, None)
                yield key, _role(model, modules, key)


def _backbone(modules: dict[str, nn.Module], stack: str) -> str:
    """The path of the nearest module from a stack upward that takes or makes embeddings."""
    for path in [*reversed(_prefixes(stack)), ""] if stack else [""]:
        module = modules[path]
        if "inputs_embeds" in inspect.signature(module.forward).parameters or "embeddings" in module._modules:
            return path
    others = ", ".join(
        f"'@{p}'" for p, m in modules.items() if "inputs_embeds" in inspect.signature(m.forward).parameters
    )
    raise ValueError(f"{stack} takes no embeddings, so it has no backbone; target {others or 'another module'} alone")


def _listed(row: Family | None, role: str) -> bool:
    """Whether a row of the table has a role; stack and backbone are where its blocks are."""
    return row is not None and ("block" if role in ("stack", "backbone") else role) in row.roles


def _patterns(model: nn.Module, role: str) -> tuple[str, ...]:
    row, kind = family(model), _model_type(model)
    if row is None:
        raise ValueError(
            f"role {role!r} is not known for {type(model).__name__}{f' (model type {kind})' if kind else ''}; "
            f"give globs over module paths instead, such as '*.query'; known model types: {', '.join(FAMILIES)}"
        )
    if role not in row.roles:
        raise ValueError(f"role {role!r} does not exist in family {kind}; it has {' '.join(row.roles)}")
    return row.roles[role]


def _heads(config: Any, path: str) -> int | None:
    """How many key-value heads the attention at `path` has, each with as many queries."""
    for side in ("encoder", "decoder"):
        if side in path.split(".") and hasattr(config, f"{side}_attention_heads"):
            return getattr(config, f"{side}_attention_heads")
    if getattr(config, "multi_query", False) and not config.new_decoder_architecture:
        return 1
    names = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
    return next((n for name in names if (n := getattr(config, name, None))), None)


def beside(model: nn.Module, path: str, role: str, wanted: Iterable[str]) -> list[Site]:
    """The linears of the `wanted` roles in the sublayer whose linear at `path` has `role`; none without a family."""
    modules, row, found = dict(base_modules(model)), family(model), []
    for number, pattern in enumerate(row.roles.get(role, ()) if row else ()):
        if (match := _match(pattern, path)) is None:
            continue
        for other in wanted:
            patterns = cast(Family, row).roles.get(other, ())
            # Of as many patterns each belongs to its own: those of self-attention, then those of cross-attention.
            own = patterns[number : number + 1] if len(patterns) == len(cast(Family, row).roles[role]) else patterns
            for place, _, part in (p.partition("[") for p in own):
                if (where := _beside(match, place)) in modules:
                    site = Site(where, modules[where], other)
                    site.rows = _rows(model, site, part[:-1]) if part else None
                    found.append(site)
    return found


def within(site: Site, config: nn.Module, role: str) -> list[Site]:
    """The linears of a role in the module at a site. config: a module that keeps the model's config."""
    row, found = family(config), []
    for path, module in base_modules(site.module, site.name):
        for place, _, part in (p.partition("[") for p in (row.roles.get(role, ()) if row else ())):
            if _match(place, path):
                own = Site(path, module, role)
                own.rows = _rows(config, own, part[:-1]) if part else None
                found.append(own)
    return found


def _has(model: nn.Module, modules: dict[str, nn.Module], target: str) -> bool:
    """False for a role that the model's family does not have, or this model of it."""
    row = family(model)
    if row is None or target not in ROLES or target == "model":
        return True
    return _listed(row, target) and next(_picks(model, modules, target), None) is not None


def _foreign(model: nn.Module, modules: dict[str, nn.Module], word: str) -> bool:
    """Whether it is a role, and not one of the model's family or, without a family, the name of a module."""
    if word not in ROLES or word == "model":
        return False
    row = family(model)
    return not _listed(row, word) if row else not any(matches(path, word) for path in modules if path)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(.*\.)?" + re.escape(pattern).replace(r"\#", r"(\d+)"))


def _match(pattern: str, path: str) -> re.Match[str] | None:
    return _expression(pattern).fullmatch(path)


def _beside(match: re.Match[str], pattern: str) -> str:
    """The path that `pattern` means in the layer where another pattern matched."""
    prefix, *numbers = match.groups()
    for number in numbers:
        pattern = pattern.replace("#", number, 1)
    return (prefix or "") + pattern


def _key(model: nn.Module, modules: dict[str, nn.Module], pattern: str, path: str) -> Key | None:
    """What a pattern of the table names at `path`."""
    place, _, part = pattern.partition("[")
    entry, _, end = place.rpartition(">")
    if (match := _match(end, path)) is None:
        return None
    start = _beside(match, entry) if entry else None
    return path, _rows(model, Site(path, modules[path]), part[:-1]) if part else None, start


def _rows(model: nn.Module, site: Site, part: str) -> Rows:
    """Where a part of a fused linear lies among its output rows."""
    layouts = (layout(model.config) for layout in cast(Family, family(model)).fused)
    groups, units = next((groups, units) for groups, units in layouts if part in units)
    names = list(units)
    unit = site.n_out // groups // sum(units.values())
    start = unit * sum(units[name] for name in names[: names.index(part)])
    return Rows(start, start + unit * units[part], groups)


def _spans(modules: dict[str, nn.Module], target: str) -> Iterator[Key]:
    """Each entry with the next exit of its layer, in model order."""
    entry, _, end = target.partition(">")
    waiting: str | None = None
    for path in modules:
        if path and matches(path, end) and waiting is not None and _layer(path) == _layer(waiting):
            yield path, None, waiting
            waiting = None
        elif path and matches(path, entry):
            if waiting is not None:
                break
            waiting = path
    if waiting is not None:
        raise ValueError(f"span {target!r}: {waiting} has no exit after it in its layer; give as many exits as entries")


def _layer(path: str) -> str:
    """The path up to the first number that has modules under it: the stack and the layer in it."""
    layer = re.match(r"(.*?\.)?\d+(?=\.)", path)
    return layer[0] if layer else ""


def _role(model: nn.Module, modules: dict[str, nn.Module], key: Key) -> str:
    """The role of what a glob picked, so that patterns by role hold there too."""
    row = family(model)
    for role, patterns in row.roles.items() if row else ():
        if any(_key(model, modules, pattern, key[0]) == key for pattern in patterns):
            return role
    return ""


def _norm(
    model: nn.Module, modules: dict[str, nn.Module], path: str
) -> tuple[nn.Module | None, bool | None, nn.Module | None]:
    """Of the sublayer that the module at `path` belongs to: (LayerNorm, does it come before, module that the residual
    enters)."""
    if (row := family(model)) is None:
        return None, None, None
    for sublayer, roles in _SUBLAYERS.items():
        for pattern in (p for role in roles for p in row.roles.get(role, ())):
            if match := _match(pattern.partition("[")[0].rpartition(">")[2], path):
                return _sublayer(model.config, row, sublayer, modules, match)
    return None, None, None


def _sublayer(
    config: Any, row: Family, sublayer: str, modules: dict[str, nn.Module], match: re.Match[str]
) -> tuple[nn.Module | None, bool | None, nn.Module | None]:
    def first(patterns: Iterable[str]) -> nn.Module | None:
        beside = (modules.get(_beside(match, pattern.partition("[")[0])) for pattern in patterns)
        return next((module for module in beside if module is not None), None)

    norm = first(row.norms[sublayer])
    before = row.prenorm(config) if callable(row.prenorm) else row.prenorm
    if norm is None or before is None:
        return norm, None, None
    # The residual is what the LayerNorm gets, or where none comes before the sublayer what its first linear gets.
    return (
        norm,
        before,
        norm if before else first(row.roles[{"ffn": "up", "attn": "q", "cross.attn": "cross.q"}[sublayer]]),
    )


def _sight(model: nn.Module, modules: dict[str, nn.Module], path: str) -> tuple[bool | None, nn.Module | None]:
    """(is the attention around the module at `path` causal, the module whose attention_mask tells what is padding)."""
    if (row := family(model)) is None:
        return None, None

    def named(role: str, paths: Iterable[str]) -> list[str]:
        return [p for p in paths if any(_match(pattern, p) for pattern in row.roles[role])]

    around = named("block", _prefixes(path))
    block = (around or named("block", modules))[-1]  # behind all blocks is what the last one made
    # Bloom's attention does not say: it is.
    causal = next((bool(m.is_causal) for _, m in base_modules(modules[block]) if hasattr(m, "is_causal")), True)
    # Not the block: checkpointing repeats what is in it, without its own hooks.
    attention = modules[named("attn", (p for p in modules if p.startswith(f"{block}.")))[0]]
    return causal, (None if causal else attention) if around else model


def _in_layers(sites: list[Site], layers: Sequence[int] | None) -> list[Site]:
    if layers is None:
        return sites
    numbers = {n for s in sites if (n := layer_of(s.name)) is not None}
    depth = max(numbers, default=-1) + 1
    wanted = {n + depth if n < 0 else n for n in layers}
    if unknown := {n for n in layers if (n + depth if n < 0 else n) not in numbers}:
        raise ValueError(
            f"layers {sorted(unknown)} do not exist among the targets; they are in layers {sorted(numbers)}"
        )
    return [s for s in sites if layer_of(s.name) in wanted]


def _hint(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    if row := family(model):
        return f"family {_model_type(model)} has the roles {' '.join(row.roles)}; or give a glob over module paths"
    paths = [path for path in modules if path]
    return f"its modules are {', '.join(paths[:6])}{', ...' if len(paths) > 6 else ''}"
