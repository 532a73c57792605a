"""Movement pruning: scores gather how weights move, and decide what is kept."""

import pytest
import torch
from models import assert_same, make, snapshot
from torch import nn
from torch.nn.functional import cross_entropy
from toys import signs

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.fit import param_groups
from peft_kernels.engine.life import advance, scheduled

TARGETS = ("first", "second")


def moved(**fields):
    model = pk.attach(make("mlp").model, pk.MovementPruning(**fields), TARGETS)
    return model, {path: t for path, t in tuners(model, "default")}


def kept(found):
    return [int(t.mask.sum()) for t in found.values()]


def test_a_score_grows_where_a_weight_moves_away_from_zero():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 0.5)
    pk.attach(model, pk.MovementPruning(), ("0",))
    tuner = model[0].peft.tuners["default"]
    (-model(torch.ones(1, 1))).sum().backward()  # dL/dW' = -1
    torch.optim.SGD([tuner.scores], lr=0.1).step()
    assert tuner.scores.item() == pytest.approx(0.05)


def test_gradients_go_through_the_mask_to_the_scores():
    """dL/dS = dL/dW' (W + delta), where pruned too; dL/d delta = dL/dW' where kept."""
    model, found = moved()
    tuner, x = found["first"], torch.randn(5, 12)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        tuner.delta.normal_(generator=made)
        tuner.mask = torch.rand(tuner.shape, generator=made) < 0.5
    model.first(x).square().sum().backward()
    own = model.first.weight.detach() + tuner.delta.detach()
    weight = torch.where(tuner.mask, own, 0).requires_grad_(True)
    nn.functional.linear(x, weight, model.first.bias).square().sum().backward()
    torch.testing.assert_close(tuner.scores.grad, weight.grad * own)
    torch.testing.assert_close(tuner.delta.grad, weight.grad * tuner.mask)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_hard_pruning_keeps_the_best_scores(scope):
    model, found = moved(keep_ratio=0.15, scope=scope, warm_up=0.1, cool_down=0.2)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for i, tuner in enumerate(found.values()):
            tuner.scores.normal_(generator=made).add_(i)
    own = scheduled(model, ["default"])
    scores = [t.scores.detach() for t in found.values()]
    for progress, ratio in ((0.05, 1), (0.1, 1), (0.45, 0.15 + 0.85 * 0.5**3), (0.8, 0.15), (0.95, 0.15), (1, 0.15)):
        advance(own, progress)
        groups = [torch.cat([s.flatten() for s in scores])] if scope == "global" else scores
        masks = [torch.cat([t.mask.flatten() for t in found.values()])] if scope == "global" else None
        for s, m in zip(groups, masks or [t.mask for t in found.values()], strict=True):
            assert int(m.sum()) == round(ratio * s.numel())
            if ratio < 1:
                assert s.flatten()[m.flatten()].min() > s.flatten()[~m.flatten()].max()


