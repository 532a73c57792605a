"""LoRA and DoRA in the files of Hugging Face PEFT."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from ._peft_layers import Layers, Member, Own, conv1d, patterned, placed, ranked, width
from ._updates import unlike
from .dora import DoRA, DoRATuner
from .lora import LoRA, LoRATuner


class LoRAFiles(Layers):
    kind, title = "LORA", "LoRA"
    key = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?")
    tuners = (LoRATuner, DoRATuner)

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
            "fan_in_fan_out": conv1d(own),
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
