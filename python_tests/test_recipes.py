"""Recipes: several methods as one adapter, by target, by layer, behind a gate."""

import json

import pytest
import torch
from models import assert_same, close, make, perturb, snapshot

import peft_kernels as pk
from peft_kernels.engine.attach import tuners


def paths(model, name="default"):
    return {path: type(tuner).__name__ for path, tuner in tuners(model, name)}


def test_members_keep_their_own_targets_and_stack_where_they_meet():
    model = make("bert").model
    recipe = pk.Union(pk.LoRA(rank=2), pk.at("up", pk.LoRA(rank=3), layers=0), pk.IA3())
    pk.attach(model, recipe, train=("head",))
    found = paths(model)
    layer = "bert.encoder.layer.{}."
    assert found[layer.format(0) + "attention.self.query"] == "LoRATuner"
    assert found[layer.format(1) + "attention.self.value"] == "Stack"
    assert found[layer.format(0) + "intermediate.dense"] == "LoRATuner"
    assert layer.format(1) + "intermediate.dense" not in found
    assert found["classifier"] == "HeadTuner"
    narrow = make("bert").model
    pk.attach(narrow, recipe, ("v",), layers=[0])
    assert set(paths(narrow)) == {layer.format(0) + "attention.self.value", layer.format(0) + "intermediate.dense"}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_stack_merges_exactly(family, tmp_path):
    """LoRA, LoRA on rows of it, (IA)^3 and BitFit on the same layers: forward, merge, file and detach."""
    case = make(family, torch.float64)
    before, plain = snapshot(case.model), case.call(case.model)
    recipe = pk.Union(pk.LoRA(rank=2), pk.at(("q", "v"), pk.LoRA(rank=1)), pk.IA3(), pk.BitFit())
    pk.attach(case.model, recipe)
    close(case.call(case.model), plain, torch.float64)
    perturb(case.model)
    adapted = case.call(case.model)
    params = [p for p in case.model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in params)
    case.loss(case.model).backward()
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in params) >= 0.8 * len(params)
    pk.merge(case.model)
    close(case.call(case.model), adapted, torch.float64)
    pk.unmerge(case.model)
    assert_same(case.model, before)
    fresh = make(family, torch.float64)
    pk.load(fresh.model, pk.save(case.model, tmp_path / "a"))
    assert torch.equal(fresh.call(fresh.model), adapted)
    pk.detach(case.model)
    assert torch.equal(case.call(case.model), plain)


def test_a_union_equals_its_members_attached_one_by_one():
    def run(*methods):
        case = make("llama", torch.float64)
        for i, method in enumerate(methods):
            pk.attach(case.model, method, name=f"a{i}")
            perturb(case.model, f"a{i}")
        return case.model, case.call(case.model)

    members = (pk.LoRA(rank=2), pk.IA3())
    single, expected = run(*members)
    case = make("llama", torch.float64)
    pk.attach(case.model, pk.Union(*members))
    for i in range(2):  # the same numbers
        for path, tuner in tuners(single, f"a{i}"):
            own = dict(tuners(case.model, "default"))[path]
            own = own._modules[str(i)] if type(own).__name__ == "Stack" else own
            own.load_state_dict(tuner.state_dict())
    close(case.call(case.model), expected, torch.float64)
    assert pk.counts(case.model).trainable == pk.counts(single).trainable


def test_methods_on_a_trained_head():
    """The stack of both replaces the head, like a trained head alone: several such adapters may be attached."""
    case = make("bert", torch.float64)
    recipe, single = pk.Union(pk.Head(), pk.at("head", pk.LoRA(rank=2))), []
    for name in ("a", "b"):
        pk.attach(case.model, recipe, name=name)
        perturb(case.model, name)
        pk.set_active(case.model, [name])
        single.append(case.call(case.model))
    assert paths(case.model, "a") == {"classifier": "Stack"}
    with pk.route(case.model, ["a", "b"]):
        out = case.call(case.model)
    close(out[0], single[0][0], torch.float64)
    close(out[1], single[1][1], torch.float64)
    pk.merge(case.model, "b")
    close(case.call(case.model), single[1], torch.float64)


def test_by_layer():
    model = make("llama").model
    pk.attach(model, pk.ByLayer({0: pk.LoRA(rank=2), (-1,): pk.at("up", pk.LoRA(rank=1))}))
    assert set(paths(model)) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    }
    with pytest.raises(ValueError, match=r"layers \[7\] do not exist"):
        pk.attach(make("llama").model, pk.ByLayer({7: pk.LoRA()}))


