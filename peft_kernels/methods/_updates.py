"""LoRA adapters as what they add to which linear layers: from our files and Hugging Face PEFT's, or from a model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..engine.attach import Adapter, chosen_sites, state_of
from ..engine.site import Rows
from ..engine.store import CONFIG, from_config, place_of, read_json, read_weights, tensors
from .lora import LoRA, LoRATuner


class Update(NamedTuple):
    """scale * b @ a, added to the weight of the module at `path` or to some of its rows.  a [r, in]   b [out, r]"""

    path: str
    rows: Rows | None
    a: Tensor
    b: Tensor
    scale: float


_ELSE = "attach it with pk.load, and pk.route takes it beside a bank's"


def updates(model: nn.Module, name: str, source: Any, config: Mapping[str, Any] | None) -> tuple[list[Update], str]:
    """(what the adapter adds to `model`, where it comes from); arguments and errors are those of AdapterBank.load."""
    if isinstance(source, nn.Module):
        state = state_of(source)
        known = [n for n in state.adapters if state.bank is None or n != state.bank.name]
        chosen = name if name in known else known[0] if len(known) == 1 else None
        if chosen is None:
            some = ", ".join(known) or "none"
            raise ValueError(
                f"load {name!r}: the model has the adapters {some}; expected one of that name, or a single one"
            )
        where = f"adapter {chosen!r} of the {type(source).__name__}"
        return list(_ours(model, state.adapters[chosen], tensors(source, chosen), where)), where
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("load: tensors by name need `config`; expected what adapter_config.json holds")
        values, where = dict(source), f"what was given for {name!r}"
    elif not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"load {name!r}: got a {type(source).__name__}; expected a directory, a model or tensors by name"
        )
    else:
        directory = place_of(Path(source), name)
        config, digest = read_json(directory / CONFIG)
        values, where = read_weights(directory, digest), str(directory)
    if "peft_type" in config:
        return list(_peft(config, values, where)), where
    return list(_ours(model, from_config(config, where)[0], values, where)), where


def _ours(model: nn.Module, adapter: Adapter, values: dict[str, Tensor], where: str) -> Iterator[Update]:
    """Under the keys of attached tuners: the module, which of several parts that meet there, the role of some rows."""
    chosen = chosen_sites(model, adapter)
    parts: dict[str, set[int]] = {}
    for number, method, site in chosen:
        if method.tuner is not LoRATuner or site.kind != "linear":
            raise ValueError(
                f"{where} has {method.key} at {site.name} ({site.kind}); a bank takes LoRA of linears; {_ELSE}"
            )
        parts.setdefault(site.name, set()).add(number)
    left = dict(values)
    for number, method, site in chosen:
        assert isinstance(method, LoRA)
        here = sorted(parts[site.name])
        level = [str(here.index(number))] if len(here) > 1 else []
        key = ".".join([site.name, *level, *([site.role] if site.rows else []), ""])
        a, b = left.pop(f"{key}a", None), left.pop(f"{key}b", None)
        if a is None or b is None:
            raise ValueError(f"{where} does not fit this model: it lacks {key}a or b; was it another model?")
        yield Update(site.name, site.rows, a, b, method.scale)
    if left:
        raise ValueError(f"{where} does not fit this model: it has unknown {min(left)}; was it another model?")


# -- Hugging Face PEFT ------------------------------------------------------------------------------------------------

# What makes of LoRA another function, or of the base another model, where it is set.
_OTHER = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
    "alora_invocation_tokens",
    "monteclora_config",
    "kasa_config",
    "velora_config",
]
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def unlike(config: Mapping[str, Any], known: Iterable[str] = ()) -> list[str]:
    """What a configuration of LORA has that makes it more than LoRA of the base as it is, but for what is known."""
    other = [key for key in _OTHER if config.get(key) and key not in known]
    if config.get("bias", "none") != "none":
        other.append(f"bias={config['bias']!r}")
    if str(config.get("init_lora_weights", True)).lower().startswith(_MOVES_THE_BASE):
        other.append(f"init_lora_weights={config['init_lora_weights']!r}")
    return other


def _peft(config: Mapping[str, Any], values: dict[str, Tensor], where: str) -> Iterator[Update]:
    kind, other = str(getattr(config["peft_type"], "value", config["peft_type"])), unlike(config)
    if kind != "LORA" or other:
        raise ValueError(
            f"{where} is {kind} of PEFT{' with ' if other else ''}{', '.join(other)}; a bank takes plain LORA"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in values.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{where} has {key}, which is no LoRA of a linear layer; a bank takes those alone")
        factors.setdefault(match[1], {})[match[2]] = value
    for path, pair in factors.items():
        if len(pair) < 2:
            raise ValueError(f"{where} has lora_{min(pair)} of {path} alone; expected A and B")
        rank = at_path(path, config.get("r"), config.get("rank_pattern"), where)
        alpha = at_path(path, config.get("lora_alpha"), config.get("alpha_pattern"), where)
        if len(pair["A"]) != rank:
            raise ValueError(f"{where} has {len(pair['A'])} ranks at {path}, where its config says {rank}")
        yield Update(path, None, pair["A"], pair["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def at_path(path: str, value: Any, pattern: Mapping[str, Any] | None, where: str) -> Any:
    """The value of the first pattern, a regular expression, that matches the end of the path; or the general one."""
    for key, own in (pattern or {}).items():
        try:
            matched = re.fullmatch(rf"(.*\.)?({key})", path)
        except re.error as error:
            raise ValueError(f"{where}: the pattern {key!r} is no regular expression ({error})") from None
        if matched:
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"{where} gives rank or alpha {value!r} at {path}; expected a positive number")
    return value
