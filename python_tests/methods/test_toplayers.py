"""TopLayers: which blocks are trained, and that nothing below them is in the autograd graph."""

import pytest
import torch
from models import FAMILIES, make

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

TRANSFORMERS = [f for f in FAMILIES if f != "mlp"]
LAST_BLOCK = {
    "bert": "bert.encoder.layer.1",
    "gpt2": "transformer.h.1",
    "llama": "model.layers.1",
    "t5": "decoder.block.1",
}


def test_count_of_gpt2_medium():
    """Two blocks of width d hold 2 (12 d^2 + 13 d) numbers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    pk.attach(model, pk.TopLayers(n=2))
    assert pk.counts(model).trainable == pk.counts(model).changed == 25_192_448


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_nothing_below_the_last_block_is_in_the_graph(family):
    case = make(family)
    pk.attach(case.model, pk.TopLayers(n=1))
    ((path, tuner),) = tuners(case.model, "default")
    assert path == LAST_BLOCK[family]
    inputs = []
    tuner.copy.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.extend((*args, *kwargs.values())), with_kwargs=True
    )
    assert case.loss(case.model.train()).requires_grad
    seen = [t for t in inputs if isinstance(t, torch.Tensor)]
    assert seen
    assert not any(t.requires_grad for t in seen)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_gradients_are_those_of_training_the_blocks_in_place(family):
    plain, case = make(family, torch.float64), make(family, torch.float64)
    plain.loss(plain.model).backward()
    pk.attach(case.model, pk.TopLayers(n=2))
    case.loss(case.model).backward()
    expected = {n: p.grad for n, p in plain.model.named_parameters()}
    for path, tuner in tuners(case.model, "default"):
        for name, p in tuner.copy.named_parameters():
            torch.testing.assert_close(p.grad, expected[f"{path}.{name}"])


def test_layers_and_targets_choose_among_which_blocks():
    case = make("t5")
    pk.attach(case.model, pk.TopLayers(n=1), targets=("encoder.block.?",))
    assert [path for path, _ in tuners(case.model, "default")] == ["encoder.block.1"]
    case = make("bert")
    pk.attach(case.model, pk.TopLayers(n=1), layers=[0])
    assert [path for path, _ in tuners(case.model, "default")] == ["bert.encoder.layer.0"]


def test_more_blocks_than_there_are_or_none():
    with pytest.raises(ValueError, match="n = 0; expected at least 1"):
        pk.TopLayers(n=0)
    case = make("bert")
    with pytest.raises(ValueError, match="n = 3; the targets are 2 blocks"):
        pk.attach(case.model, pk.TopLayers(n=3))
    assert not any("peft" in name for name, _ in case.model.named_modules())
