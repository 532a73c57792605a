"""Adapters in the files of Hugging Face PEFT: LoKr, and beside it modules that are trained whole.

adapter_config.json          the fields of its LoKrConfig
adapter_model.safetensors    base_model.model.<path>.lokr_<factor>    base_model.model.<path>.<parameter>
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..engine.attach import Adapter, chosen_sites, state_of, tuners
from ..engine.method import Part, Replica
from ..engine.site import base_modules
from ..engine.store import CONFIG, attach_filled, place_of, read_json, read_weights, tensors, write
from ._updates import at_path
from .full import Head
from .lokr import LoKr, LoKrTuner

_PREFIX = "base_model.model."
_KEY = re.compile(r"(.+)\.lokr_(w1|w2|w1_a|w1_b|w2_a|w2_b|t2)")
# Fields of LoKrConfig with a field of ours of the same name and meaning.
_SAME = (
    "alpha",
    "decompose_both",
    "decompose_factor",
    "use_effective_conv2d",
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
)
_LYCORIS = "lycoris"


def load(
    model: nn.Module, directory: str | os.PathLike, name: str | None = None, *, trainable: bool = False
) -> nn.Module:
    """Attaches a LoKr adapter saved by Hugging Face PEFT, named "default" unless `name` says otherwise.

    directory: of adapter_config.json and adapter_model.safetensors, or the one above it, in a directory called `name`.
    What PEFT trained whole (modules_to_save) is attached too. Files and errors are treated as by `pk.load`; ValueError
    also for other kinds of PEFT, and for a full w2 of a 1-d convolution, of which PEFT computes no Kronecker product.
    """
    directory = place_of(Path(directory), name)
    config, digest = read_json(directory / CONFIG)
    if "peft_type" not in config:
        raise ValueError(f"{directory / CONFIG} was not written by Hugging Face PEFT; pk.load reads what pk.save wrote")
    adapter, values = _ours(config, read_weights(directory, digest), str(directory))
    return attach_filled(model, "default" if name is None else name, adapter, values, directory, trainable)


def save(model: nn.Module, directory: str | os.PathLike, name: str | None = None, *, force: bool = False) -> Path:
    """Writes a LoKr adapter as Hugging Face PEFT does, for its PeftModel.from_pretrained, and returns the directory.

    Arguments and errors are those of `pk.save`; ValueError also for what these files cannot hold: other methods, some
    rows of a fused linear, layers that PEFT's LoKr does not know.
    """
    return write(model, directory, name, force, lambda n: _theirs(model, n))


# -- reading ----------------------------------------------------------------------------------------------------------


def _ours(config: Mapping[str, Any], given: dict[str, Tensor], where: str) -> tuple[Adapter, dict[str, Tensor]]:
    """(what to attach, its tensors under our keys)."""
    kind = str(getattr(config["peft_type"], "value", config["peft_type"]))
    if kind != "LOKR":
        known = "; a pk.AdapterBank reads it" if kind == "LORA" else ""
        raise ValueError(f"{where} is {kind} of PEFT; expected LOKR{known}")
    values: dict[str, Tensor] = {}
    paths: dict[str, None] = {}
    whole: dict[str, None] = {}
    for key, value in given.items():
        body = key.removeprefix(_PREFIX)
        if match := _KEY.fullmatch(body):
            path, factor = match.groups()
            if factor == "w2" and value.dim() == 3:
                raise ValueError(f"{where} has {key} of a 1-d convolution, of which PEFT makes no Kronecker product")
            paths[path], values[f"{path}.{factor}"] = None, value
        elif path := _whole(body, config.get("modules_to_save") or ()):
            whole[path], values[f"{path}.copy.{body[len(path) + 1 :]}"] = None, value
        else:
            raise ValueError(f"{where} has {key}, which is neither LoKr nor of modules_to_save")
    if not paths:
        raise ValueError(f"{where} has no tensors of LoKr; expected {_PREFIX}<path>.lokr_w1 and others")
    fields = {field: config[field] for field in _SAME if field in config}
    rank, alpha = config.get("r", LoKr.rank), fields.setdefault("alpha", LoKr.alpha)
    ranks = {f"@{path}": at_path(path, rank, config.get("rank_pattern"), where) for path in paths}
    alphas = {f"@{path}": at_path(path, alpha, config.get("alpha_pattern"), where) for path in paths}
    method = LoKr(
        rank=rank,
        zero="w2" if config.get("init_weights") == _LYCORIS else "w1",
        rank_pattern={path: r for path, r in ranks.items() if r != rank},
        alpha_pattern={path: a for path, a in alphas.items() if a != alpha},
        **fields,
    )
    parts = [Part(method, tuple(ranks))]
    if whole:
        parts.append(Part(Head(), tuple(f"@{path}" for path in whole)))
    return Adapter(parts, 0), values


def _whole(key: str, names: Any) -> str | None:
    """The path of the module in modules_to_save that a key is of."""
    parts = key.split(".")
    starts = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in starts if any(path == n or path.endswith(f".{n}") for n in names)), None)


# -- writing ----------------------------------------------------------------------------------------------------------


def _theirs(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors under PEFT's keys, what its adapter_config.json says) of an adapter of ours."""
    adapter, made = state_of(model).adapters[name], dict(tuners(model, name))
    own: dict[str, LoKr] = {}
    whole: list[str] = []
    levels = set()
    for level, method, site in chosen_sites(model, adapter):
        tuner = made[site.name]
        if isinstance(tuner, Replica) and site.name:
            whole.append(site.name)
            continue
        if not isinstance(tuner, LoKrTuner) or not isinstance(method, LoKr):
            raise ValueError(f"{name!r} has {method.key} at {site}; PEFT's files take LoKr of whole layers")
        if not isinstance(site.module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            raise ValueError(f"{site} is a {type(site.module).__name__}, which PEFT's LoKr does not know; exclude it")
        if tuner.w2 is not None and tuner.w2.dim() == 3:
            raise ValueError(f"{site} has a full w2, of which PEFT makes no Kronecker product; give a smaller rank")
        levels.add(level)
        own[site.name] = method
    if len(levels) != 1:
        raise ValueError(f"{name!r} has {len(levels)} parts of LoKr; PEFT's files take one")
    method = adapter.expanded()[levels.pop()][0].method
    assert isinstance(method, LoKr)
    values = {_theirs_of(key, own, whole): value for key, value in tensors(model, name).items()}
    return values, {
        "peft_type": "LOKR",
        "task_type": None,
        "base_model_name_or_path": str(getattr(getattr(model, "config", None), "name_or_path", "")) or None,
        "inference_mode": True,
        "target_modules": _targets(model, list(own)),
        "modules_to_save": whole or None,
        "r": method.rank,
        **{field: getattr(method, field) for field in _SAME},
        "init_weights": _LYCORIS if method.zero == "w2" else True,
        "rank_pattern": {f"^{re.escape(p)}": m.rank for p, m in own.items() if m.rank != method.rank},
        "alpha_pattern": {f"^{re.escape(p)}": m.alpha for p, m in own.items() if m.alpha != method.alpha},
    }


def _theirs_of(key: str, own: Mapping[str, LoKr], whole: list[str]) -> str:
    path, _, factor = key.rpartition(".")
    if path in own:
        return f"{_PREFIX}{path}.lokr_{factor}"
    path = next(path for path in whole if key.startswith(f"{path}.copy."))
    return f"{_PREFIX}{path}.{key.removeprefix(f'{path}.copy.')}"


def _targets(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The paths, or where PEFT, which looks at the ends of paths, would find others too, an expression for them."""
    others = [path for path, _ in base_modules(model) if path not in paths]
    if any(other.endswith(f".{path}") for other in others for path in paths):
        return "|".join(map(re.escape, paths))
    return paths
