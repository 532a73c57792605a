"""FAR: nodes by how far a priming moves them or by gradients, rows that replace rows, breaks in either phase."""

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, close, make, perturb, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from toys import fitted, signs

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.life import timeline

TARGETS = ("first", "second")


def nodes(model):
    return [tuner for _, tuner in tuners(model, "default") if hasattr(tuner, "rows")]


def test_the_nodes_that_a_priming_moves_most_go_on_from_there():
    """Against plain torch: the first phase is AdamW on copies of the weights and their biases."""
    seen = {}

    def spy(self, found, phase, real=pk.FAR.enter):
        seen[f"before {phase}"] = [t.wt.detach().clone() for t in found]
        real(self, found, phase)
        seen[phase] = [t.wt.detach().clone() for t in found]

    class Spied(pk.FAR):
        enter = spy

    model, log = fitted(Spied(ratio=0.2, prime=0.5))
    phases = [(row["phase"], row["step"]) for row in log if "phase" in row]
    assert phases == [("prime", 1), ("train", 1), ("train", 6)]  # the second is the head's own
    assert [v.shape for v in seen["prime"]] == [(20, 12), (12, 20)] and not any(v.any() for v in seen["prime"])

    plain = make("mlp").model
    tuned = [plain.first.weight, plain.first.bias, plain.second.weight, plain.out.weight, plain.out.bias]
    before = [p.detach().clone() for p in tuned]
    groups = [{"params": tuned[:3], "lr": 1e-2}, {"params": tuned[3:], "lr": pk.Head.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step, (x, y) in enumerate(signs()):
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_(tuned, 1.0)
        for group, lr in zip(optimizer.param_groups, (1e-2, pk.Head.lr), strict=True):
            group["lr"] = lr * min(step + 1, (5 - step) / 4)
        optimizer.step()
    for tuner, primed, i in zip(nodes(model), seen["before train"], (0, 2), strict=True):
        change = (tuned[i] - before[i]).detach()
        torch.testing.assert_close(primed, change, atol=1e-5, rtol=1e-4)
        h = round(0.2 * len(change))
        assert tuner.rows.tolist() == sorted(change.abs().sum(1).topk(h).indices.tolist())
        assert tuner.rows.dtype == torch.int32
    for tuner, primed, start in zip(nodes(model), seen["before train"], seen["train"], strict=True):
        assert torch.equal(start, primed[tuner.rows]) and not torch.equal(tuner.wt, start)
    first, second = nodes(model)
    assert (first.bt.shape, second.bt) == ((4,), None)
    assert pk.counts(model).trainable == 4 * 13 + 2 * 20 + 39


def test_gradients_choose_nodes_without_a_priming():
    model = make("mlp").model
    pk.attach(model, pk.FAR(ratio=0.25, prime=0.0), TARGETS)
    with pytest.raises(RuntimeError, match="FAR has no nodes yet"):
        pk.fit(model, signs(), loss_fn=cross_entropy, progress=False)
    pk.calibrate(model, signs(), cross_entropy, progress=False)
    plain = make("mlp").model
    scores = [torch.zeros(20), torch.zeros(12)]
    for x, y in signs():
        loss = cross_entropy(plain(x), y, reduction="sum")
        grads = torch.autograd.grad(loss, [plain.first.weight, plain.second.weight])
        scores = [s + g.abs().sum(1) for s, g in zip(scores, grads, strict=True)]
    for tuner, score in zip(nodes(model), scores, strict=True):
        assert tuner.rows.tolist() == sorted(score.topk(round(0.25 * len(score))).indices.tolist())
        assert not tuner.wt.any()
    assert [p.name for p in pk.FAR(prime=0.0).phases(10)] == ["train"]
    assert not pk.FAR().at(None).tuner.observe is not pk.Tuner.observe  # a priming makes calibrating a no-op


@pytest.mark.parametrize("family", ["mlp", "bert", "gpt2", "llama", "t5"])
def test_after_both_phases_it_merges_saves_and_comes_off(family, tmp_path):
    case = make(family)
    before, base = snapshot(case.model), case.call(case.model)
    pk.attach(case.model, pk.FAR(ratio=0.2), TARGETS if family == "mlp" else None)
    prime, train = timeline(case.model, ["default"], 4)
    prime.enter(case.model)
    close(case.call(case.model), base)
    perturb(case.model)
    train.enter(case.model)
    tuned = case.call(case.model)
    assert not torch.allclose(tuned, base)
    where = pk.save(case.model, tmp_path / "a")
    counts, h = pk.counts(case.model), sum(len(t.rows) for t in nodes(case.model))
    assert counts.trainable == counts.stored == counts.changed
    assert counts.bytes == 4 * counts.stored + 4 * h
    pk.merge(case.model)
    close(case.call(case.model), tuned)
    touched = {path: t.rows for path, t in tuners(case.model, "default")}
    for path, rows in touched.items():  # no bit of another row has moved
        module = case.model.get_submodule(path)
        weight, old = (w.T if family == "gpt2" else w for w in (module.weight, before[f"{path}.weight"]))
        rest = torch.ones(len(weight), dtype=torch.bool).index_fill(0, rows.long(), False)
        assert torch.equal(weight[rest], old[rest]) and not torch.equal(weight, old)
    pk.unmerge(case.model)
    assert_same(case.model, before)
    fresh = make(family)
    close(pk.load(fresh.model, where) and fresh.call(fresh.model), tuned)
    pk.detach(case.model)
    assert torch.equal(case.call(case.model), base)


def test_without_a_step_the_layer_is_the_base():
    case = make("bert")
    before = snapshot(case.model)
    pk.attach(case.model, pk.FAR(ratio=0.4, prime=0.0))
    for tuner in nodes(case.model):
        tuner.choose(torch.rand(tuner.shape[0]))
    pk.merge(case.model)
    assert_same(case.model, before)


def test_it_stacks_on_another_adapter():
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2), ("up", "down"), name="lora")
    perturb(case.model, "lora")
    below = case.call(case.model)
    pk.attach(case.model, pk.FAR(ratio=0.4, prime=0.0))
    for tuner in nodes(case.model):
        tuner.choose(torch.rand(tuner.shape[0]))
    close(case.call(case.model), below)
    perturb(case.model)
    tuned = case.call(case.model)
    pk.merge(case.model)
    close(case.call(case.model), tuned)


