"""LTSFT: a dense first phase, the largest changes of all weights, a second one from the start, breaks in either."""

import pytest
import torch
from models import assert_same, close, make, perturb, snapshot
from torch import nn
from torch.nn.functional import cross_entropy
from toys import fitted, signs

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.life import timeline

TARGETS = ("first", "second")


def sparse(model):
    return [tuner for _, tuner in tuners(model, "default") if hasattr(tuner, "positions")]


def test_the_largest_changes_of_a_dense_training_are_kept_and_rewound():
    """Against plain torch: the first phase is AdamW on copies of the weights."""
    seen = {}

    def spy(self, found, phase, real=pk.LTSFT.enter):
        if phase == "sparse":
            seen["changes"] = [t.vals.detach().clone() for t in found]
        real(self, found, phase)
        seen[phase] = [t.vals.detach().clone() for t in found]

    class Spied(pk.LTSFT):
        enter = spy

    model, log = fitted(Spied(keep_ratio=0.1, prime=0.5))
    phases = [(row["phase"], row["step"]) for row in log if row.get("phase") in ("prime", "sparse")]
    assert phases == [("prime", 1), ("sparse", 6)]  # the head has one of its own
    assert all(not v.any() for v in (*seen["prime"], *seen["sparse"]))
    assert [v.shape for v in seen["prime"]] == [(20, 12), (12, 20)]

    plain = make("mlp").model
    tuned = [plain.first.weight, plain.second.weight, plain.out.weight, plain.out.bias]
    before = [p.detach().clone() for p in tuned]
    for p in plain.parameters():
        p.requires_grad_(any(p is t for t in tuned))
    groups = [{"params": tuned[:2], "lr": 1e-2}, {"params": tuned[2:], "lr": pk.Head.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step, (x, y) in enumerate(signs()):
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_([*tuned], 1.0)
        factor = min(step + 1, (5 - step) / 4)
        for group, lr in zip(optimizer.param_groups, (1e-2, pk.Head.lr), strict=True):
            group["lr"] = lr * factor
        optimizer.step()
    changes = [(p - b).detach() for p, b in zip(tuned[:2], before[:2], strict=True)]
    for ours, theirs in zip(seen["changes"], changes, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    flat = torch.cat([c.abs().flatten() for c in seen["changes"]])
    best = set(flat.topk(48).indices.tolist())
    first, second = (t.positions.tolist() for t in sparse(model))
    assert {*first, *(240 + i for i in second)} == best
    assert pk.counts(model).trainable == 48 + 39
    assert all(t.vals.abs().sum() > 0 for t in sparse(model))


def test_the_penalty_is_the_mean_change_of_all_targeted_numbers():
    case = make("mlp")
    pk.attach(case.model, pk.LTSFT(l1=0.5), TARGETS)
    assert pk.penalty(case.model) == 0
    for entry in timeline(case.model, ["default"], 4):
        entry.enter(case.model)
        perturb(case.model)
        total = sum(t.vals.detach().abs().sum() for t in sparse(case.model))
        torch.testing.assert_close(pk.penalty(case.model), 0.5 * total / 480)


@pytest.mark.parametrize("family", ["mlp", "bert", "gpt2", "llama"])
def test_the_second_phase_merges_saves_and_comes_off(family, tmp_path):
    case = make(family)
    targets = TARGETS if family == "mlp" else ("q", "up", "down")
    before, base = snapshot(case.model), case.call(case.model)
    pk.attach(case.model, pk.LTSFT(keep_ratio=0.2), targets)
    for entry in timeline(case.model, ["default"], 4):
        entry.enter(case.model)
        close(case.call(case.model), base)
        perturb(case.model)
    tuned = case.call(case.model)
    assert not torch.allclose(tuned, base)
    where = pk.save(case.model, tmp_path / "a")
    counts, size = pk.counts(case.model), (where / "adapter_model.safetensors").stat().st_size
    assert counts.trainable == counts.stored == counts.changed and counts.bytes == 8 * counts.stored
    assert counts.bytes <= size <= counts.bytes + 5000  # positions and values
    pk.merge(case.model)
    close(case.call(case.model), tuned)
    pk.unmerge(case.model)
    assert_same(case.model, before)
    fresh = make(family)
    close(pk.load(fresh.model, where) and fresh.call(fresh.model), tuned)
    pk.detach(case.model)
    assert torch.equal(case.call(case.model), base)


def test_loading_never_makes_a_dense_copy(tmp_path, monkeypatch):
    model, _ = fitted(pk.LTSFT(keep_ratio=0.1))
    pk.save(model, tmp_path / "a")
    monkeypatch.setattr(pk.LTSFT.tuner, "begin", lambda self: pytest.fail("a dense copy"))
    fresh = pk.load(make("mlp").model, tmp_path / "a", trainable=True)
    x = signs()[0][0]
    assert torch.equal(fresh(x), model(x))


def test_early_stopping_keeps_the_best_of_the_second_phase():
    scores = iter([5.0, 1.0, 2.0, 3.0])
    model, seen = make("mlp").model, []
    pk.attach(model, pk.LTSFT(keep_ratio=0.1, prime=0.25), TARGETS)

    def on_epoch(epoch, model):
        seen.append([t.vals.detach().clone() for t in sparse(model)])
        return {"validation_loss": next(scores)}

    pk.fit(model, signs(), epochs=4, patience=2, loss_fn=cross_entropy, progress=False, on_epoch=on_epoch)
    assert len(seen) == 4
    assert all(torch.equal(t.vals, best) for t, best in zip(sparse(model), seen[1], strict=True))


def test_phases_and_fields():
    assert [p.steps for p in pk.LTSFT(prime=0.25).phases(100)] == [25, 75]
    assert [p.steps for p in pk.LTSFT().phases(1)] == [1, 0]
    assert [p.steps for p in pk.LTSFT(prime=0.99).phases(10)] == [9, 1]
    for fields, message in (
        ({"prime": 0.0}, "prime = 0.0"),
        ({"prime": 1.0}, "prime = 1.0"),
        ({"l1": -1.0}, "l1 = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.LTSFT(**fields)
