"""Magnitude pruning: the smallest weights become zero, at once or by and by, and stay so in the file and in a merge."""

import pytest
import torch
from models import assert_same, close, make, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

TARGETS = ("first", "second")


def pruned(method, model=None):
    model = make("mlp").model if model is None else model
    pk.attach(model, method, TARGETS)
    return model, {path: t for path, t in tuners(model, "default")}


def weights(model):
    return {name: model.get_submodule(name).weight.detach().clone() for name in TARGETS}


def data():
    made = torch.Generator().manual_seed(1)
    x = torch.randn(24, 12, generator=made)
    return [(x, (x[:, 0] > 0).long())] * 10


def largest(weight, k):
    """The mask of the k largest magnitudes."""
    order = weight.abs().flatten().argsort(descending=True)[:k]
    return torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, order, True).view(weight.shape)


def test_each_matrix_keeps_its_largest_weights():
    model, found = pruned(pk.MagnitudePruning(keep_ratio=0.3))
    for name, weight in weights(model).items():
        assert torch.equal(found[name].mask, largest(weight, round(0.3 * weight.numel())))
        assert torch.equal(found[name].fold(weight, None)[0], torch.where(found[name].mask, weight, 0))


def test_global_keeps_the_largest_of_all():
    model, found = pruned(pk.MagnitudePruning(keep_ratio=0.3, scope="global"))
    model.second.weight.data *= 3  # too late: chosen when it was attached
    everything = torch.cat([w.flatten() for w in (weights(model)["first"], weights(model)["second"] / 3)])
    masks = torch.cat([found[name].mask.flatten() for name in TARGETS])
    assert torch.equal(masks, largest(everything, round(0.3 * everything.numel())))
    for tuner in found.values():
        assert tuner.delta.shape == (int(tuner.mask.sum()),)
    assert pk.counts(model).trainable == int(masks.sum())


def test_gated_it_chooses_of_all_too():
    method = pk.MagnitudePruning(keep_ratio=0.3, scope="global")
    _, found = pruned(method)
    _, inside = pruned(pk.Gated(inner=method))
    for name in TARGETS:
        assert torch.equal(inside[name].inner.mask, found[name].mask)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("1:2", 1, 2)])
def test_n_of_m_neighbours(pattern, n, m):
    model, found = pruned(pk.MagnitudePruning(pattern=pattern))
    for name, weight in weights(model).items():
        groups, kept = weight.abs().view(-1, m), found[name].mask.view(-1, m)
        assert bool((kept.sum(1) == n).all())
        dropped = groups.masked_fill(kept, 0).max(1).values
        assert bool((groups.masked_fill(~kept, torch.inf).min(1).values >= dropped).all())


def test_what_is_trained_is_the_masked_gradient():
    case = make("mlp", torch.float64)
    model, found = pruned(pk.MagnitudePruning(keep_ratio=0.4), case.model)
    case.loss(model).backward()
    for name, tuner in found.items():
        module = model.get_submodule(name)
        own = module.weight.detach().clone()
        with torch.no_grad():
            module.weight.copy_(tuner.fold(own, None)[0])
        twin = make("mlp", torch.float64).model
        twin.load_state_dict({k: v for k, v in model.state_dict().items() if "peft" not in k})
        with torch.no_grad():
            module.weight.copy_(own)
            for other in set(TARGETS) - {name}:
                twin.get_submodule(other).weight.copy_(found[other].fold(weights(model)[other], None)[0])
        case.loss(twin).backward()
        close(tuner.delta.grad, twin.get_submodule(name).weight.grad[tuner.mask], torch.float64)


def test_training_moves_what_is_kept_and_a_merge_writes_the_zeros():
    model, found = pruned(pk.MagnitudePruning(keep_ratio=0.5))
    before, masks = snapshot(model), {name: t.mask.clone() for name, t in found.items()}
    log = pk.fit(model, data(), lr=1e-2, loss_fn=cross_entropy, progress=False)
    assert log[9]["loss"] < log[0]["loss"]
    assert_same(model, before)
    x, own = data()[0][0], weights(model)
    out = model(x)
    pk.merge(model)
    for name, mask in masks.items():
        merged = model.get_submodule(name).weight
        assert torch.equal(merged != 0, mask)
        assert bool((merged != own[name])[mask].float().mean() > 0.9)
    close(model(x), out)
    pk.unmerge(model)
    assert_same(model, before)


