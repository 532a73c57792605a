"""SAID: against the authors' transform and its backward, what a file holds, what is in memory, what moves and how."""

import copy
import hashlib
import json
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from laws import LEVELS, at_level
from models import MLP, assert_same, close, make, perturb, snapshot
from safetensors.torch import load_file
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

TARGETS = ("first", "ln", "second")


def said(dtype=torch.float32, targets=TARGETS, **fields):
    """(MLP case with SAID, its tuners), theta and the factors away from where they start."""
    case = make("mlp", dtype)
    pk.attach(case.model, pk.SAID(**{"d": 60, **fields}), targets, seed=4)
    perturb(case.model)
    return case, [tuner for _, tuner in tuners(case.model, "default")]


def hadamard(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class PublishedTransform(torch.autograd.Function):
    """As in the authors' code: unnormalised forward, and a backward times 1 / sqrt(n)."""

    @staticmethod
    def forward(ctx, x):
        return hadamard(len(x)) @ x

    @staticmethod
    def backward(ctx, grad):
        return hadamard(len(grad)) @ grad / math.sqrt(len(grad))


def published(theta, projection, transform):
    """The authors' Fastfood of all of theta; a negative padding crops."""
    sign, pi_mod, g = projection.matrices
    n, numel = len(g), projection.numel
    assert n == 1 << (numel - 1).bit_length()
    g = g.double() / 4096
    signs = F.pad(sign.double(), (0, n - len(sign)), value=1.0)
    spread = transform(F.pad(theta, (0, n - len(theta))) * signs)
    mixed = transform(spread[pi_mod.long()] * g)
    return mixed[:numel] / (torch.sqrt(n * g.square().sum()) * math.sqrt(numel / n))


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("structure_aware", [True, False])
def test_the_function_and_its_gradient_are_the_published_ones(structure_aware, compat):
    """Without compat_grad_scale the gradient is that of the function."""
    case, own = said(torch.float64, structure_aware=structure_aware, compat_grad_scale=compat)
    transform = PublishedTransform.apply if compat else lambda x: hadamard(len(x)) @ x
    theta = own[0].theta.detach().clone().requires_grad_()
    lams = [torch.ones(2) if t.lam is None else t.lam.detach().clone().requires_grad_() for t in own]
    values = {}
    for (path, tuner), lam in zip(tuners(case.model, "default"), lams, strict=True):
        for name, projection, factor in zip(("weight", "bias"), tuner.projections, lam, strict=False):
            base = getattr(case.model.get_submodule(path), name)
            values[f"{path}.{name}"] = base + factor * published(theta, projection, transform).view(base.shape)
    plain = make("mlp", torch.float64)
    loss = F.cross_entropy(torch.func.functional_call(plain.model, values, plain.inputs["x"]), torch.arange(5) % 3)
    tuned = F.cross_entropy(case.call(case.model), torch.arange(5) % 3)
    close(tuned, loss, torch.float64)
    given = [theta, *(lam for lam in lams if lam.requires_grad)]
    ours = [own[0].theta, *(t.lam for t in own if t.lam is not None)]
    for own_grad, grad in zip(torch.autograd.grad(tuned, ours), torch.autograd.grad(loss, given), strict=True):
        close(own_grad, grad, torch.float64)


def test_gradients_against_finite_differences():
    case, own = said(torch.float64, d=30)
    x = case.inputs["x"]
    names = ["first.peft.default.theta", *(f"{path}.peft.default.lam" for path in TARGETS)]

    def call(*values):
        return torch.func.functional_call(case.model, dict(zip(names, values, strict=True)), x)

    parameters = dict(case.model.named_parameters())
    values = [parameters[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, values, fast_mode=False)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


def test_a_projection_keeps_norms_on_average():
    model = nn.Sequential(*[nn.Linear(40, 30) for _ in range(20)])
    pk.attach(model, pk.SAID(d=100 + 40))
    theta = torch.randn(100, generator=torch.Generator().manual_seed(1))
    ratios = []
    for _, tuner in tuners(model, "default"):
        weight, bias = (torch.zeros(p.numel) for p in tuner.projections)
        tuner.lender.theta.data = theta
        moved, _ = tuner.fold(weight.view(30, 40), bias)
        ratios.append(moved.norm() / theta.norm())
    assert abs(torch.stack(ratios).square().mean() - 1) < 0.1


# -- counts -----------------------------------------------------------------------------------------------------------


def test_counts_of_bert_base():
    """d numbers are trained, with one of them for each tensor; every number of linears and LayerNorms moves."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    pk.attach(model, pk.SAID())
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 20_000 and counts.bytes == 80_000
    assert counts.changed == counts.total - (30_522 + 512 + 2) * 768 == 85_646_592
    assert counts.rank == (12 * 6 + 1) * 768
    own = [tuner for _, tuner in tuners(model, "default")]
    assert len(own) == 12 * 6 + 1 + 25 and own[0].theta.shape == (20_000 - 2 * len(own),)
    assert all(p.matrices is None for tuner in own for p in tuner.projections)


def test_rmsnorms_stay_as_they_are():
    case = make("llama")
    pk.attach(case.model, pk.SAID(d=50))
    paths = [path for path, _ in tuners(case.model, "default")]
    assert len(paths) == 2 * 7 and not any("norm" in path for path in paths)
    with pytest.raises(ValueError, match=r"said cannot tune what \('norm',\) match \(norm\)"):
        pk.attach(make("llama").model, pk.SAID(d=50), ("norm",))


def test_too_few_numbers_for_the_factors():
    case = make("mlp")
    before = snapshot(case.model)
    with pytest.raises(ValueError, match="SAID d = 5 for 5 tensors with a factor each; expected more than 5"):
        pk.attach(case.model, pk.SAID(d=5), TARGETS)
    assert_same(case.model, before)
    pk.attach(case.model, pk.SAID(d=5, structure_aware=False), TARGETS)
    assert [name for name, p in case.model.named_parameters() if p.requires_grad] == ["first.peft.default.theta"]
    with pytest.raises(ValueError, match="d = 0; expected at least 1"):
        pk.SAID(d=0)
    vocabulary = nn.Sequential(nn.Embedding(2**20, 65, device="meta"))
    with pytest.raises(ValueError, match=r"SAID at 0, which has 68,157,440 weights; at most 2\^26"):
        pk.attach(vocabulary, pk.SAID(), ("0",))


# -- places -----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Every kind of layer that it tunes."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 8, 3, padding=1)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.out(self.norm(self.conv(self.embed(ids).mT).mT))


def test_every_kind_of_layer_moves_in_the_order_of_its_memory():
    """The published code takes a tensor as it lies in memory; merging writes what the forward runs with, bit by bit."""
    torch.manual_seed(1)
    model, ids = Mixed(), torch.arange(10).view(2, 5)
    before = snapshot(model)
    pk.attach(model, pk.SAID(d=40), ("embed", "conv", "norm", "out"))
    perturb(model)
    tuned = model(ids)
    own = dict(tuners(model, "default"))
    pk.merge(model)
    assert torch.equal(model(ids), tuned)
    theta = own["embed"].theta.detach().double()
    for path, tuner in own.items():
        for name, p, lam in zip(("weight", "bias"), tuner.projections, tuner.lam, strict=False):
            base = before[f"{path}.{name}"]
            moved = lam.double() * published(theta, p, lambda x: hadamard(len(x)) @ x)
            close(getattr(model.get_submodule(path), name).data, (base + moved.view(base.shape)).float())


def test_rows_of_a_fused_linear_have_projections_of_their_own():
    case = make("gpt2")
    pk.attach(case.model, pk.SAID(d=50), ("q", "v"))
    perturb(case.model)
    tuned = case.call(case.model)
    before = case.model.transformer.h[0].attn.c_attn.weight.clone()
    pk.merge(case.model)
    close(case.call(case.model), tuned)
    moved = (case.model.transformer.h[0].attn.c_attn.weight - before).detach()  # [in, q k v]
    q, k, v = moved.split(16, dim=1)
    assert not k.any() and q.all() and v.all() and not torch.allclose(q, v)


def test_adapters_and_parts_have_a_theta_each():
    case = make("mlp")
    pk.attach(case.model, pk.Union(pk.at("first", pk.SAID(d=9)), pk.at(("first", "second"), pk.SAID(d=8))))
    assert pk.counts(case.model).trainable == 17
    thetas = {n: p.numel() for n, p in case.model.named_parameters() if n.endswith("theta")}
    assert thetas == {"first.peft.default.0.theta": 7, "first.peft.default.1.theta": 5}
    perturb(case.model)
    tuned = case.call(case.model)
    pk.merge(case.model)
    close(case.call(case.model), tuned)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_holds_theta_and_the_factors(tmp_path):
    case, own = said()
    pk.save(case.model, tmp_path / "a")
    values = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in values.items()} == {
        "first.theta": (60 - 5,),
        "first.lam": (2,),
        "ln.lam": (2,),
        "second.lam": (1,),
    }
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["seed"] == 4
    fresh = make("mlp")
    pk.load(fresh.model, tmp_path / "a", "b")
    assert torch.equal(fresh.call(fresh.model), case.call(case.model))
    another = pk.attach(make("mlp").model, pk.SAID(d=60), TARGETS, seed=5)
    g = [tuner.projections[0].matrices[2] for _, tuner in tuners(another, "default")]
    assert not any(torch.equal(other, tuner.projections[0].matrices[2]) for other, tuner in zip(g, own, strict=True))


def digest(model):
    """Of the trained numbers, the matrices, and the weights of the base with the tuners folded in."""
    sha = hashlib.sha256()
    for path, tuner in tuners(model, "default"):
        found = [t for p in tuner.projections for t in p.matrices]
        module = model.get_submodule(path)
        folded = [t for t in tuner.fold(module.weight, module.bias) if t is not None]
        for t in (*tuner.parameters(), *found, *folded):
            sha.update(t.detach().numpy().tobytes())
        sha.update(repr([p.norm for p in tuner.projections]).encode())
    return sha.hexdigest()


@pytest.mark.parametrize("level", LEVELS)
def test_a_file_is_read_to_the_same_bits_by_other_instructions(level, tmp_path):
    case, _ = said()
    pk.save(case.model, tmp_path / "a")
    code = (
        "import sys, torch, peft_kernels as pk; from models import make; from methods.test_said import digest\n"
        "case = make('mlp'); pk.load(case.model, sys.argv[1]); print(digest(case.model))"
    )
    assert at_level(level, code, tmp_path / "a").strip() == digest(case.model)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_matrices_take_four_bytes_for_each_padded_number():
    model = nn.Sequential(nn.Linear(100, 60), nn.LayerNorm(60))
    pk.attach(model, pk.SAID(d=1000))
    for _, tuner in tuners(model, "default"):
        for p in tuner.projections:
            sign, pi_mod, g = p.matrices
            n = 1 << (p.numel - 1).bit_length()
            assert pi_mod.nbytes + g.nbytes == 4 * n and sign.nbytes == min(996, n)
    pk.attach(model, pk.SAID(d=40_000), ("0",), name="long")
    ((_, long),) = tuners(model, "long")
    assert [len(p.matrices[2]) for p in long.projections] == [8192, 64]  # no longer than the tensor asks for
    assert not list(model.buffers()) and pk.counts(model, "long").stored == 40_000


def test_copies_share_the_matrices_and_pickles_leave_them_out():
    case, own = said()
    twin = copy.deepcopy(case.model)
    for (_, other), tuner in zip(tuners(twin, "default"), own, strict=True):
        assert other.projections[0] is not tuner.projections[0]
        assert other.projections[0].matrices is tuner.projections[0].matrices
        assert other.lender is not tuner.lender and other.lender is next(iter(tuners(twin, "default")))[1]
    big = nn.Sequential(nn.Linear(256, 256))
    pk.attach(big, pk.SAID(d=30))
    data = pickle.dumps(big)
    assert len(data) < 4 * 256 * 257 + 20_000 < 4 * 65536 * 2
    thawed = pickle.loads(data)
    ((_, old),), ((_, new),) = tuners(big, "default"), tuners(thawed, "default")
    for p, q in zip(old.projections, new.projections, strict=True):
        assert p.norm == q.norm and all(torch.equal(t, u) for t, u in zip(p.matrices, q.matrices, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_leaves_the_matrices_alone(dtype):
    case, own = said()
    expected, matrices = case.call(case.model), [p.matrices for tuner in own for p in tuner.projections]
    case.model.to(dtype)
    assert own[0].theta.dtype == own[0].lam.dtype == dtype
    x = case.inputs["x"].to(dtype)
    torch.testing.assert_close(case.model(x).float(), expected, atol=0.1, rtol=0.1)
    case.model(x).float().sum().backward()
    assert own[0].theta.grad.abs().sum() > 0
    assert all(p.matrices is m for p, m in zip((p for t in own for p in t.projections), matrices, strict=True))


def test_meta_tensors_that_become_real_get_their_matrices():
    case, own = said()
    with torch.device("meta"):
        hollow = MLP()
    pk.attach(hollow, pk.SAID(d=60), TARGETS, seed=4)
    assert hollow(case.inputs["x"].to("meta")).is_meta
    hollow.to_empty(device="cpu")
    hollow.load_state_dict(case.model.state_dict())
    with torch.inference_mode():
        assert torch.equal(hollow(case.inputs["x"]), case.call(case.model))
    hollow(case.inputs["x"]).sum().backward()
    assert digest(hollow) == digest(case.model)
    twin = copy.deepcopy(case.model).to("meta").to_empty(device="cpu")
    twin.load_state_dict(case.model.state_dict())
    assert torch.equal(twin(case.inputs["x"]), case.call(case.model))


def test_no_tuned_weight_is_held_between_forward_and_backward(monkeypatch):
    case, own = said()
    made, real = [], pk.ops.fastfood

    def spy(*args, **kwargs):
        out = real(*args, **kwargs)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(pk.ops, "fastfood", spy)
    loss = case.loss(case.model)
    matrices = [ref for ref, name in zip(made, ("w", "b", "w", "b", "w"), strict=True) if name == "w"]
    assert matrices[0]() is None and matrices[2]() is None  # the norm's is a vector, which is not made twice
    loss.backward()
    assert len(made) == 5 + 3 and own[0].theta.grad.abs().sum() > 0
    made.clear()
    with torch.no_grad():
        case.call(case.model)
    assert len(made) == 5


def test_a_backward_has_the_numbers_of_its_forward():
    """Though the tuned weight is made again: under functional_call, whose numbers are gone by then."""
    case, own = said(torch.float64)
    theta = own[0].theta.detach().clone().mul_(3).requires_grad_()
    y = torch.func.functional_call(case.model, {"first.peft.default.theta": theta}, case.inputs["x"])
    (grad,) = torch.autograd.grad(y.square().sum(), theta)
    own[0].theta.data.mul_(3)
    (expected,) = torch.autograd.grad(case.call(case.model).square().sum(), own[0].theta)
    close(grad, expected, torch.float64)


def test_functorch_transforms():
    case, own = said(torch.float64)

    def loss(theta):
        return torch.func.functional_call(case.model, {"first.peft.default.theta": theta}, case.inputs["x"]).sum()

    theta = own[0].theta.detach()
    (expected,) = torch.autograd.grad(case.call(case.model).sum(), own[0].theta)
    close(torch.func.grad(loss)(theta), expected, torch.float64)
    _, tangent = torch.func.jvp(loss, (theta,), (torch.ones_like(theta),))
    close(tangent, expected.sum(), torch.float64)
