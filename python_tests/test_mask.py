"""pk.Mask: sets of positions that outlive the adapter they come from."""

import pytest
import torch
from models import make
from safetensors.torch import save_file
from torch import nn

import peft_kernels as pk


def random_mask(family="gpt2", seed=0, targets=("q", "v", "up")):
    case = make(family)
    pk.attach(case.model, pk.RandomMask(keep_ratio=0.3), targets, seed=seed)
    return case, pk.Mask.of(case.model)


def sets(mask):
    return {key: set(t.tolist()) for key, t in mask.positions.items()}


def test_masks_are_sets():
    (_, a), (_, b) = random_mask(), random_mask(seed=1, targets=("q", "up"))
    left, right = sets(a), sets(b)
    assert len(left) == 6 and len(right) == 4 and "q@transformer.h.0.attn.c_attn" in left
    for made, op in ((a | b, set.union), (a & b, set.intersection), (a - b, set.difference)):
        assert sets(made) == {key: op(left[key], right.get(key, set())) for key in left}
        assert all((t.diff() > 0).all() for t in made.positions.values())
    assert len(a | b) == len(a) + len(b) - len(a & b)
    assert "numbers (30." in str(a) and "in 6 weights" in str(a)
    other = pk.Mask(a.positions, {key: (1, 1) for key in a.shapes})
    with pytest.raises(ValueError, match="weight in one mask and"):
        a | other


def test_a_saved_mask_applies_to_another_model(tmp_path):
    (_, a), (_, b) = random_mask(), random_mask(seed=1)
    where = (a & b).save(tmp_path / "deep" / "mask.safetensors")
    assert where.stat().st_size < 4 * len(a & b) + 2000
    assert [p.name for p in where.parent.iterdir()] == ["mask.safetensors"]
    fresh = make("gpt2")
    before = fresh.call(fresh.model)
    pk.attach(fresh.model, pk.FishMask(), ("q", "v", "up"))
    assert pk.Mask.load(where).apply(fresh.model) is fresh.model
    assert sets(pk.Mask.of(fresh.model)) == sets(a & b)
    assert pk.counts(fresh.model).trainable == len(a & b)
    assert torch.equal(fresh.call(fresh.model), before)
    batch = {**fresh.inputs, "labels": fresh.inputs["input_ids"]}
    pk.fit(fresh.model, [batch], progress=False)  # a mask is all that was missing
    assert not torch.equal(fresh.call(fresh.model), before)


def test_a_union_of_methods_is_one_mask_and_a_head_none():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    pk.attach(model, pk.Union(pk.RandomMask(keep_ratio=0.1), pk.RandomMask(keep_ratio=0.2)), ("0",), train=("1",))
    mask = pk.Mask.of(model)
    assert list(mask.positions) == ["0"]
    assert 10 <= len(mask) <= 15
    model = pk.attach(nn.Sequential(nn.Linear(8, 6)), pk.LoRA(rank=2), ("0",))
    with pytest.raises(ValueError, match="has no mask"):
        pk.Mask.of(model)
    model = pk.attach(nn.Sequential(nn.Linear(8, 6)), pk.FishMask(), ("0",))
    with pytest.raises(RuntimeError, match="no mask yet"):
        pk.Mask.of(model)


def test_a_mask_of_other_weights_is_refused_and_nothing_changes():
    case, mask = random_mask()
    for targets, message in (
        (("q", "v"), "the mask has transformer.h.0.mlp.c_fc, where the adapter has no sparse tuner"),
        (("q", "v", "up", "down"), "the mask lacks transformer.h.0.mlp.c_proj"),
    ):
        other, own = random_mask(seed=3, targets=targets)
        with pytest.raises(ValueError, match=message):
            mask.apply(other.model)
        assert sets(pk.Mask.of(other.model)) == sets(own)
    key = "transformer.h.0.mlp.c_fc"
    wrong = pk.Mask(mask.positions, {**mask.shapes, key: (1, 2)})
    with pytest.raises(ValueError, match=r"of a \(1, 2\) weight at transformer.h.0.mlp.c_fc"):
        wrong.apply(case.model)


def test_files_that_are_no_masks(tmp_path):
    case, mask = random_mask()
    pk.save(case.model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is no mask"):
        pk.Mask.load(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "broken").write_bytes(b"x" * 30)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        pk.Mask.load(tmp_path / "broken")
    for positions, message in (([3, 3], "comes twice"), ([0, 6], "expected 0 to 5")):
        metadata = {"format": "peft_kernels mask", "shapes": '{"0": [2, 3]}'}
        save_file({"0": torch.tensor(positions, dtype=torch.int32)}, tmp_path / "bad", metadata=metadata)
        with pytest.raises(ValueError, match=message):
            pk.Mask.load(tmp_path / "bad")