def test_no_gradient_has_the_size_of_the_weight():
    layer = nn.Sequential(nn.Linear(64, 512))
    pk.attach(layer, pk.FAR(ratio=0.1, prime=0.0), ("0",))
    (tuner,) = nodes(layer)
    tuner.choose(torch.rand(512))
    y = layer(torch.randn(3, 64, requires_grad=True))
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    products = [event.input_shapes for event in profile.function_events if event.name in ("aten::mm", "aten::addmm_")]
    assert [[51, 3], [3, 64]] in products and tuner.wt.grad.shape == (51, 64)
    assert not [shapes for shapes in products if shapes[0] == [512, 3]]


@pytest.mark.parametrize("wrong", [[0, 0, 1], [3, 2, 1], [0, 1, 20], [-1, 0, 1], [0, 1], [0.0, 1.0, 2.0]])
def test_rows_that_cannot_be_are_refused_before_anything_is_written(wrong, tmp_path):
    model, _ = fitted(pk.FAR(ratio=0.15))
    where = pk.save(model, tmp_path / "a")
    file = where / "adapter_model.safetensors"
    values = load_file(file)
    key = next(k for k in values if k.startswith("first") and k.endswith("rows"))
    assert len(values[key]) == 3
    values[key] = torch.tensor(wrong)
    save_file(values, file)
    fresh = make("mlp")
    before = fresh.call(fresh.model)
    with pytest.raises(ValueError, match="expected as many integers from 0 to 19, each larger than the one before"):
        pk.load(fresh.model, where)
    assert torch.equal(fresh.call(fresh.model), before)


def test_phases_and_fields():
    assert [p.steps for p in pk.FAR(prime=0.25).phases(100)] == [25, 75]
    assert [p.steps for p in pk.FAR().phases(1)] == [1, 0]
    for fields, message in (
        ({"ratio": 0.0}, "ratio = 0.0"),
        ({"ratio": 1.5}, "ratio = 1.5"),
        ({"prime": 1.0}, "prime = 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.FAR(**fields)


def test_a_default_role_that_a_model_lacks_is_left_out():
    for family, gates in (("bert", False), ("t5", False), ("llama", True)):
        case = make(family)
        pk.attach(case.model, pk.FAR())
        names = {path.rpartition(".")[2] for path, _ in tuners(case.model, "default")}
        assert ("gate_proj" in names) == gates
        if not gates:
            with pytest.raises(ValueError, match="gate"):
                pk.attach(make(family).model, pk.FAR(), ("up", "gate"))


def test_the_rows_replace_those_of_the_weight():
    linear = nn.Linear(6, 5)
    model = nn.Sequential(linear)
    pk.attach(model, pk.FAR(ratio=0.4, prime=0.0), ("0",))
    (tuner,) = nodes(model)
    tuner.choose(torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0]))
    assert tuner.rows.tolist() == [1, 3]
    perturb(model)
    w, b, x = linear.weight.clone(), linear.bias.clone(), torch.randn(4, 6)
    w[[1, 3]] += tuner.wt
    b[[1, 3]] += tuner.bt
    torch.testing.assert_close(model(x), F.linear(x, w, b))
