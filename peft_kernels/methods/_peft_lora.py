"""LoRA with DoRA, LoKr and (IA)^3 in the files of Hugging Face PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._peft_layers import Layers, Member, Own, patterned, placed, ranked, width
from ._updates import unlike
from .dora import DoRA, DoRATuner
from .ia3 import IA3, IA3Tuner
from .lokr import LoKr, LoKrTuner
from .lora import LoRA, LoRATuner

# Fields of LoKrConfig with a field of ours of the same name and meaning.
_SAME = (
    "decompose_both",
    "decompose_factor",
    "use_effective_conv2d",
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
)
_LYCORIS = "lycoris"


class LoRAFiles(Layers):
    kind, title = "LORA", "LoRA"
    key = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?")

    def takes(self, method):
        return method.tuner in (LoRATuner, DoRATuner)

    def ours(self, config, own, where):
        if other := unlike(config, known=("use_dora", "modules_to_save")):
            raise ValueError(f"{where} is LORA of PEFT with {', '.join(other)}, which LoRA here has not")
        cls = DoRA if config.get("use_dora") else LoRA
        fields = ranked(config, ("r", "lora_alpha"), (8, 8), own, where)
        method = cls(dropout=config.get("lora_dropout", 0.0), rslora=config.get("use_rslora", False), **fields)
        names = {"A": "a", "B": "b", "magnitude_vector": "m"}
        found = {f"{path}.{names[key]}": t for path, some in own.items() for key, t in some.items()}
        # Of a convolution A is [r, in, *kernel] and B [out, r, 1, ...].
        return method, {key: t.flatten(1) if t.dim() > 1 else t for key, t in found.items()}

    def unfit(self, member):
        site = member.site
        if getattr(site.module, "groups", 1) > 1:
            return "has groups, with which PEFT's LoRA computes something else; exclude it"
        if site.rows is not None and isinstance(member.tuner, DoRATuner):
            return "is some rows of a layer, and PEFT has DoRA of whole ones; target it by a glob"
        return ""

    def theirs(self, own, where):
        values: Own = {}
        ranks, alphas = {}, {}
        kinds = {(m.method.tuner, m.method.rslora, m.method.dropout) for some in own.values() for m in some}
        if len(kinds) > 1:
            raise ValueError(f"{where} has LoRA of {len(kinds)} settings; PEFT takes one, but for ranks and alphas")
        for path, some in own.items():
            a, b, scale = _joined(some)
            ranks[path] = r = len(a)
            one = some[0]
            alphas[path] = one.method.alpha if len(some) == 1 else scale * (math.sqrt(r) if one.method.rslora else r)
            module = one.site.module
            if one.site.kind == "embedding":
                values[path] = {"lora_embedding_A": a, "lora_embedding_B": b}
                continue
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                kernel = module.kernel_size
                a, b = a.view(r, -1, *kernel), b.view(*b.shape, *[1] * len(kernel))
            values[path] = {"lora_A.weight": a, "lora_B.weight": b}
            if isinstance(one.tuner, DoRATuner):
                values[path]["lora_magnitude_vector"] = one.tuner.m.detach()
        (r, rank_pattern), (alpha, alpha_pattern) = patterned(ranks), patterned(alphas)
        ((tuner, rslora, dropout),) = kinds
        return values, {
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "use_rslora": rslora,
            "use_dora": tuner is DoRATuner,
            "bias": "none",
            "fan_in_fan_out": _transposed(own),
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
        }


def _joined(members: list[Member]) -> tuple[Tensor, Tensor, float]:
    """(A, B, scale) of a layer: where they are of some of its rows, B is zero in the others."""
    scale, whole = members[0].tuner.scale, width(members[0].site)
    a = torch.cat([m.tuner.a.detach() for m in members])
    b = [
        placed(m, m.tuner.b.detach() * (m.tuner.scale / scale), m.tuner.b.new_zeros(whole, m.tuner.b.shape[1]))
        for m in members
    ]
    return a, torch.cat(b, 1), scale


def _transposed(own: dict[str, list[Member]]) -> bool:
    """PEFT's word for transformers' Conv1D, of which it warns where the others are plain linears."""
    return {type(m.site.module).__name__ for some in own.values() for m in some if m.site.kind == "linear"} == {
        "Conv1D"
    }


class LoKrFiles(Layers):
    kind, title = "LOKR", "LoKr"
    key = re.compile(r"(.+)\.lokr_(w1|w2|w1_a|w1_b|w2_a|w2_b|t2)")

    def takes(self, method):
        return method.tuner is LoKrTuner

    def ours(self, config, own, where):
        for path, some in own.items():
            if (w2 := some.get("w2")) is not None and w2.dim() == 3:
                raise ValueError(f"{where} has w2 of a 1-d convolution at {path}, of which PEFT makes no product")
        method = LoKr(
            zero="w2" if config.get("init_weights") == _LYCORIS else "w1",
            **ranked(config, ("r", "alpha"), (LoKr.rank, LoKr.alpha), own, where),
            **{field: config[field] for field in _SAME if field in config},
        )
        return method, {f"{path}.{key}": t for path, some in own.items() for key, t in some.items()}

    def unfit(self, member):
        module = member.site.module
        if member.site.rows is not None:
            return "is some rows of a layer, and PEFT has LoKr of whole ones; target it by a glob"
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            return f"is a {type(module).__name__}, which PEFT's LoKr does not know; exclude it"
        if member.tuner.w2 is not None and member.tuner.w2.dim() == 3:
            return "has a full w2, of which PEFT makes no Kronecker product; give a smaller rank"
        return ""

    def theirs(self, own, where):
        members = {path: some[0] for path, some in own.items()}
        rest = {tuple(getattr(m.method, field) for field in (*_SAME, "zero")) for m in members.values()}
        if len(rest) > 1:
            raise ValueError(f"{where} has LoKr of {len(rest)} settings; PEFT takes one, but for ranks and alphas")
        method: LoKr = next(iter(members.values())).method
        (r, rank_pattern) = patterned({path: m.method.rank for path, m in members.items()})
        (alpha, alpha_pattern) = patterned({path: m.method.alpha for path, m in members.items()})
        return {
            path: {f"lokr_{key}": p.detach() for key, p in m.tuner.named_parameters()} for path, m in members.items()
        }, {
            "r": r,
            "alpha": alpha,
            **{field: getattr(method, field) for field in _SAME},
            "init_weights": _LYCORIS if method.zero == "w2" else True,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
        }


class IA3Files(Layers):
    kind, title = "IA3", "(IA)^3"
    key = re.compile(r"(.+)\.(ia3_l)")

    def takes(self, method):
        return method.tuner is IA3Tuner

    def ours(self, config: Mapping[str, Any], own: Own, where: str):
        listed = config.get("feedforward_modules") or ()
        listed = [listed] if isinstance(listed, str) else [f".*{re.escape(name)}" for name in listed]
        inputs = tuple(f"@{path}" for path in own if any(re.fullmatch(pattern, path) for pattern in listed))
        return IA3(feedforward=inputs), {f"{path}.l": some["ia3_l"].flatten() for path, some in own.items()}

    def unfit(self, member):
        if member.site.kind == "linear":
            return ""
        return f"is a {type(member.site.module).__name__}; PEFT's (IA)^3 is written here for linears; exclude it"

    def theirs(self, own, where):
        values: Own = {}
        inputs = []
        for path, some in own.items():
            l = some[0].tuner.l.detach()  # noqa: E741
            if some[0].tuner.on_input:
                inputs.append(path)
                values[path] = {"ia3_l": l[None]}
                continue
            l = l.new_ones(width(some[0].site))  # noqa: E741
            for m in some:
                l = placed(m, m.tuner.l.detach(), l)  # noqa: E741
            values[path] = {"ia3_l": l[:, None]}
        return values, {"feedforward_modules": inputs, "fan_in_fan_out": _transposed(own)}