def test_training_ends_with_bits_and_the_kept_changes(tmp_path):
    model, found = moved(keep_ratio=0.25, scores_lr=0.1)
    before, x = snapshot(model), signs(24, 1)[0][0]
    assert pk.counts(model).trainable == 2 * 480
    groups = {g["lr"]: sum(p.numel() for p in g["params"]) for g in param_groups(model, lr=5e-3)}
    assert groups == {5e-3: 480, 0.1: 480}
    log = pk.fit(model, signs(24, 1) * 10, lr=5e-3, loss_fn=cross_entropy, progress=False)
    assert [row["phase"] for row in log if "phase" in row] == ["train", "done"]
    assert_same(model, before)
    assert kept(found) == [60, 60]
    assert [list(t.state_dict()) for t in found.values()] == [["delta", "bits"]] * 2
    counts = pk.counts(model)
    assert (counts.trainable, counts.stored, counts.bytes) == (120, 120, 120 * 4 + 480 // 8)
    pk.save(model, tmp_path)
    twin = pk.load(make("mlp").model, tmp_path)
    assert torch.equal(twin(x), model(x))
    pk.merge(model)
    assert [int((model.get_submodule(name).weight != 0).sum()) for name in TARGETS] == [60, 60]


def test_a_mask_first_read_in_inference_serves_training():
    model, found = moved(keep_ratio=0.25)
    x = signs(24, 1)[0][0]

    def evaluated(*_):
        with torch.inference_mode():
            return {"mean": model(x).mean().item()}

    evaluated()
    pk.fit(model, signs(24, 1) * 10, epochs=2, on_epoch=evaluated, loss_fn=cross_entropy, progress=False)
    assert kept(found) == [60, 60]


def test_patterns():
    model, found = moved(pattern="2:4")
    pk.fit(model, signs(24, 1) * 10, loss_fn=cross_entropy, progress=False)
    for tuner in found.values():
        assert bool((tuner.mask.view(-1, 4).sum(1) == 2).all())


def test_frozen_weights_are_chosen_from_and_nothing_else(tmp_path):
    model, found = moved(freeze=True, keep_ratio=0.5, scores_lr=0.1)
    assert pk.counts(model).trainable == 480
    log = pk.fit(model, signs(24, 1) * 10, loss_fn=cross_entropy, progress=False)
    assert kept(found) == [120, 120]
    assert [r["loss"] for r in log if "loss" in r][0] != [r["loss"] for r in log if "loss" in r][-1]
    assert (pk.counts(model).stored, pk.counts(model).bytes) == (0, 60)
    pk.save(model, tmp_path)
    x, weight = signs(24, 1)[0][0], model.first.weight.clone()
    assert torch.equal(pk.load(make("mlp").model, tmp_path)(x), model(x))
    pk.merge(model)
    assert torch.equal(model.first.weight, torch.where(found["first"].mask, weight, 0))


def test_soft_pruning_keeps_what_is_above_the_threshold_and_at_least_some():
    model, found = moved(mode="soft", threshold=0.4, penalty=3.0, warm_up=0.1, cool_down=0.2)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        found["first"].scores.normal_(generator=made)
        found["second"].scores.copy_(torch.linspace(-9, -8, 240).view(12, 20))
    own = scheduled(model, ["default"])
    pk.MovementPruning().enter(list(found.values()), "train")
    assert pk.penalty(model) == 0  # nor a threshold, as long as it warms up
    for progress, part in ((0.1, 0), (0.45, 1 - 0.5**3), (0.9, 1)):
        advance(own, progress)
        scores = found["first"].scores.detach()
        assert torch.equal(found["first"].mask, scores.sigmoid() > 0.4 * part)
        means = sum(t.scores.detach().sigmoid().mean() for t in found.values()) / 2
        torch.testing.assert_close(pk.penalty(model).detach(), 3 * part * means)
    least = int(0.005 * 240) + 1
    assert torch.equal(found["second"].mask.flatten().nonzero().flatten(), torch.arange(240 - least, 240))
    pk.penalty(model).backward()
    s = found["first"].scores.detach().sigmoid()
    torch.testing.assert_close(found["first"].scores.grad, 3 * s * (1 - s) / 240 / 2)


def test_the_penalty_of_soft_pruning_prunes():
    def left(penalty):
        model, found = moved(mode="soft", threshold=0.4, penalty=penalty, scores_lr=0.2)
        pk.fit(model, signs(24, 1) * 10 * 4, loss_fn=cross_entropy, progress=False)
        return sum(kept(found))

    assert left(100.0) < 0.5 * left(0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "medium"}, "expected 'hard' or 'soft'"),
        ({"mode": "soft", "pattern": "2:4"}, "with mode = 'soft'"),
        ({"threshold": 1.0}, "threshold = 1.0"),
        ({"scores_lr": 0.0}, "scores_lr = 0.0"),
        ({"warm_up": -0.1}, "warm_up = -0.1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        pk.MovementPruning(**fields)
    assert "\n" not in str(error.value)