def test_without_retraining_it_is_bits_alone(tmp_path):
    model, found = pruned(pk.MagnitudePruning(keep_ratio=0.25, retrain=False))
    counts = pk.counts(model)
    assert (counts.trainable, counts.stored) == (0, 0)
    assert counts.changed == 480 - 120
    assert counts.bytes == 480 // 8
    pk.save(model, tmp_path)
    twin = pk.load(make("mlp").model, tmp_path)
    assert torch.equal(twin(data()[0][0]), model(data()[0][0]))
    pk.merge(model)
    assert sum(int((w == 0).sum()) for w in weights(model).values()) == 360


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_cubic_training_prunes_ever_more(scope, tmp_path):
    method = pk.MagnitudePruning(keep_ratio=0.2, scope=scope, schedule="cubic", warm_up=0.2, cool_down=0.3)
    model, found = pruned(method)
    x, seen = data()[0][0], []
    assert pk.counts(model).trainable == 480  # all of the change
    assert torch.equal(model(x), make("mlp").model(x))
    model.first.register_forward_hook(lambda *_: seen.append(sum(int(t.mask.sum()) for t in found.values())))
    pk.fit(model, data(), lr=1e-2, loss_fn=cross_entropy, progress=False)
    wanted = [480 * (0.2 + 0.8 * (1 - min(max(step / 10 - 0.2, 0) / 0.5, 1)) ** 3) for step in range(10)]
    assert seen == pytest.approx(wanted, abs=1)
    assert pk.counts(model).trainable == pk.counts(model).stored == 96
    assert [tuner.delta.dim() for tuner in found.values()] == [1, 1]
    pk.save(model, tmp_path)
    twin = pk.load(make("mlp").model, tmp_path, trainable=True)
    assert torch.equal(twin(x), model(x))
    masks = [t.mask.clone() for _, t in tuners(twin, "default")]
    pk.fit(twin, data(), lr=1e-2, loss_fn=cross_entropy, progress=False)  # goes on with the mask that it has
    for (_, tuner), mask in zip(tuners(twin, "default"), masks, strict=True):
        assert torch.equal(tuner.mask, mask)


def test_a_best_epoch_before_the_end_is_pruned_as_asked():
    model, found = pruned(pk.MagnitudePruning(keep_ratio=0.2, schedule="cubic"))
    losses = iter([1.0, 2.0, 3.0])
    pk.fit(
        model,
        data(),
        epochs=3,
        patience=5,
        on_epoch=lambda *_: {"validation_loss": next(losses)},
        loss_fn=cross_entropy,
        progress=False,
    )
    assert sum(int(t.mask.sum()) for t in found.values()) == 96


def test_a_file_that_cannot_be_right_is_refused(tmp_path):
    model, _ = pruned(pk.MagnitudePruning(keep_ratio=0.5))
    place = pk.save(model, tmp_path) / "adapter_model.safetensors"
    values = load_file(place)
    for broken, message in (
        ({"first.delta": torch.zeros(7)}, "expected .* what the mask keeps"),
        ({"first.bits": torch.zeros(30, dtype=torch.uint8)}, r"what the mask keeps, \(0,\)"),
        ({"first.bits": torch.zeros(3, dtype=torch.uint8)}, "does not fit"),
        ({"first.bits": torch.zeros(30)}, "expected uint8"),
    ):
        save_file({**values, **broken}, place)
        twin = make("mlp").model
        with pytest.raises(ValueError, match=message):
            pk.load(twin, tmp_path)
        assert_same(twin, snapshot(make("mlp").model))
        assert not hasattr(twin.first, "peft")


def test_numbers_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    pk.attach(model, pk.MagnitudePruning(keep_ratio=0.25), ("0", "1"))
    assert pk.counts(model).trainable == 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio = 0"),
        ({"scope": "layer"}, "expected 'tensor' or 'global'"),
        ({"schedule": "linear"}, "expected 'one-shot' or 'cubic'"),
        ({"schedule": "cubic", "retrain": False}, "prune in one shot"),
        ({"warm_up": 0.5, "cool_down": 0.5}, "less than 1"),
        ({"pattern": "4:2"}, "pattern '4:2'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        pk.MagnitudePruning(**fields)
    assert "\n" not in str(error.value)
