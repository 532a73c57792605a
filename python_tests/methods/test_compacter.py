"""Compacter and PHM layers against sums of torch.kron, the paper's counts, and what all adapters share."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import EVERY, assert_same, attached, close, make, perturb, snapshot, targets_of
from safetensors.torch import load_file
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.fit import param_groups
from peft_kernels.methods._bottleneck import ACTIVATIONS
from peft_kernels.methods.compacter import CompacterTuner


def dense(a, layer):
    """[in, out], the sum of explicit Kronecker products"""
    b = layer.u @ layer.v if layer.rank else layer.b
    return sum(torch.kron(a[i], b[i]) for i in range(len(a)))


def t5_base(method, **kwargs):
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, d_kv=64))
    return pk.attach(model, method, **kwargs)


def adapters(model, name="default"):
    """path -> the Compacter tuner there, those inside a gate too"""
    inside = ((path, t) for path, tuner in tuners(model, name) for t in tuner.modules())
    return {path: t for path, t in inside if isinstance(t, CompacterTuner)}


# -- PHM layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(64, 16, 4), (16, 64, 4), (12, 20, 2), (6, 3, 3), (5, 7, 1), (8, 8, 8)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_layer_is_its_sum_of_kronecker_products(sizes, rank):
    torch.manual_seed(0)
    n_in, n_out, n = sizes
    layer = pk.PHMLinear(n_in, n_out, n, rank, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(2, 3, n_in, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, n_out, dtype=torch.float64)
    y, truth = layer(x), x @ dense(layer.a, layer) + layer.bias
    close(y, truth, torch.float64)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(t, inputs, weight) for t in (y, truth)), strict=True):
        close(ours, theirs, torch.float64)
    close(layer(x.transpose(0, 1)), truth.transpose(0, 1), torch.float64)
    assert layer(x[:0]).shape == (0, 3, n_out)


def test_a_layer_of_full_rank_has_a_fourth_of_the_numbers():
    count = sum(p.numel() for p in pk.PHMLinear(768, 768, 4).parameters())
    assert count == 4**3 + 768 * 768 // 4 + 768
    assert sum(p.numel() for p in pk.PHMLinear(768, 24, rank=1, bias=False).parameters()) == 4**3 + 768 + 24


def test_the_start_of_a_layer():
    """W has twice Xavier's variance; std sets A's alone."""
    torch.manual_seed(0)
    layer = pk.PHMLinear(512, 256, 8)
    assert dense(layer.a, layer).var().item() == pytest.approx(2 * 2 / (512 + 256), rel=0.2)
    assert layer.bias.abs().max() == 0
    assert pk.PHMLinear(64, 64, 16, std=0.5).a.std().item() == pytest.approx(0.5, rel=0.05)
    torch.manual_seed(0)
    again = pk.PHMLinear(512, 256, 8)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), layer.parameters(), strict=True))
    with torch.device("meta"):
        assert all(p.is_meta for p in pk.PHMLinear(8, 8, 2).parameters())
    assert {p.device.type for p in pk.PHMLinear(8, 8, 2, device="meta").parameters()} == {"meta"}
    low = pk.PHMLinear(16, 8, rank=1, dtype=torch.bfloat16)
    assert low(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_that_share_a():
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(2, 2, 2))
    model = nn.Sequential(pk.PHMLinear(8, 4, 2, a=a), nn.Tanh(), pk.PHMLinear(4, 8, 2, rank=1, a=a))
    assert model[0].a is model[2].a is a and sum(p is a for p in model.parameters()) == 1
    x = torch.randn(3, 8)
    model(x).sum().backward()
    alone = nn.Sequential(pk.PHMLinear(8, 4, 2), nn.Tanh(), pk.PHMLinear(4, 8, 2, rank=1))
    alone.load_state_dict(model.state_dict())
    alone(x).sum().backward()
    close(a.grad, alone[0].a.grad + alone[2].a.grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pk.PHMLinear(770, 24, 4), r"n = 4 does not divide in_features = 770 and .* such as n = 2"),
        (lambda: pk.PHMLinear(8, 8, 0), r"n = 0 does not divide"),
        (lambda: pk.PHMLinear(8, 8, 2, -1), r"rank = -1; expected at least 1, or 0"),
        (
            lambda: pk.PHMLinear(8, 8, 2, a=nn.Parameter(torch.zeros(4, 4, 4))),
            r"a is \(4, 4, 4\); expected \(2, 2, 2\)",
        ),
        (lambda: pk.Compacter(activation="wing"), r"activation = 'wing'; expected one of relu"),
        (lambda: pk.CompacterPP(reduction_factor=0), r"reduction_factor = 0, rank = 1; expected at least 1 and 0"),
        (
            lambda: pk.attach(make("bert").model, pk.Compacter(reduction_factor=2, n=3)),
            r"Compacter at \S+: n = 3 does not divide features = 16 and bottleneck = 8; .* n = 2, or another reduc",
        ),
        (
            lambda: pk.attach(make("bert").model, pk.CompacterPP()),
            r"CompacterPP reduction_factor = 32 leaves nothing of the 16 features of \S+; expected at most 16",
        ),
        (
            lambda: pk.attach(nn.Sequential(nn.Linear(8, 8)), pk.Compacter(n=2, reduction_factor=2), ("0",)),
            "no target layer has a LayerNorm; pass norms=False",
        ),
    ],
)
def test_errors_name_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- counts and places ------------------------------------------------------------------------------------------------


def test_counts_of_the_paper():
    """T5-base: 48 adapters of 2 (768 + 24) + 24 + 768 numbers, or 24, one A of 64, and 62 LayerNorms of 768."""
    norms = 62 * 768
    assert norms == 47_616
    for method, adapters_alone in ((pk.Compacter, 114_112), (pk.CompacterPP, 57_088)):
        for trained, total in ((False, adapters_alone), (True, adapters_alone + norms)):
            counts = pk.counts(t5_base(method(norms=trained)))
            assert counts.trainable == counts.stored == total
            assert counts.changed == (norms if trained else 0) and counts.rank == 0
    dense = pk.counts(t5_base(pk.CompacterPP(norms=False, rank=0))).trainable
    assert dense == 24 * (2 * 768 * 24 // 4 + 24 + 768) + 64


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "bert cross"])
def test_cross_attention_is_a_target_only_by_name(family):
    fields = {"n": 2, "reduction_factor": 2, "norms": False}
    paths = set(adapters(pk.attach(make(family).model, pk.Compacter(**fields))))
    cross = set(adapters(pk.attach(make(family).model, pk.Compacter(**fields), "cross.o")))
    assert cross and not paths & cross
    assert (
        set(adapters(pk.attach(make(family).model, pk.Compacter(**fields), ("o", "cross.o", "down")))) == paths | cross
    )
    within = pk.attach(make(family).model, pk.Union(pk.Compacter(**fields), pk.IA3()))
    assert set(adapters(within)) == paths
    feedforward = set(adapters(pk.attach(make(family).model, pk.CompacterPP(**fields))))
    assert feedforward < paths and feedforward == set(
        adapters(pk.attach(make(family).model, pk.Compacter(**fields), "down"))
    )


@pytest.mark.parametrize("family", EVERY)
def test_the_layernorms_are_those_of_the_model(family):
    case = make(family)
    pk.attach(case.model, pk.Compacter(n=2, reduction_factor=2), targets_of("compacter", family))
    norms = {path for path, _ in tuners(case.model, "default")} - set(adapters(case.model))
    found = {path for path, m in make(family).model.named_modules() if type(m).__name__.endswith("Norm")}
    heads = {path for path in found if "head" in path or path.startswith("cls")}
    assert norms == found - heads
    assert {g["lr"] for g in param_groups(case.model)} == {3e-3}
    assert {g["lr"] for g in param_groups(case.model, 1e-2)} == {1e-2}


def test_layers_and_exclude_hold_for_the_layernorms_too():
    case = make("bert")
    pk.attach(case.model, pk.CompacterPP(n=2, reduction_factor=2), layers=1, exclude="*.attention.output.LayerNorm")
    paths = [path.removeprefix("bert.encoder.") for path, _ in tuners(case.model, "default")]
    assert paths == ["layer.1.output.dense", "layer.1.output.LayerNorm"]


# -- the adapter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("width", "n", "rank", "thin"), [(16, 4, 1, False), (16, 2, 0, False), (64, 2, 1, True)])
def test_the_adapter_is_its_definition(activation, width, n, rank, thin):
    """After the linear: h + up(act(down(h))), gradients included, by built weights and by thin products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width)).double()
    method = pk.CompacterPP(n=n, reduction_factor=2, rank=rank, activation=activation, norms=False)
    pk.attach(model, method, ("0",))
    perturb(model)
    ((_, t),), x = tuners(model, "default"), torch.randn(5, 6, dtype=torch.float64)
    assert (t.down.thinness < 0.5) is (t.up.thinness < 0.5) is thin
    acts = {
        "relu": torch.relu,
        "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
        "gelu_tanh": lambda z: z * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "silu": lambda z: z * torch.sigmoid(z),
        "tanh": torch.tanh,
        "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
        "identity": lambda z: z,
    }
    h = F.linear(x, model[0].weight, model[0].bias)
    z = acts[activation](h @ dense(t.a, t.down) + t.down.bias)
    truth, y = h + z @ dense(t.a, t.up) + t.up.bias, model(x)
    close(y, truth, torch.float64)
    params = list(t.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(o.square().sum(), params) for o in (y, truth)), strict=True):
        close(ours, theirs, torch.float64)


