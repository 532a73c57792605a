"""The side network of LST: a stack of the backbone's own class, every width divided."""

from __future__ import annotations

import copy
import inspect
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.site import Site, adapters_of, base_class, base_modules
from ._prune import head_size, pruned, turned

# Fields of transformers' configurations, whichever of them a model has.
_FFN = [
    "intermediate_size",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
    "hidden_dim",
    "ffn_hidden_size",
]
_WIDTHS = (*_FFN, "head_dim", "d_kv", "query_pre_attn_scalar")
_DEPTHS = [
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
]
_BEHIND = ("pooler", "project_out")  # what some stacks do to their output


def blocks_of(stack: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the blocks of a stack; ValueError for another module."""
    lists = [(name, m) for name, m in stack._modules.items() if isinstance(m, nn.ModuleList) and len(m)]
    if len(lists) != 1:
        raise ValueError(
            f"{type(stack).__name__} has {len(lists)} lists of blocks; LST tunes modules with one, the role stack"
        )
    return lists[0]


def config_of(stack: nn.Module) -> Any:
    """The configuration that a stack of transformers was made from, where it or a module in it keeps one."""
    configs = (getattr(m, "config", None) for _, m in base_modules(stack))
    if (config := next((c for c in configs if hasattr(c, "model_type")), None)) is None:
        raise ValueError(f"{type(stack).__name__} has no config; LST makes its side network from that of transformers")
    return config


def shrunk(config: Any, reduction: int, kept: list[int]) -> Any:
    """The configuration of a side stack: widths divided, as many heads, the kept blocks alone."""
    small, own = copy.deepcopy(config), vars(config)
    sizes = {"hidden_size": config.hidden_size, "size of a head": head_size(config)}
    sizes |= {name: own[name] for name in _WIDTHS if own.get(name) is not None}
    for name, size in sizes.items():
        if size % reduction:
            raise ValueError(f"LST reduction = {reduction} does not divide {name} {size}; choose one that does")
        if name in own:
            setattr(small, name, size // reduction)
    small.hidden_size = config.hidden_size // reduction  # by whatever name
    for name in own:
        if name in _DEPTHS:
            setattr(small, name, len(kept))
        elif name.endswith("layerdrop"):
            setattr(small, name, 0.0)
        elif name == "word_embed_proj_dim":
            setattr(small, name, small.hidden_size)
    if own.get("layer_types") is not None:
        small.layer_types = [config.layer_types[i] for i in kept]
    rope, size = own.get("rope_parameters") or {}, head_size(small)
    if "partial_rotary_factor" in rope:  # of an even number of features
        pairs = max(round(turned(config) / reduction / 2), 1)
        small.rope_parameters = {**rope, "partial_rotary_factor": 2 * pairs / size}
    small.use_cache = False
    if "flash" in str(getattr(config, "_attn_implementation", "")):  # whose heads are wider, and of 16 bits
        small._attn_implementation = "sdpa"
    return small


def takes_embeddings(stack: nn.Module) -> bool:
    """Whether a stack may be called with embeddings in place of tokens."""
    return "inputs_embeds" in inspect.signature(stack.forward).parameters


def side_stack(site: Site, config: Any, init: str, kept: list[int]) -> nn.Module:
    """A stack of the site's class whose blocks and final norm are trained.

    Before the blocks it does nothing to embeddings. One that takes something else runs the site's own modules there,
    for whatever the class makes of their output beside the hidden states, which the first rung replaces.
    init: "prune" begins with a part of the backbone's numbers (`pruned`), "random" as the class itself.
    """
    stack = site.module
    name, _ = blocks_of(stack)
    cls = type(stack) if adapters_of(stack) is None else base_class(stack)
    meta = site.param(1).device.type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(zlib.crc32(f"{site.seed}/{site.name}".encode()))
        try:
            side = cls(config)
        except TypeError as error:
            raise ValueError(f"{cls.__name__} is not made from a config alone ({error}), as LST would") from None
    for key in _BEHIND:
        if hasattr(side, key):
            setattr(side, key, None)
    for key, child in list(side._modules.items()):
        if key == name or child is None or next(child.parameters(), None) is None:
            continue
        if "embed" in key or Site(key, child).kind != "norm":
            del side._modules[key]  # neither trained nor saved
            if takes_embeddings(stack):
                setattr(side, key, Skipped(adds=isinstance(child, nn.Embedding)))
            else:
                vars(side)[key] = stack._modules[key]
    values = pruned(stack, side, name, kept, config_of(stack), config) if init == "prune" and not meta else {}
    for path, p in list(side.named_parameters()):
        place, _, leaf = path.rpartition(".")
        value = values.get(path, p.detach())
        setattr(side.get_submodule(place), leaf, site.param(*p.shape, init=_copying(value)))
    return side.to(next(side.parameters()).device)


def _copying(value: Tensor) -> Any:
    return lambda t, _: t.copy_(value)


def cached(site: Site, cache: Any, config: Any, depth: int) -> Any:
    """The part of a key-value cache that belongs to a side stack: the layers behind the backbone's `depth` ones.

    They are added after the backbone's first call, and whatever is done to all layers, as by beam search, is done to
    them. RuntimeError for a cache that cannot grow.
    """
    if hasattr(cache, "self_attention_cache"):
        halves = (cache.self_attention_cache, cache.cross_attention_cache)
        return type(cache)(*(cached(site, half, config, depth) for half in halves))
    if type(cache).__name__ != "DynamicCache" or getattr(cache, "offloading", False):
        kind = f"{'offloaded ' if hasattr(cache, 'offloading') else ''}{type(cache).__name__}"
        raise RuntimeError(f"{site} gets a {kind}, to which LST cannot add layers; pass use_cache=False")
    own = type(cache)(config=config)
    if len(cache.layers) >= depth:  # else the stack writes nothing into this one
        cache.layers.extend(own.layers[len(cache.layers) - depth :])
        own.layers = cache.layers[depth : depth + len(own.layers)]
    return own


class Skipped(nn.Module):
    """In the place of a module before the blocks: 0 for an embedding, which adds something, else the input."""

    def __init__(self, adds: bool):
        super().__init__()
        self.adds = adds

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
        return torch.zeros(()) if self.adds else x
