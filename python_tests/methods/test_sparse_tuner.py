"""Sparse masks: how they are chosen, what a file with one must hold, and what a merge changes."""

import copy

import pytest
import torch
from models import FAMILIES, assert_same, attached, close, make, perturb, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.methods._select import best, kept, parsed
from peft_kernels.methods._sparse import SparseTuner


def leaves(model, name="default"):
    return [t for _, tuner in tuners(model, name) for t in tuner.modules() if isinstance(t, SparseTuner)]


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:4", "4:4", "2:8"])
@pytest.mark.parametrize("use_abs", [False, True])
def test_of_every_m_neighbours_the_n_best_are_kept(pattern, use_abs):
    n, m = parsed(pattern)
    made = torch.Generator().manual_seed(1)
    scores = [torch.randn(shape, generator=made) for shape in ((6, 8), (3, 16), (0, 8))]
    for s, positions in zip(scores, best(scores, 0, pattern, use_abs=use_abs), strict=True):
        mask = torch.zeros(s.numel(), dtype=torch.bool)
        mask[positions] = True
        assert (positions.diff() > 0).all()
        groups, values = mask.view(-1, m), (s.abs() if use_abs else s).reshape(-1, m)
        assert (groups.sum(1) == n).all()
        assert len(positions) == kept(s.numel(), 0.5, pattern)
        if n < m and len(values):
            worst, rest = values.masked_fill(~groups, torch.inf).amin(1), values.masked_fill(groups, -torch.inf).amax(1)
            assert (worst >= rest).all()


def test_ties_go_to_the_first():
    ties = [torch.zeros(2, 4), torch.ones(2, 4)]
    assert [p.tolist() for p in best(ties, 10)] == [[0, 1], list(range(8))]
    assert [p.tolist() for p in best(ties, 0, "2:4")] == [[0, 1, 4, 5]] * 2
    with pytest.raises(ValueError, match="NaN"):
        best([torch.tensor([[1.0, torch.nan]])], 1, "1:2")
    with pytest.raises(ValueError, match="NaN"):
        best([torch.tensor([[1.0, torch.nan]])], 1)


@pytest.mark.parametrize("method", [pk.RandomMask, pk.FishMask, pk.LTSFT])
def test_what_cannot_be_chosen_is_said(method):
    for fields, message in (
        ({"pattern": "2"}, "expected 'free', or n:m"),
        ({"pattern": "3:2"}, "expected 'free', or n:m"),
        ({"pattern": "0:2"}, "expected 'free', or n:m"),
        ({"keep_ratio": 0.0}, "more than 0 and at most 1"),
        ({"keep_ratio": 1.5}, "more than 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            method(**fields)
    with pytest.raises(ValueError, match="give an m that divides 12"):
        pk.attach(make("mlp").model, method(pattern="2:8"), ("first",))


@pytest.mark.parametrize("key", ["random", "fishmask"])
def test_a_pattern_holds_on_a_model(key):
    case = make("mlp")
    pk.attach(case.model, pk.methods()[key](pattern="1:4"), ("first", "second"))
    pk.calibrate(case.model, [(case.inputs["x"], torch.arange(5) % 3)], cross_entropy, progress=False)
    for tuner in leaves(case.model):
        mask = torch.zeros(tuner.shape, dtype=torch.bool)
        mask.view(-1)[tuner.positions.long()] = True
        assert (mask.view(-1, 4).sum(1) == 1).all()


def test_random_masks_have_exactly_the_ratio_and_depend_on_the_seed_and_the_path():
    def positions(seed):
        case = make("mlp")
        pk.attach(case.model, pk.RandomMask(keep_ratio=0.1), ("first", "second"), seed=seed)
        return [t.positions for t in leaves(case.model)]

    first, second = positions(0)
    assert len(first) == len(second) == 24  # of 240
    assert torch.equal(first, positions(0)[0])
    assert not torch.equal(first, positions(1)[0])
    assert not torch.equal(first, second)
    assert first.dtype == torch.int32


# -- the tuner --------------------------------------------------------------------------------------------------------


def sparse_model(positions, shape=(5, 6), dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=dtype))
    pk.attach(model, pk.FishMask(), ("0",))
    (tuner,) = leaves(model)
    tuner.set_mask(torch.tensor(positions, dtype=torch.int64))
    return model, tuner


@pytest.mark.parametrize("positions", [[], [7], [0, 5, 6, 29], list(range(30))], ids=len)
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_values_and_gradients_are_those_of_the_masked_dense_weight(positions, rows):
    model, tuner = sparse_model(positions)
    perturb(model)
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    out, weight = torch.randn(rows, 5, dtype=torch.float64), model[0].weight
    dense = weight.detach().clone().view(-1)
    dense[positions] += tuner.vals.detach()
    dense = dense.view(5, 6).requires_grad_()
    truth = nn.functional.linear(x, dense, model[0].bias)
    expected = torch.autograd.grad((truth * out).sum(), [x, dense])
    y = model(x)
    close(y, truth, torch.float64)
    dx, dv = torch.autograd.grad((y * out).sum(), [x, tuner.vals])
    close(dx, expected[0], torch.float64)
    close(dv, expected[1].view(-1)[positions], torch.float64)
    assert weight.grad is None and not weight.requires_grad


def test_the_rank_is_bounded_by_rows_and_columns_that_are_not_empty():
    for positions, rank in (([], 0), ([7], 1), ([0, 1, 2, 3], 1), ([0, 6, 12], 1), ([0, 7, 14], 3), (range(30), 5)):
        model, tuner = sparse_model(list(positions))
        found = pk.counts(model)
        assert (found.changed, found.rank, found.trainable) == (len(positions), rank, len(positions))
        with torch.no_grad():
            tuner.vals.normal_()
        change = tuner.fold(torch.zeros(5, 6, dtype=torch.float64), None)[0]
        assert torch.linalg.matrix_rank(change) <= rank


def test_before_a_mask_is_chosen_it_is_the_base_and_says_what_to_do():
    model = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    before = model(x)
    pk.attach(model, pk.FishMask(keep_ratio=0.5), ("0",))
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), before)
    with pytest.raises(RuntimeError, match=r"0: FishMask has no mask yet; call pk.calibrate\(model, batches\) first"):
        pk.fit(model, [(x, y)], loss_fn=cross_entropy, progress=False)
    pk.calibrate(model, [(x, y)], cross_entropy, progress=False)
    assert torch.equal(model(x), before)
    assert len(pk.fit(model, [(x, y)], loss_fn=cross_entropy, progress=False)) == 2
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_changes_the_masked_numbers_alone_even_in_bf16(family):
    case = attached("random", family, torch.bfloat16)
    perturb(case.model)
    before, masks = snapshot(case.model), pk.Mask.of(case.model)
    pk.merge(case.model)
    now = snapshot(case.model)
    changed = sum(int((now[name] != value).sum()) for name, value in before.items())
    assert 0.8 * len(masks) < changed <= len(masks)  # some are rounded away
    for key, positions in masks.positions.items():
        role, _, path = key.rpartition("@")
        if role or family == "gpt2":  # kept as [in, out]
            continue
        moved = (now[f"{path}.weight"] != before[f"{path}.weight"]).view(-1).nonzero().flatten()
        assert torch.isin(moved, positions).all()
    pk.unmerge(case.model)
    assert_same(case.model, before)


