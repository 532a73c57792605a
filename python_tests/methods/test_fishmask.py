"""FishMask: the Fisher information of each row, which numbers it keeps, and the budget that a head takes part of."""

import pytest
import torch
from models import make
from torch import nn
from torch.nn.functional import cross_entropy

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

TARGETS = ("first", "second")


def rows(n=12):
    made = torch.Generator().manual_seed(3)
    return torch.randn(n, 12, generator=made), torch.randint(0, 3, (n,), generator=made)


def by_hand(model, x, y, expected):
    """F of each targeted weight: a loop over rows, and over classes for the expected one."""
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in TARGETS]
    found = [torch.zeros_like(w) for w in weights]
    for i in range(len(x)):
        log = model(x[i : i + 1]).log_softmax(-1)[0]
        for c in range(len(log)) if expected else [int(y[i])]:
            grads = torch.autograd.grad(log[c], weights, retain_graph=True)
            for f, g in zip(found, grads, strict=True):
                f += (log[c].exp().detach() if expected else 1) * g.square()
    for w in weights:
        w.requires_grad_(False)
    return found


def masks(model):
    return [tuner.positions.tolist() for _, tuner in tuners(model, "default") if hasattr(tuner, "positions")]


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_best_of_all_weights_by_the_squares_of_single_rows(expected, size):
    model, (x, y) = make("mlp").model, rows()
    truth = by_hand(model, x, y, expected)
    pk.attach(model, pk.FishMask(keep_ratio=0.1, expected=expected), TARGETS)
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    pk.calibrate(model, batches, cross_entropy, progress=False)
    flat = torch.cat([f.flatten() for f in truth])
    k = 48  # of 240 + 240
    best = set(flat.topk(k).indices.tolist())
    first, second = masks(model)
    assert {*first, *(240 + i for i in second)} == best
    assert len(first) != len(second)  # no quota for a weight
    assert all(tuner.sums is None for _, tuner in tuners(model, "default"))


def test_squares_of_batch_gradients_would_choose_others():
    model, (x, y) = make("mlp").model, rows()
    weight = model.first.weight.requires_grad_(True)
    whole = torch.autograd.grad(cross_entropy(model(x), y), weight)[0].square()
    weight.requires_grad_(False)
    own = by_hand(model, x, y, False)[0]
    assert set(whole.flatten().topk(24).indices.tolist()) != set(own.flatten().topk(24).indices.tolist())


class Logit(nn.Module):
    """Logits [w x, 0]."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.inner.weight)

    def forward(self, x):
        return nn.functional.pad(self.inner(x), (0, 1))


@pytest.mark.parametrize("expected", [False, True])
def test_the_fisher_of_one_logit_at_zero_is_a_quarter(expected, monkeypatch):
    model, found = Logit(), []
    pk.attach(model, pk.FishMask(keep_ratio=1.0, expected=expected), ("inner",))
    (_, tuner), *_ = tuners(model, "default")
    monkeypatch.setattr(tuner, "taken", lambda: found.append(tuner.sums) or tuner.sums)
    pk.calibrate(model, [(torch.ones(4, 1), torch.arange(4) % 2)], cross_entropy, progress=False)
    assert found[0].item() == pytest.approx(4 * 0.25)  # the sum over four rows


def test_what_is_trained_whole_beside_it_is_in_the_budget():
    def trained(train=("out",), **fields):
        model, (x, y) = make("mlp").model, rows()
        pk.attach(model, pk.FishMask(**fields), TARGETS, train=train)
        pk.calibrate(model, [(x, y)], cross_entropy, progress=False)
        return sum(map(len, masks(model))), pk.counts(model).trainable

    head = 12 * 3 + 3
    total = 480 + head
    assert trained(keep_ratio=0.2) == (int(0.2 * total) - head, int(0.2 * total))
    assert trained(keep_ratio=0.2, count_head=False) == (96, 96 + head)
    assert trained(train=(), keep_ratio=0.2) == (96, 96)
    with pytest.warns(UserWarning, match=r"the 39 numbers .* more than keep_ratio = 0.05 of all 519 .* count_head"):
        assert trained(keep_ratio=0.05) == (24, 24 + head)
    assert trained(keep_ratio=0.05, pattern="1:4") == (120, 120 + head)


def test_calibration_reads_as_many_rows_as_it_is_told():
    def chosen(method, n, steps=None):
        model, (x, y) = make("mlp").model, rows()
        pk.attach(model, method, TARGETS)
        batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, n, 2)]
        pk.calibrate(model, batches, cross_entropy, steps=steps, progress=False)
        return masks(model)

    some, every = pk.FishMask(keep_ratio=0.1, samples=4), pk.FishMask(keep_ratio=0.1)
    assert chosen(some, 12) == chosen(every, 4) == chosen(every, 12, steps=2)
    assert chosen(some, 12) != chosen(every, 12)
    assert chosen(some, 12, steps=6) == chosen(every, 12)
    with pytest.raises(ValueError, match="samples = 0"):
        pk.FishMask(samples=0)


@pytest.mark.parametrize("method", [pk.FishMask(keep_ratio=0.1), pk.LeTS(keep_ratio=0.1)], ids=lambda m: m.key)
def test_what_was_trained_is_not_chosen_again(method):
    """Another adapter is calibrated on top of it."""
    model, (x, y) = make("mlp").model, rows()
    pk.attach(model, method, TARGETS)
    pk.calibrate(model, [(x, y)], cross_entropy, progress=False)
    first = masks(model)
    pk.calibrate(model, [(x[:2], y[:2])], cross_entropy, progress=False)
    assert masks(model) != first
    pk.fit(model, [(x, y)], loss_fn=cross_entropy, progress=False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    pk.attach(model, pk.FishMask(keep_ratio=0.1), TARGETS, name="other")
    pk.calibrate(model, [(x, y)], cross_entropy, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if "other" not in name)
    assert all(not tuner.ready() and tuner.sums is None for n in ("default", "other") for _, tuner in tuners(model, n))


def test_a_calibration_that_failed_leaves_nothing_behind():
    model, (x, y) = make("mlp").model, rows()
    pk.attach(model, pk.FishMask(keep_ratio=0.1), TARGETS)
    with pytest.raises(RuntimeError, match="check the batch"):
        pk.calibrate(model, [(x, y), (x * torch.nan, y)], cross_entropy, progress=False)
    assert all("no mask yet" in tuner.ready() for _, tuner in tuners(model, "default"))
    pk.calibrate(model, [(x[:3], y[:3])], cross_entropy, progress=False)
    again = make("mlp").model
    pk.attach(again, pk.FishMask(keep_ratio=0.1), TARGETS)
    pk.calibrate(again, [(x[:3], y[:3])], cross_entropy, progress=False)
    assert masks(model) == masks(again)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_families_keep_exactly_their_part(family):
    """Rows of a fused linear, shared ones and layers without a bias too."""
    case = make(family)
    pk.attach(case.model, pk.FishMask(keep_ratio=0.1), ("q", "v", "down"))
    classifies = case.call(case.model).dim() == 2
    ids = case.inputs.get("decoder_input_ids", case.inputs["input_ids"])
    labels = torch.arange(2) if classifies else ids
    pk.calibrate(case.model, [{**case.inputs, "labels": labels}], progress=False)
    mask = pk.Mask.of(case.model)
    total = sum(out * n for out, n in mask.shapes.values())
    assert len(mask) == round(0.1 * total) == pk.counts(case.model).trainable
