"""The seam of attention: transformers' AttentionInterface, by which keys and values can be put before a module's own.

While a tuner borrows it, the attention module's `config` is a stand-in that names our function as the implementation.
That function runs after rotation and cache, so what it adds is neither rotated nor cached, and it hands everything to
the implementation that the true config names: sdpa, the modelling file's own eager one, flash attention.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.method import Loan
from ..engine.roles import within
from ..engine.site import Site, adapters_of, base_class, base_modules
from ..engine.taps import noted
from ._keys import Prefix, apart, extended, heads

NAME = "peft_kernels"
_INTERFACE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
_files: dict[str, dict[str, Any]] = {}  # modelling file -> its globals


class Seam(NamedTuple):
    """The module that calls the AttentionInterface at a site, and the width of its keys."""

    module: nn.Module
    width: int
    hidden: int  # features of what the keys are made from
    file: str

    def loan(self, key: str) -> Loan:
        config = vars(self.module)["config"]
        return Loan(self.module, "config", config if isinstance(config, Config) else Config(config, key, self.file))


def seam(site: Site, method: str) -> Seam:
    """ValueError where attention does not go through transformers' AttentionInterface."""
    for _, module in base_modules(site.module):
        cls: Any = type(module) if adapters_of(module) is None else base_class(module)
        names = getattr(inspect.unwrap(cls.forward), "__globals__", {})
        if "config" in vars(module) and _INTERFACE in names and (keys := within(site, module, "k")):
            _files[cls.__module__] = names
            names[_INTERFACE].register(NAME, attention)
            return Seam(module, keys[0].n_out, keys[0].n_in, cls.__module__)
    raise ValueError(
        f"{method} at {site.name}: {type(site.module).__name__} does not call transformers' AttentionInterface, "
        "so nothing can be put before its keys; exclude it or choose another method"
    )


class Config:
    """The config of an attention module whose calls come to `attention`; in all else the true config."""

    _attn_implementation = NAME

    def __init__(self, config: Any, key: str, file: str):
        vars(self).update(true=config, key=key, file=file)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.true, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.true, name, value)

    def __reduce__(self) -> tuple:
        return _again, (self.true, self.key, self.file)


def _again(config: Any, key: str, file: str) -> Config:
    if file not in _files:
        _files[file] = vars(importlib.import_module(file))
        _files[file][_INTERFACE].register(NAME, attention)
    return Config(config, key, file)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The true implementation, on keys and values [rows, heads, n, d] with the noted prefixes before them.

    Attention weights that it returns are those of the module's own keys.
    """
    config = module.config
    if not isinstance(config, Config):
        raise ValueError(
            f"attention {NAME!r} is no implementation of its own; choose sdpa or eager and attach a method"
        )
    name, names = config.true._attn_implementation, _files[config.file]
    prefixes: tuple[Prefix, ...] = noted(config.key) or ()
    if name == "flex_attention" or kwargs.get("cache") is not None:
        raise ValueError(f"a prefix does not work with {name} here; choose sdpa, eager or flash_attention_2")
    length, lead = sum(prefix.k.shape[1] for prefix in prefixes), 0
    gates = [prefix.gate for prefix in prefixes if prefix.gate is not None]
    if gates:
        kwargs["scaling"] = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        query = torch.cat([query, *(query * gate[:, None].to(query.dtype) for gate in gates)], dim=-1)
    if prefixes:
        if "flash" in name:
            _check_flash(name, key.shape[2] + length, kwargs)
        n, causal = query.shape[2], kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if attention_mask is None and causal and n > 1 and name != "eager" and "flash" not in name:
            key, value = key[:, :, :n], value[:, :, :n]  # a static cache is longer than what is in it
            if all(prefix.mask is None for prefix in prefixes):
                lead = length  # so many queries of 0 in front keep the triangle, which is faster than a mask
                query = F.pad(query, (0, 0, lead, 0))
            else:
                attention_mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()[None, None]
        attention_mask = extended(attention_mask, prefixes, query, key, name)
        keys = [*(heads(prefix.k, key) for prefix in prefixes), key]
        values = [*(heads(prefix.v, value) for prefix in prefixes), value]
        if gates:
            keys, values = apart(keys, prefixes), apart(values, prefixes)
        key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        if kwargs.get("position_bias") is not None:  # of T5, by relative position: a prefix has none
            bias = kwargs["position_bias"]
            kwargs["position_bias"] = F.pad(bias[..., : key.shape[2] - length], (length, 0, lead, 0))
    if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):  # GPT-2's, beside the interface
        out, weights = module._upcast_and_reordered_attn(query, key, value, attention_mask)
    else:
        run = names[_INTERFACE].get_interface(name, names[_EAGER])
        seen = module if "flash" not in name else _Seen(module, config.true)
        out, weights = run(seen, query, key, value, attention_mask, **kwargs)
    out = out[:, lead:]
    if gates:
        own, *gated = out.unflatten(-1, (1 + len(gates), -1)).unbind(-2)
        out = sum((o * gate[:, :, None].to(o.dtype) for o, gate in zip(gated, gates, strict=True)), own)
    return out, weights[..., length:] if isinstance(weights, Tensor) else weights


def _check_flash(name: str, keys: int, kwargs: dict[str, Any]) -> None:
    """ValueError for what flash attention gets beside a mask and would apply to the prefix too."""
    window, position_ids = kwargs.get("sliding_window"), kwargs.pop("position_ids", None)
    if window is not None and keys > window:
        raise ValueError(f"{name} would slide its window of {window} over the prefix; choose sdpa or eager")
    packed = position_ids is not None and len(position_ids) == 1 and bool((position_ids.diff() != 1).any())
    if packed or kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(f"{name} on packed sequences has no place for a prefix; choose sdpa or eager")


class _Seen:
    """A module with its true config, whose implementation flash attention reads there."""

    def __init__(self, module: nn.Module, config: Any):
        self.module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)