# -- files ------------------------------------------------------------------------------------------------------------


def saved(tmp_path, **changes):
    """An adapter's directory, some tensors of which are other ones."""
    model, _ = sparse_model([0, 5, 6, 29], dtype=torch.float32)
    perturb(model)
    where = pk.save(model, tmp_path / "adapter")
    file = where / "adapter_model.safetensors"
    values = load_file(file)
    assert {k: v.dtype for k, v in values.items()} == {"0.positions": torch.int32, "0.vals": torch.float32}
    if changes:
        save_file({**values, **{f"0.{k}": v for k, v in changes.items()}}, file, metadata={"format": "pt"})
    return model, where


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": torch.tensor([0, 5, 5, 29])}, "do not ascend, or one comes twice"),
        ({"positions": torch.tensor([5, 0, 6, 29])}, "do not ascend, or one comes twice"),
        ({"positions": torch.tensor([0, 5, 6, 30])}, "from 0 to 30; expected 0 to 29"),
        ({"positions": torch.tensor([-1, 5, 6, 29])}, "from -1 to 29; expected 0 to 29"),
        ({"positions": torch.tensor([0.0, 5, 6, 29])}, "expected integers"),
        ({"positions": torch.tensor([[0, 5, 6, 29]])}, "expected integers"),
        ({"positions": torch.tensor([0, 5, 29])}, r"vals is \(4,\) for positions \(3,\)"),
        ({"vals": torch.zeros(5)}, r"vals is \(5,\) for positions \(4,\)"),
    ],
)
def test_positions_that_cannot_be_are_refused_before_anything_is_written(changes, message, tmp_path):
    model, where = saved(tmp_path, **changes)
    fresh = nn.Sequential(nn.Linear(6, 5))
    keys = list(fresh.state_dict())
    with pytest.raises(ValueError, match=message):
        pk.load(fresh, where)
    assert list(fresh.state_dict()) == keys
    (tuner,), state = leaves(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        tuner.reshape({**tuner.state_dict(), **changes})
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_other_masks_are_read_from_files_and_state_dicts(tmp_path):
    model, where = saved(tmp_path)
    x = torch.randn(3, 6)
    other, tuner = sparse_model([1, 2], dtype=torch.float32)
    other[0].load_state_dict({k: v for k, v in model[0].state_dict().items()})
    assert torch.equal(other(x), model(x))
    assert tuner.vals.requires_grad and tuner.crow.tolist() == [0, 2, 3, 3, 3, 4] and tuner.col.tolist() == [0, 5, 0, 5]
    pk.detach(other)
    pk.load(other, where, trainable=True)
    assert torch.equal(other(x), model(x))
    unchosen = pk.attach(nn.Sequential(nn.Linear(6, 5)), pk.FishMask(), ("0",))
    pk.save(unchosen, tmp_path / "unchosen")
    again = pk.load(nn.Sequential(nn.Linear(6, 5)), tmp_path / "unchosen", trainable=True)
    with pytest.raises(RuntimeError, match="no mask yet"):
        pk.fit(again, [(x, torch.zeros(3, dtype=torch.long))], loss_fn=cross_entropy, progress=False)


def test_positions_are_int64_where_int32_is_too_small():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**16, 2**15), nn.Linear(2**16, 2**15 + 1))
    pk.attach(model, pk.FishMask(), ("0", "1"))
    for tuner, dtype in zip(leaves(model), (torch.int32, torch.int64), strict=True):
        tuner.set_mask(torch.empty(1000, dtype=torch.int64, device="meta"))
        assert (tuner.positions.dtype, tuner.crow.dtype, tuner.col.dtype) == (dtype, torch.int32, torch.int32)
    assert pk.counts(model).changed == 2000
