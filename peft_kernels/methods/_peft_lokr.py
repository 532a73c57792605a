"""LoKr in the files of Hugging Face PEFT."""

from __future__ import annotations

import re

from torch import nn

from ._peft_layers import Layers, patterned, ranked
from .lokr import LoKr, LoKrTuner

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


class LoKrFiles(Layers):
    kind, title = "LOKR", "LoKr"
    key = re.compile(r"(.+)\.lokr_(w1|w2|w1_a|w1_b|w2_a|w2_b|t2)")
    tuners = (LoKrTuner,)

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
