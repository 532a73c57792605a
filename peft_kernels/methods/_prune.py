"""Structural pruning of a stack of transformer blocks: the numbers that are left where every width is divided."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.method import as_matrix
from ..engine.roles import roles_of
from ..engine.site import Site, base_modules, base_values

# The features that a linear of a role writes and reads; memory is what cross-attention sees of the encoder.
_FEATURES = {role: ("head", "hidden") for role in "qkv"} | {role: ("ffn", "hidden") for role in ("up", "gate")}
_FEATURES |= {"o": ("hidden", "head"), "down": ("hidden", "ffn")}
_FEATURES |= {"cross.k": ("head", "memory"), "cross.v": ("head", "memory")}


def head_size(config: Any) -> int:
    """Features of one attention head."""
    own = (getattr(config, name, None) for name in ("head_dim", "d_kv"))
    return next((n for n in own if n), config.hidden_size // config.num_attention_heads)


def turned(config: Any) -> int:
    """Of these, how many rotary positions turn."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head_size(config) * rope.get("partial_rotary_factor", 1.0))


def pruned(stack: nn.Module, side: nn.Module, name: str, kept: list[int], config: Any, small: Any) -> dict[str, Tensor]:
    """Parameter of the side stack -> the part of the backbone's numbers that is left in it.

    The importance of a feature is the sum of |w| over all numbers of linears that write or read it, and the most
    important are left, in their order. Hidden features are the same for the whole stack, and so are those of the
    encoder that cross-attention reads. A block keeps the same features of each of its heads, in q, k, v and o; where
    positions are rotary, pairs that turn together. Each block has its own neurons. A parameter that the backbone's
    block lacks is taken from its first block (T5's position bias).
    """
    blocks = stack._modules[name]
    assert isinstance(blocks, nn.ModuleList)
    linears = {i: list(_linears(config, f"{name}.{i}", blocks[i])) for i in kept}
    sizes = {"hidden": config.hidden_size, "memory": config.hidden_size, "head": head_size(config)}
    if (neurons := next((s.n_in for s, features in linears[kept[0]] if features == _FEATURES["down"]), None)) is None:
        raise ValueError(f"{type(stack).__name__} is of no family whose linears are known; LST needs init='random'")
    sizes["ffn"] = neurons
    ratio = config.hidden_size // small.hidden_size
    shared: dict[str, Tensor] = {}
    own: dict[int, dict[str, Tensor]] = {i: {} for i in kept}
    for i in kept:
        values = base_values(blocks[i])
        if any(t.is_meta for t in values.values()):
            raise ValueError(f"the weights of {name}.{i} are offloaded, and pruning reads them; use init='random'")
        for site, features in linears[i]:
            weight = as_matrix(values[f"{site.name}.weight"], site.layout).abs().to(torch.float32)
            for axis, kind in enumerate(features):
                into = own[i] if kind in ("head", "ffn") else shared
                total = weight.sum(1 - axis).view(-1, sizes[kind]).sum(0)
                into[kind] = into[kind] + total if kind in into else total
    pairs = (turned(config) // 2, turned(small) // 2) if hasattr(side, "rotary_emb") else (0, 0)

    def best(kind: str, score: Tensor) -> Tensor:
        if kind != "head":
            return _best(score, len(score) // ratio)
        turning, rest = score[: 2 * pairs[0]], score[2 * pairs[0] :]
        first = _best(turning.view(2, -1).sum(0), pairs[1])
        others = _best(rest, len(score) // ratio - 2 * pairs[1]) + len(turning)
        return torch.cat([first, first + pairs[0], others])

    common = {kind: best(kind, score) for kind, score in shared.items()}
    wanted, out = dict(side.named_parameters()), dict[str, Tensor]()
    for j, i in enumerate(kept):
        index = {**common, **{kind: best(kind, score) for kind, score in own[i].items()}}
        known = {site.name: (site, features) for site, features in linears[i]}
        for path, value in {**(base_values(blocks[0]) if not j else {}), **base_values(blocks[i])}.items():
            place, _, leaf = path.rpartition(".")
            if place in known:
                site, features = known[place]
                columns = leaf == "weight" and site.layout == "columns"
                value = _chosen(value, features[::-1] if columns else features, sizes, index)
            elif value.dim() == 1 and len(value) in (sizes["hidden"], sizes["head"]):
                value = _chosen(value, ("hidden" if len(value) == sizes["hidden"] else "head",), sizes, index)
            out[f"{name}.{j}.{path}"] = value
    for path in wanted:
        if not path.startswith(f"{name}."):  # the final norm
            out[path] = _chosen(stack.get_parameter(path).detach(), ("hidden",), sizes, common)
    return {path: t for path, t in out.items() if path in wanted and t.shape == wanted[path].shape}


def _linears(config: Any, place: str, block: nn.Module) -> Iterator[tuple[Site, tuple[str, str]]]:
    """(site by its path in the block, the features it writes and reads)."""
    for path, module in base_modules(block):
        roles = roles_of(config, f"{place}.{path}")
        if features := next((_FEATURES[role] for role in reversed(roles) if role in _FEATURES), None):
            yield Site(path, module), features


def _best(score: Tensor, k: int) -> Tensor:
    return score.topk(k).indices.sort().values


def _chosen(value: Tensor, features: tuple[str, ...], sizes: dict[str, int], index: dict[str, Tensor]) -> Tensor:
    """Of every dimension the chosen features; it may hold several groups of them, as heads are."""
    for axis, kind in enumerate(features[: value.dim()]):
        groups = value.unflatten(axis, (-1, sizes[kind]))
        value = groups.index_select(axis + 1, index[kind]).flatten(axis, axis + 1)
    return value
