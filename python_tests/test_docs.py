"""What the documents show is run: the README's Python, its generated tables, the CONTRIBUTING example."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from models import make

import peft_kernels as pk
from peft_kernels.engine import method as registry

ROOT = Path(__file__).parents[1]


def blocks(file, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)


def test_the_method_of_contributing_is_complete():
    (code,) = blocks("CONTRIBUTING.md", "python")
    try:
        names = {"Method": pk.Method, "Tuner": pk.Tuner, "dataclass": dataclass, "__name__": "shift"}
        exec(code, names)
        case = make("bert")
        base = case.call(case.model)
        pk.attach(case.model, names["Shift"]())
        torch.testing.assert_close(case.call(case.model), base)
        for p in case.model.parameters():
            if p.requires_grad:
                p.data.add_(0.3)
        adapted = case.call(case.model)
        assert not torch.allclose(adapted, base)
        pk.merge(case.model)
        torch.testing.assert_close(case.call(case.model), adapted)
    finally:
        registry._registry.pop("shift", None)
