"""Structured pruning: which units go, what the gates are, and the smaller model that pk.shrink makes of them."""

import pytest
import torch
from models import assert_same, close, make, perturb, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners


def own(model):
    return dict(tuners(model, "default"))


def pruned(family, **fields):
    case = make(family)
    pk.attach(case.model, pk.StructuredPruning(**{"score": "magnitude", **fields}))
    perturb(case.model)
    return case


def llama(**sizes):
    """Two key-value heads of two queries each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    common = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, vocab_size=50, head_dim=8)
    config = LlamaConfig(**{**common, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes})
    return LlamaForCausalLM(config).eval()


# -- which units are pruned -------------------------------------------------------------------------------------------


def test_the_gradient_score_is_that_of_a_gate():
    """Michel et al.: the mean over rows of the absolute gradient of the unit's gate; here by autograd, row by row."""
    case = make("bert")
    labels = torch.tensor([0, 2])
    batches = [{"input_ids": case.inputs["input_ids"][i : i + 1], "labels": labels[i : i + 1]} for i in range(2)]
    together = [{"input_ids": case.inputs["input_ids"], "labels": labels}]
    gates, handles = {}, []
    for path, module in case.model.named_modules():
        if path.endswith("output.dense"):
            heads = "attention" in path
            gates[path] = torch.ones(2 if heads else module.in_features, requires_grad=True)

            def gate(module, args, g=gates[path]):
                return (args[0] * g.repeat_interleave(module.in_features // len(g)),)

            handles.append(module.register_forward_pre_hook(gate))
    scores = {path: torch.zeros(len(g)) for path, g in gates.items()}
    for batch in batches:
        grads = torch.autograd.grad(case.model(**batch).loss, list(gates.values()))
        for path, g in zip(gates, grads, strict=True):
            scores[path] += g.abs()
    for handle in handles:
        handle.remove()
    pk.attach(case.model, pk.StructuredPruning(neurons=0.25, heads=0.5))
    with pytest.raises(RuntimeError, match="has pruned nothing yet"):
        pk.fit(case.model, together, progress=False)
    for given in (batches, together):
        pk.calibrate(case.model, given, progress=False)
        for path, tuner in own(case.model).items():
            k = round(len(scores[path]) * (0.5 if tuner.heads else 0.25))
            assert tuner.units.tolist() == sorted(scores[path].topk(k).indices.tolist())
            assert tuner.units.dtype == torch.int32 and torch.equal(tuner.gain, torch.ones(k))


def test_magnitudes_of_columns():
    case = make("bert")
    pk.attach(case.model, pk.StructuredPruning(score="magnitude", neurons=0.25, heads=0.5))
    for path, tuner in own(case.model).items():
        weight = case.model.get_submodule(path).weight
        norms = weight.square().sum(0).view(tuner.count, -1).sum(1)
        assert tuner.units.tolist() == sorted(norms.topk(len(tuner.units)).indices.tolist())
        assert tuner.count == (2 if "attention" in path else 24)


def test_a_global_choice_keeps_the_best_of_all_layers_and_one_of_each():
    method = pk.StructuredPruning(neurons=0.3, scope="global")
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 10))
    pk.attach(model, method, ("0", "1"))
    layers = list(own(model).values())
    method.prune(layers, [torch.tensor([9.0, 8, 7, 1, 1, 1, 1, 1, 1, 1]), torch.tensor([0.1, 0, 0, 0])])
    assert [t.units.tolist() for t in layers] == [[0, 1, 2], [0]]  # round(0.3 * 14) in all
    method.prune(layers, [torch.zeros(10), torch.zeros(4)])
    assert sum(len(t.units) for t in layers) == 4
    with pytest.raises(ValueError, match="NaN"):
        method.prune(layers, [torch.full((10,), torch.nan), torch.zeros(4)])


