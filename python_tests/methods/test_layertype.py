"""LayerType: which modules its types are, and what training copies of them means."""

import pytest
import torch
from models import FAMILIES, close, make, perturb

import peft_kernels as pk
from peft_kernels.engine.attach import tuners


def meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def test_count_of_cross_attention_in_t5_base():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, d_kv=64)
    model = meta(T5ForConditionalGeneration, config)
    pk.attach(model, pk.LayerType(types=("cross.attn",)))
    assert pk.counts(model).trainable == 12 * 4 * 768**2 == 28_311_552


def test_count_of_layernorms_in_bert_base():
    """One after the embeddings and two in each of 12 layers, weight and bias."""
    from transformers import BertConfig, BertModel

    model = meta(BertModel, BertConfig())
    pk.attach(model, pk.LayerType())
    assert pk.counts(model).trainable == pk.counts(model).stored == 25 * 2 * 768 == 38_400


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mlp"])
@pytest.mark.parametrize("types", [("norm",), ("attn",), ("norm", "down")])
def test_gradients_are_those_of_training_the_modules_in_place(types, family):
    plain, case = make(family, torch.float64), make(family, torch.float64)
    plain.loss(plain.model).backward()
    pk.attach(case.model, pk.LayerType(types))
    case.loss(case.model).backward()
    expected = {n: p.grad for n, p in plain.model.named_parameters()}
    for path, tuner in tuners(case.model, "default"):
        for name, p in tuner.copy.named_parameters():
            torch.testing.assert_close(p.grad, expected[f"{path}.{name}"])


def test_types_are_the_targets_unless_others_are_given():
    assert pk.LayerType(types="attn") == pk.LayerType(types=["attn"]) == pk.LayerType(("attn",))
    assert (pk.LayerType("attn").roles, pk.LayerType().roles, pk.LayerType.roles) == (("attn",), ("norm",), ("norm",))

    def paths(*args, **kwargs):
        case = make("gpt2")
        pk.attach(case.model, *args, **kwargs)
        return [path for path, _ in tuners(case.model, "default")]

    assert paths(pk.LayerType(("norm",)), layers=[1]) == ["transformer.h.1.ln_1", "transformer.h.1.ln_2"]
    assert paths(pk.LayerType(("norm",)), targets="ln_f") == ["transformer.ln_f"]
    assert paths(pk.LayerType(("norm",)), exclude="h.*") == ["transformer.ln_f"]
    assert paths(pk.LayerType(("h.*.ln_2",))) == ["transformer.h.0.ln_2", "transformer.h.1.ln_2"]
    with pytest.raises(ValueError, match="'wing' matches nothing"):
        paths(pk.LayerType(("wing",)))


def test_a_type_inside_another_is_trained_once():
    case = make("bert")
    pk.attach(case.model, pk.LayerType(("attn", "norm")))
    paths = [path.removeprefix("bert.") for path, _ in tuners(case.model, "default")]
    layers = [f"encoder.layer.{i}.{part}" for i in range(2) for part in ("attention", "output.LayerNorm")]
    assert paths == ["embeddings.LayerNorm", *layers]


def test_a_tied_embedding_is_trained_apart_from_the_output_layer():
    case = make("gpt2")
    before = case.model.lm_head.weight.clone()
    pk.attach(case.model, pk.LayerType(("embed",)))
    perturb(case.model)
    assert case.model.lm_head.weight is case.model.transformer.wte.weight
    assert torch.equal(case.model.lm_head.weight, before)
    with pytest.raises(RuntimeError, match=r"wte shares its weight with lm_head\.weight"):
        pk.merge(case.model)
    with pk.disabled(case.model):
        close(case.call(case.model), make("gpt2").call(case.model))


def test_rows_of_a_fused_linear_are_no_module():
    case = make("gpt2")
    with pytest.raises(ValueError, match=r"q is some rows of transformer\.h\.0\.attn\.c_attn, .* as '\*\.c_attn'"):
        pk.attach(case.model, pk.LayerType(("q", "k", "v")))
    pk.attach(case.model, pk.LayerType(("*.attn.c_attn",)))
    assert pk.counts(case.model).trainable == 2 * (16 + 1) * 48
