"""Several adapters on one batch: the blocks below the first tuned one run once, and nothing else changes."""

import pytest
import torch
from models import make, perturb

import peft_kernels as pk
from peft_kernels.engine.roles import resolve


def two_tasks(family):
    case = make(family)
    for name in ("a", "b"):
        pk.attach(case.model, pk.LoRA(rank=2), ("q", "v"), layers=-1, name=name)
        perturb(case.model, name)
    with torch.no_grad():
        for p in case.model.parameters():
            if p.requires_grad:
                p.mul_(torch.rand(()))
    blocks = [site.module for site in resolve(case.model, ("block",))]
    return case, blocks


def outputs(case, **kwargs):
    found = {}
    for name in ("a", "b"):
        out = pk.set_active(case.model, name)(**case.inputs, **kwargs)
        found[name] = out.logits
    return found


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "t5"])
def test_the_trunk_runs_once_and_the_numbers_stay(family):
    case, blocks = two_tasks(family)
    kwargs = {} if family in ("bert", "vit") else {"use_cache": False}
    expected = outputs(case, **kwargs)
    runs = []
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    inner = [m for m in blocks[0].modules() if isinstance(m, torch.nn.Linear) or hasattr(m, "nf")]
    inner[0].register_forward_hook(lambda *_: runs.append("linear"))
    with pk.shared_trunk(case.model) as shared:
        ours = outputs(case, **kwargs)
    assert shared == 1
    assert runs.count("linear") == 1
    assert runs.count(len(blocks) - 1) == 2
    for name, out in expected.items():
        assert torch.equal(ours[name], out)
    assert not any("forward" in vars(block) for block in blocks)
    assert not torch.equal(ours["a"], ours["b"])
    outputs(case, **kwargs)
    assert runs.count("linear") == 3


def test_other_arguments_are_computed_anew_and_gradients_are_those_without():
    case, _ = two_tasks("bert")
    grads = []
    for share in (False, True):
        case.model.zero_grad()
        if share:
            with pk.shared_trunk(case.model):
                losses = [case.loss(pk.set_active(case.model, name)) for name in ("a", "b")]
                flipped = case.model(case.inputs["input_ids"].flip(0)).logits
            assert torch.equal(flipped, case.model(case.inputs["input_ids"].flip(0)).logits)
        else:
            losses = [case.loss(pk.set_active(case.model, name)) for name in ("a", "b")]
        sum(losses).backward()
        grads.append({n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    for n, g in grads[0].items():
        assert torch.equal(grads[1][n], g)


def test_what_cannot_be_shared_says_so():
    case = make("llama")
    pk.attach(case.model, pk.LoRA(rank=2))
    with pk.shared_trunk(case.model) as shared:
        assert shared == 0
    pk.detach(case.model)
    pk.attach(case.model, pk.LoRA(rank=2), layers=-1)
    with pk.shared_trunk(case.model), pytest.raises(RuntimeError, match="pass use_cache=False"):
        case.model(**case.inputs, use_cache=True)
    with pk.route(case.model, ["default"]), pytest.raises(RuntimeError, match="shared_trunk inside pk.route"):
        pk.shared_trunk(case.model).__enter__()