def test_what_is_not_pruned_is_not_touched():
    assert not [p for p in own(pruned("bert").model) if "attention" in p]
    assert all("attention" in p for p in own(pruned("bert", neurons=1.0, heads=0.5).model))
    with pytest.raises(ValueError, match="cannot tune"):
        pk.attach(make("bert").model, pk.StructuredPruning(neurons=1.0))
    for fields in ({"neurons": 0.0}, {"heads": 1.5}, {"score": "random"}, {"scope": "all"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            pk.StructuredPruning(**fields)


@pytest.mark.parametrize("wrong", [[0, 0], [1, 0], [0, 24], [-1, 0], [0], [0.0, 1.0]])
def test_units_that_cannot_be_are_refused(wrong, tmp_path):
    case = pruned("bert", neurons=0.1)
    where = pk.save(case.model, tmp_path / "a")
    values = load_file(where / "adapter_model.safetensors")
    assert {t.dtype for k, t in values.items() if k.endswith("units")} == {torch.int32}
    values[next(k for k in values if k.endswith("units"))] = torch.tensor(wrong)
    save_file(values, where / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="expected as many integers from 0 to 23"):
        pk.load(make("bert").model, where)


# -- the smaller model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "t5 gated", "phi3", "falcon", "bart"])
def test_the_smaller_model_computes_the_same(family, tmp_path):
    case = pruned(family)
    tuned, before = case.call(case.model), snapshot(case.model)
    smaller = pk.shrink(case.model)
    close(case.call(smaller), tuned)
    assert type(smaller) is type(make(family).model) and not smaller.training
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in make(family).model.parameters())
    smaller.save_pretrained(tmp_path / "m")
    close(case.call(type(smaller).from_pretrained(tmp_path / "m").eval()), tuned)
    assert_same(case.model, before)  # and the model that it was made of is as before
    assert torch.equal(case.call(case.model), tuned)
    perturb(case.model)
    close(case.call(smaller), tuned)  # they share no memory


@pytest.mark.parametrize("fields", [{"neurons": 1.0, "heads": 0.5}, {"neurons": 0.25, "heads": 0.5}])
def test_whole_groups_of_queries_go(fields, tmp_path):
    model, ids = llama(), torch.randint(3, 50, (2, 7))
    pk.attach(model, pk.StructuredPruning(score="magnitude", **fields))
    perturb(model)
    tuned = model(ids).logits
    smaller = pk.shrink(model)
    close(smaller(ids).logits, tuned)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (2, 1)
    assert smaller.config.head_dim == 8
    assert smaller.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    assert smaller.model.layers[0].self_attn.k_proj.weight.shape == (8, 32)
    assert smaller.config.intermediate_size == round(24 * fields["neurons"])
    smaller.save_pretrained(tmp_path / "m")
    close(type(smaller).from_pretrained(tmp_path / "m").eval()(ids).logits, tuned)
    smaller.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_what_lies_below_is_pruned_with_the_weights():
    case = make("llama")
    pk.attach(case.model, pk.LoRA(rank=2), ("up", "down", "q"), name="lora")
    perturb(case.model, "lora")
    pk.attach(case.model, pk.StructuredPruning(score="magnitude"))
    perturb(case.model)
    close(case.call(pk.shrink(case.model)), case.call(case.model))


def test_bfloat16_stays_bfloat16():
    model = llama().bfloat16()
    pk.attach(model, pk.StructuredPruning(score="magnitude"))
    smaller = pk.shrink(model.train())
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert smaller.training and all(p.requires_grad for p in smaller.parameters())


def test_what_cannot_be_said_is_refused_and_nothing_changes():
    def refused(case, message, error=ValueError):
        before = snapshot(case.model)
        with pytest.raises(error, match=message):
            pk.shrink(case.model)
        assert_same(case.model, before)

    for family in ("bert", "gpt2", "t5"):  # the width of a head follows from their number, or all layers share biases
        refused(pruned(family, neurons=1.0, heads=0.5), "cannot say what is left")
    refused(pruned("bloom"), "cannot say what is left")
    case = make("bert")
    pk.attach(case.model, pk.StructuredPruning(score="magnitude"), layers=0)
    refused(case, "cannot say what is left")
    case = make("bert")
    method = pk.StructuredPruning(scope="global")
    pk.attach(case.model, method)
    layers = list(own(case.model).values())
    method.prune(layers, [torch.arange(24.0), torch.ones(24)])
    refused(case, "one number for all; prune with scope='layer'")
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2))
    refused(case, "nothing is pruned by default")
    case = make("mlp")
    pk.attach(case.model, pk.StructuredPruning(score="magnitude"), ("second",))
    refused(case, "has no transformers config")
    case = make("llama")
    pk.attach(case.model, pk.BitFit(), name="biases")
    pk.attach(case.model, pk.StructuredPruning(score="magnitude"))
    refused(case, "no place for .*bias, which a merged adapter has made")
    case = pk.quantize(make("llama").model, "nf4")
    pk.attach(case, pk.StructuredPruning(score="magnitude"))
    with pytest.raises(ValueError, match="is quantised"):
        pk.shrink(case)
