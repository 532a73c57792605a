"""Gates, and the recipes made of several methods: MAM, UniPELT, S4, Compacter beside others."""

import pytest
import torch
from models import close, make, perturb

import peft_kernels as pk

LONG = 4  # positions of padding on a side


def padded(case, left, right):
    """The inputs of an encoder or a decoder with more padding around the text, positions as in the text alone."""
    ids = case.inputs["input_ids"]
    front, behind = (ids.new_zeros(len(ids), n) for n in (left, right))
    wide = {"input_ids": torch.cat([front, ids, behind], 1)}
    wide["attention_mask"] = (torch.cat([front, torch.ones_like(ids), behind], 1) > 0).long()
    if case.model.config.model_type in ("bert", "gpt2", "llama"):
        wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if "decoder_input_ids" in case.inputs:
        wide["decoder_input_ids"] = case.inputs["decoder_input_ids"]
    return wide


def ignores_padding(family, method):
    case = make(family)
    pk.attach(case.model, method)
    perturb(case.model)
    text = case.model(**case.inputs, **({} if family == "t5" else {"use_cache": False})).logits
    for implementation in ("sdpa", "eager"):
        case.model.set_attn_implementation(implementation)
        for left, right in ((0, LONG), (LONG, 0), (2, 1)):
            if family == "bert" and left:
                continue  # the classifier reads the first position
            out = case.model(**padded(case, left, right)).logits
            own = out[:, left : left + 7] if family in ("gpt2", "llama") else out
            close(own, text)


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["input", "output"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_gate_ignores_padding(family, reads):
    ignores_padding(
        family, pk.Union(pk.Gated(pk.LoRA(rank=2), reads=reads), pk.Gated(pk.Pfeiffer(size=2), reads=reads))
    )
