"""(IA)^3 in the files of Hugging Face PEFT."""

from __future__ import annotations

import re

from ._peft_layers import Layers, Own, conv1d, placed, width
from .ia3 import IA3, IA3Tuner


class IA3Files(Layers):
    kind, title = "IA3", "(IA)^3"
    key = re.compile(r"(.+)\.(ia3_l)")
    tuners = (IA3Tuner,)

    def ours(self, config, own, where):
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
            l = some[0].tuner.l.detach()
            if some[0].tuner.on_input:
                inputs.append(path)
                values[path] = {"ia3_l": l[None]}
                continue
            l = l.new_ones(width(some[0].site))
            for m in some:
                l = placed(m, m.tuner.l.detach(), l)
            values[path] = {"ia3_l": l[:, None]}
        return values, {"feedforward_modules": inputs, "fan_in_fan_out": conv1d(own)}