def test_gate():
    """Shut, the model is the base; open, it is the gated method; in between, one number per row of the batch."""
    case = make("bert", torch.float64)
    base = case.call(case.model)
    pk.attach(case.model, pk.LoRA(rank=2), name="plain")
    perturb(case.model, "plain")
    full = case.call(case.model)
    pk.set_active(case.model, [])
    pk.attach(case.model, pk.Gated(pk.LoRA(rank=2)), name="gated")
    for (_, gated), (_, plain) in zip(tuners(case.model, "gated"), tuners(case.model, "plain"), strict=True):
        gated.inner.load_state_dict(plain.state_dict())

    def bias(value):
        for _, tuner in tuners(case.model, "gated"):
            tuner.b.data.fill_(value)
        return case.call(case.model)

    close(bias(-60.0), base, torch.float64)
    close(bias(60.0), full, torch.float64)
    linear = case.model.bert.encoder.layer[0].attention.self.query
    tuner = linear.peft.tuners["gated"]
    linear.register_forward_hook(lambda module, args, y: calls.append((args[0], y)))
    calls: list = []
    bias(0.3)
    ((x, y),) = calls
    gate = torch.sigmoid(x @ tuner.w + tuner.b).mean(1)[:, None, None]
    delta = x @ tuner.inner.a.T @ tuner.inner.b.T * tuner.inner.scale
    close(y, torch.nn.functional.linear(x, linear.weight, linear.bias) + gate * delta, torch.float64)
    with pytest.raises(RuntimeError, match="call the model, not the module alone"):
        linear(x)
    with pytest.raises(RuntimeError, match="cannot be merged"):
        pk.merge(case.model, "gated")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_gated_head(family):
    """One number per row of the batch, also where the head takes a sequence and returns none (RoBERTa)."""
    case = make(family, torch.float64)
    base = case.call(case.model)
    pk.attach(case.model, pk.Head(), name="plain")
    perturb(case.model, "plain")
    full = case.call(case.model)
    pk.set_active(case.model, [])
    pk.attach(case.model, pk.Gated(pk.Head()), name="gated")
    ((_, gated),), ((_, plain),) = tuners(case.model, "gated"), tuners(case.model, "plain")
    gated.inner.load_state_dict(plain.state_dict())
    for bias, expected in ((60.0, full), (-60.0, base)):
        gated.b.data.fill_(bias)
        close(case.call(case.model), expected, torch.float64)
    gated.b.data.zero_()
    gated.w.data.zero_()
    close(case.call(case.model), (base + full) / 2, torch.float64)


def test_a_gate_around_modules_that_fill_a_cache_is_refused():
    case = make("gpt2")
    pk.attach(case.model, pk.Gated(pk.TopLayers(n=1)))
    with pytest.raises(RuntimeError, match="two modules would fill; pass use_cache=False"):
        case.call(case.model)
    assert case.model(**case.inputs, use_cache=False).logits.shape == (2, 7, 50)


def test_recipes_go_through_json():
    nested = pk.Union(
        pk.at("q", pk.Gated(pk.LoRA(rank=3)), exclude=("*.0.*",)), pk.ByLayer({0: pk.IA3(), (1, 2): pk.LoRA()})
    )
    assert pk.Method.from_json(json.loads(json.dumps(nested.to_json()))) == nested


def test_bad_recipes():
    for make_it, message in (
        (lambda: pk.Union(), "a recipe of nothing"),
        (lambda: pk.ByLayer({}), "a recipe of nothing"),
        (lambda: pk.Union(pk.LoRA), "expected a method instance"),
        (lambda: pk.at("q", "lora"), "expected a method instance"),
        (lambda: pk.Gated(pk.Union(pk.LoRA())), "gate each member"),
        (lambda: pk.ByLayer({"first": pk.LoRA()}), "expected layer numbers"),
        (lambda: pk.Method.from_json({"method": "lora", "ranks": 3}), "no field"),
        (lambda: pk.attach(make("mlp").model, pk.Union(pk.LoRA())), "known model types"),
        (lambda: pk.attach(make("bert").model, pk.Gated(pk.BitFit()), ("norm",)), "cannot tune"),
    ):
        with pytest.raises(ValueError, match=message):
            make_it()


def test_the_learning_rate_is_that_of_each_member():
    from peft_kernels.engine.fit import param_groups

    model = make("bert").model
    pk.attach(model, pk.Union(pk.LoRA(rank=2), pk.IA3()), train=("head",))
    assert {group["lr"] for group in param_groups(model)} == {pk.LoRA.lr, pk.IA3.lr, pk.Head.lr}
    assert {group["lr"] for group in param_groups(model, 0.5)} == {0.5, pk.Head.lr}
    trained = sum(p.numel() for group in param_groups(model) for p in group["params"])
    assert trained == pk.counts(model).trainable
