"""SVD: what the factors are, which layers get them, and what it costs to be wrong about the layer."""

import math

import pytest
import torch
from models import close, make, perturb, snapshot
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

FORMS = pytest.mark.parametrize("form", ["svd", "kron"])


def layer(module):
    torch.manual_seed(0)
    model = nn.Sequential(module)
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def tuner_of(model):
    ((_, tuner),) = tuners(model, "default")
    return tuner


def test_golden():
    model = layer(nn.Linear(12, 12, bias=False))
    model[0].weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0] + [0.0] * 9))
    pk.attach(model, pk.SVD(rank=2), ("0",))
    (row,) = pk.SVD.report(model)
    assert row["error"] * math.sqrt(14) == pytest.approx(1, rel=1e-6)
    counts = pk.counts(model)
    assert (counts.trainable, counts.changed, counts.rank, counts.stored) == (48, 144, 2, 48)
    assert torch.allclose(model(torch.eye(12)), torch.diag(torch.tensor([3.0, 2.0] + [0.0] * 10)), atol=1e-6)


@FORMS
def test_the_factors_are_the_nearest(form):
    model = layer(nn.Linear(24, 18))
    weight, x = model[0].weight.detach().clone(), torch.randn(5, 24)
    pk.attach(model, pk.SVD(rank=3, form=form, factor=6 if form == "kron" else 0), ("0",))
    if form == "svd":
        a, b, error = pk.truncated_svd(weight, 3)
        product = b @ a
    else:
        a, b, error = pk.nearest_kronecker(weight, (6, 6), 3)
        product = sum(torch.kron(p, q) for p, q in zip(a, b, strict=True))
    assert torch.allclose(model(x), x @ product.T + model[0].bias, atol=1e-5)
    (row,) = pk.SVD.report(model)
    assert row["error"] == pytest.approx(error, rel=1e-4)
    assert row["numbers"] == pk.counts(model).trainable == a.numel() + b.numel()
    before = model(x)
    pk.merge(model)
    assert torch.allclose(model[0].weight, product, atol=1e-6) and torch.allclose(model(x), before, atol=1e-5)
    pk.unmerge(model)
    assert torch.equal(model[0].weight, weight)


def test_energy_gives_each_layer_its_rank():
    model = layer(nn.Linear(20, 30))
    s = torch.linalg.svdvals(model[0].weight.detach().double()).square()
    pk.attach(model, pk.SVD(energy=0.7), ("0",))
    rank = int((s.cumsum(0) / s.sum() < 0.7).sum()) + 1
    (row,) = pk.SVD.report(model)
    assert row["rank"] == rank <= row["most"] == (30 * 20 - 1) // 50
    assert row["error"] ** 2 <= 0.3


def test_a_layer_that_would_not_get_smaller_is_left_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 40)

        def forward(self, x):
            return self.large(self.small(x))

    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 4)
    expected = model.large(model.small(x))
    pk.attach(model, pk.SVD(rank=2), ("small", "large"))
    small, large = pk.SVD.report(model)
    assert (small["rank"], small["most"], small["numbers"], small["error"]) == (0, 1, 16, 0.0)
    assert (large["rank"], large["numbers"], large["dense"]) == (2, 88, 160)
    lines = str(pk.SVD.report(model)).splitlines()
    assert "as it is" in lines[1] and "2 <= 3" in lines[2] and lines[-1].split()[:4] == ["2", "layers", "104", "176"]
    assert pk.counts(model).changed == 160
    with torch.no_grad():
        half = model.small(x)
    assert torch.equal(half, nn.functional.linear(x, model.small.weight, model.small.bias))
    assert not torch.allclose(model(x), expected)
    pk.merge(model)
    with pytest.raises(RuntimeError, match="is merged"):
        pk.SVD.report(model)


@pytest.mark.parametrize("fields", [{"rank": 8}, {"energy": 1.0}, {"rank": 64, "form": "kron"}], ids=str)
def test_nothing_gets_smaller(fields):
    model = layer(nn.Linear(16, 16))
    before = snapshot(model)
    with pytest.raises(ValueError, match="makes none of the targets smaller.*rank of at most"):
        pk.attach(model, pk.SVD(**fields), ("0",))
    assert snapshot(model).keys() == before.keys()
    pk.attach(model, pk.SVD(rank=7), ("0",))


CASES = {
    "conv": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 7, 5)),
    "conv without batch": (lambda: nn.Conv1d(6, 8, 3), lambda: torch.randn(6, 9)),
    "groups": (lambda: nn.Conv1d(6, 8, 3, groups=2), lambda: torch.randn(2, 6, 9)),
    "embedding": (lambda: nn.Embedding(30, 8, padding_idx=0), lambda: torch.randint(0, 30, (2, 5))),
    "no rows": (lambda: nn.Linear(12, 8), lambda: torch.randn(0, 12)),
    "one row": (lambda: nn.Linear(12, 8), lambda: torch.randn(12)),
}


@FORMS
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_fold(case, form):
    make_layer, make_input = CASES[case]
    model = layer(make_layer()).double()
    x = make_input()
    x = x.double() if x.is_floating_point() else x
    pk.attach(model, pk.SVD(rank=2, form=form), ("0",))
    perturb(model)
    tuner = tuner_of(model)
    fast = model(x)
    gradients = torch.autograd.grad(fast.square().sum(), list(tuner.parameters()))
    tuner.forward = pk.Tuner.forward.__get__(tuner)
    slow = model(x)
    close(fast, slow, torch.float64)
    for one, other in zip(gradients, torch.autograd.grad(slow.square().sum(), list(tuner.parameters())), strict=True):
        close(one, other, torch.float64)
    del tuner.forward
    pk.merge(model)
    close(model(x), fast, torch.float64)