def test_it_starts_as_the_paper_does():
    """A of standard deviation 1e-4, Xavier with gain sqrt(2) for each u_i and v_i, no bias: less than rounding."""
    case = make("bert")
    base = case.call(case.model)
    pk.attach(case.model, pk.Compacter(n=8, reduction_factor=2), seed=1)
    assert (case.call(case.model) - base).abs().max() < 1e-6
    first, *others = adapters(case.model).values()
    assert first.a.std().item() == pytest.approx(1e-4, rel=0.15) and abs(first.a.mean().item()) < 2e-5
    assert not any(hasattr(t, "a") for t in others) and all(t.lender is first for t in others)
    for t in (first, *others):
        for factor in (t.down.u, t.down.v, t.up.u, t.up.v):
            bound = math.sqrt(2) * math.sqrt(6 / (factor.shape[1] + factor.shape[2]))
            assert 0.7 * bound < factor.abs().max() <= bound
        assert t.down.bias.abs().max() == t.up.bias.abs().max() == 0
    assert not torch.equal(first.down.u, others[0].down.u)


def test_the_gradient_of_a_is_the_sum_over_all_layers():
    case = attached("compacter", "bert", torch.float64)
    perturb(case.model)
    first, *others = own = list(adapters(case.model).values())
    assert len(own) == 4
    case.loss(case.model).backward()
    shared = {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    for t in others:
        t.a = nn.Parameter(first.a.detach().clone())
        vars(t)["lender"] = t
    case.loss(case.model).backward()
    total = sum(t.a.grad for t in own)
    assert all((total - t.a.grad).abs().max() > 1e-6 for t in own)
    (name,) = (n for n in shared if n.endswith(".a"))
    close(shared[name], total, torch.float64)
    for n, p in case.model.named_parameters():
        if n in shared and n != name:
            close(shared[n], p.grad, torch.float64)


def test_a_is_saved_once(tmp_path):
    case = attached("compacter", "t5")
    perturb(case.model)
    before = snapshot(case.model)
    names = list(load_file(pk.save(case.model, tmp_path / "adapter") / "adapter_model.safetensors"))
    assert sum(name.endswith(".a") for name in names) == 1
    fresh = make("t5")
    pk.load(fresh.model, tmp_path / "adapter")
    close(fresh.call(fresh.model), case.call(case.model))
    assert_same(case.model, before)


def test_each_adapter_has_an_a_of_its_own():
    method = pk.Compacter(n=2, reduction_factor=2, norms=False)
    model = make("bert").model
    pk.attach(model, method, name="one")
    pk.attach(model, method, name="two")
    assert len({id(t.lender) for name in ("one", "two") for t in adapters(model, name).values()}) == 2
    model = pk.attach(make("bert").model, pk.Union(method, pk.at("q", method)))
    assert len({id(t.lender) for t in adapters(model).values()}) == 2


def test_gated_adapters_share_a_and_train_the_layernorms():
    case, method = make("bert"), pk.Compacter(n=2, reduction_factor=2)
    plain = pk.attach(make("bert").model, method)
    pk.attach(case.model, pk.Gated(method))
    perturb(case.model)
    assert [path for path, _ in tuners(case.model, "default")] == [path for path, _ in tuners(plain, "default")]
    gated = list(adapters(case.model).values())
    assert len(gated) == 4 and all(t.lender is gated[0] for t in gated)
    case.loss(case.model).backward()
    assert gated[0].a.grad.abs().max() > 0
    assert all(p.grad is not None for p in case.model.parameters() if p.requires_grad)


# -- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 768])
def test_parity_with_adapter_hub(width):
    library = pytest.importorskip("adapters", exc_type=ImportError)
    modeling = pytest.importorskip("adapters.methods.modeling", exc_type=ImportError)
    torch.manual_seed(0)
    config = library.CompacterPlusPlusConfig(shared_phm_rule=False, reduction_factor=16)
    theirs = modeling.Adapter("x", width, width // 16, config)
    model = nn.Sequential(nn.Linear(8, width))
    pk.attach(model, pk.CompacterPP(reduction_factor=16, norms=False), ("0",))
    perturb(model)
    ((_, t),), x = tuners(model, "default"), torch.randn(5, 8)
    with torch.no_grad():
        for ours, layer in ((t.down, theirs.adapter_down[0]), (t.up, theirs.adapter_up)):
            layer.phm_rule.copy_(t.a)
            layer.W_left.copy_(ours.u)
            layer.W_right.copy_(ours.v)
            layer.b.copy_(ours.bias)
    h = F.linear(x, model[0].weight, model[0].bias)
    truth = theirs(h, h)[0]
    close(model(x), truth)
    model(x).square().sum().backward()
    truth.square().sum().backward()
    rules = [layer.phm_rule.grad for layer in (theirs.adapter_down[0], theirs.adapter_up)]
    torch.testing.assert_close(t.a.grad, rules[0] + rules[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.down.u.grad, theirs.adapter_down[0].W_left.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.up.v.grad, theirs.adapter_up.W_right.grad, rtol=1e-4, atol=1e-4)