def test_kron_takes_the_cheaper_way(monkeypatch):
    """Term by term for few rows, through the whole weight for many terms on many rows; both compute the fold."""
    model = layer(nn.Linear(64, 64))
    pk.attach(model, pk.SVD(rank=8, form="kron"), ("0",))
    seen = []
    for op in ("kron_linear", "kron_sum_weight"):
        call = getattr(pk.ops, op)
        monkeypatch.setattr(pk.ops, op, lambda *a, op=op, call=call, **k: (seen.append(op), call(*a, **k))[1])
    tuner = tuner_of(model)
    for rows, op in ((1, "kron_linear"), (512, "kron_sum_weight")):
        x = torch.randn(rows, 64)
        y = model(x)
        assert seen.pop() == op and not seen
        weight, bias = tuner.fold(model[0].weight, model[0].bias)
        assert torch.allclose(y, x @ weight.T + bias, atol=1e-4)


@FORMS
@pytest.mark.parametrize("family", ["bert", "gpt2", "falcon"])  # linears, transposed ones, rows of fused ones
def test_forms_in_models(form, family, tmp_path):
    case = make(family)
    pk.attach(case.model, pk.SVD(energy=0.5, form=form))
    perturb(case.model)
    expected = case.call(case.model)
    pk.merge(case.model)
    close(case.call(case.model), expected)
    pk.unmerge(case.model)
    pk.save(case.model, tmp_path / "adapter")
    fresh = make(family)
    with torch.no_grad():  # the ranks are those of the file, whatever these weights ask for
        for p in fresh.model.parameters():
            p.copy_(torch.randn_like(p))
        base = dict(case.model.named_parameters())
        pk.load(fresh.model, tmp_path / "adapter")
        for n, p in fresh.model.named_parameters():
            p.copy_(base[n])
    close(fresh.call(fresh.model), expected)
    assert pk.counts(fresh.model).stored == pk.counts(case.model).stored


def test_adapters_below_and_above():
    model, x = layer(nn.Linear(16, 16)), torch.randn(3, 16)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    for name in ("below", "above"):
        pk.attach(model, pk.LoRA(rank=2), ("0",), name=name)
        perturb(model, name)
        if name == "below":
            pk.attach(model, pk.SVD(rank=3), ("0",), name="svd")
    changes = []
    for name in ("below", "above"):
        ((_, tuner),) = tuners(model, name)
        changes.append(tuner.fold(torch.zeros(16, 16), None)[0])
    a, b, _ = pk.truncated_svd(weight, 3)
    expected = x @ (b @ a + sum(changes)).T + bias
    assert torch.allclose(model(x), expected, atol=1e-4)
    pk.merge(model)
    assert torch.allclose(model(x), expected, atol=1e-4)
    pk.unmerge(model)
    assert torch.equal(model[0].weight, weight)


def test_the_packed_weight_is_not_read(monkeypatch):
    model = pk.quantize(layer(nn.Linear(64, 32)), "int8")
    weight, bias = model[0].dense(), model[0].bias
    pk.attach(model, pk.SVD(rank=4), ("0",))
    monkeypatch.setattr(pk.Int8Linear, "dense", None)
    a, b, error = pk.truncated_svd(weight, 4)
    x = torch.randn(3, 64)
    assert torch.allclose(model(x), x @ (b @ a).T + bias, atol=1e-4)
    monkeypatch.undo()
    assert pk.SVD.report(model)[0]["error"] == pytest.approx(error, rel=1e-4)


def test_union_and_rows_of_the_report():
    case = make("falcon")
    pk.attach(case.model, pk.Union(pk.SVD(rank=2), pk.LoRA(rank=1)))
    report = pk.SVD.report(case.model)
    assert any(row["site"].startswith("q@") for row in report)
    assert len({row["site"] for row in report}) == len(report)


def test_refusals(tmp_path):
    for fields, match in (
        ({"rank": -1}, "rank of at least 0"),
        ({"energy": 0.0}, "an energy in"),
        ({"energy": 1.5}, "an energy in"),
        ({"form": "qr"}, "'svd' or 'kron'"),
        ({"form": "kron", "factor": -2}, "factor = -2"),
    ):
        with pytest.raises(ValueError, match=match):
            pk.SVD(**fields)
    with pytest.raises(ValueError, match="factor = 5 at"):
        pk.attach(layer(nn.Linear(16, 16)), pk.SVD(form="kron", factor=5), ("0",))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="reads its weight"):
        pk.attach(model, pk.SVD(), ("0",))
    pk.attach(model, pk.SVD(rank=2), ("0",))
    assert pk.counts(model).trainable == 64
    pk.save(pk.attach(layer(nn.Linear(16, 16)), pk.SVD(rank=2), ("0",)), tmp_path / "a")
    with pytest.raises(ValueError, match="a is .2, 16. and b .16, 2.; expected"):
        pk.load(layer(nn.Linear(20, 20)), tmp_path / "a")


@pytest.mark.parametrize(
    ("method", "function"),
    [
        (pk.SVD(rank=2), "svd.truncated_svd"),
        (pk.SVD(energy=0.5), "svd.truncated_svd"),
        (pk.SVD(energy=0.3, form="kron"), "svd.truncated_svd"),
        (pk.KronA(init="nearest"), "krona.nearest_kronecker"),
    ],
)
def test_loading_factorises_nothing(method, function, tmp_path, monkeypatch):
    case = make("bert")
    pk.attach(case.model, method)
    perturb(case.model)
    expected = case.call(case.model)
    where = pk.save(case.model, tmp_path / "adapter")
    monkeypatch.delattr(f"peft_kernels.methods.{function}")
    again = make("bert")
    pk.load(again.model, where)
    assert torch.equal(case.call(again.model), expected)
