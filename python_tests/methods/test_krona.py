"""KronA and KronARes against dense Kronecker products, their counts, and where they start."""

import math

import pytest
import torch
from models import EVERY, KINDS, attached, close, make, perturb
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.factor import nearest_kronecker
from peft_kernels.engine.stack import Parts, Spanned
from peft_kernels.methods.krona import shapes, split


def bert_base(method, *targets):
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    return pk.attach(model, method, targets or None)


def one(n_in=12, n_out=20, dtype=torch.float64, **fields):
    """(a linear with KronA away from its start, the tuner, an input)"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_in, n_out)).to(dtype)
    perturb(pk.attach(model, pk.KronA(**fields), ("0",)))
    return model, next(t for _, t in tuners(model, "default")), torch.randn(3, 5, n_in, dtype=dtype)


def whole(tuner):
    """The tuner, out of what the engine wraps around it."""
    return tuner.tuner if isinstance(tuner, Spanned) else tuner


# -- the definition ---------------------------------------------------------------------------------------------------


def test_the_product_of_the_survey():
    """kron([[1, 2], [3, 4]], [[0, 5], [6, 7]]) times [1, 2, 3, 4] is [50, 112, 110, 244]."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    pk.attach(model, pk.KronA(factor=2, scale=0.5), ("0",))
    (_, tuner), x = next(tuners(model, "default")), torch.tensor([[1.0, 2, 3, 4]])
    base = model(x)
    with torch.no_grad():
        tuner.a.copy_(torch.tensor([[1, 2], [3, 4]]))
        tuner.b.copy_(torch.tensor([[0, 5], [6, 7]]))
    close(model(x) - base, torch.tensor([[25.0, 56, 55, 122]]))
    changed = tuner.fold(torch.zeros(4, 4), None)[0]
    assert (2 * changed).tolist() == [[0, 5, 0, 10], [6, 7, 12, 14], [0, 15, 0, 20], [18, 21, 24, 28]]


@pytest.mark.parametrize("sizes", [(12, 20), (7, 12), (1, 6), (16, 16), (30, 5)])
def test_forward_and_gradients_are_those_of_the_dense_product(sizes):
    model, tuner, x = one(*sizes, scale=0.7)
    x.requires_grad_()
    y = model(x)
    dense = nn.functional.linear(x, model[0].weight + 0.7 * torch.kron(tuner.a, tuner.b), model[0].bias)
    close(y, dense, torch.float64)
    weight = torch.randn_like(y)
    for own, other in zip(
        *(torch.autograd.grad((out * weight).sum(), [x, tuner.a, tuner.b]) for out in (y, dense)), strict=True
    ):
        close(own, other, torch.float64)


def test_a_convolution_takes_it_over_channels_and_kernel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    perturb(pk.attach(model, pk.KronA(), ("0",)))
    (_, tuner), x = next(tuners(model, "default")), torch.randn(2, 4, 7, 7).double()
    weight = model[0].weight + torch.kron(tuner.a, tuner.b).view(model[0].weight.shape)
    close(model(x), nn.functional.conv2d(x, weight, model[0].bias, groups=2), torch.float64)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_768_by_768_takes_1536_numbers_of_rank_576():
    model = bert_base(pk.KronA())
    tuner = next(t for _, t in tuners(model, "default"))
    assert (tuple(tuner.a.shape), tuple(tuner.b.shape)) == ((24, 32), (32, 24))
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 24 * 1_536 == 36_864  # two layers in each of 12 blocks
    assert (counts.changed, counts.rank) == (24 * 768**2, 24 * 576)
    assert pk.counts(bert_base(pk.LoRA(rank=1))).trainable == counts.trainable
    assert pk.counts(bert_base(pk.LoRA(rank=1))).rank == 24


def test_a_feed_forward_layer_of_bert_base_takes_1536_numbers_and_one():
    counts = pk.counts(bert_base(pk.KronARes()))
    assert counts.trainable == 12 * (1_536 + 1)
    assert (counts.changed, counts.rank) == (0, 0)
    assert pk.counts(bert_base(pk.KronARes(residual=False))).trainable == 12 * 1_536


@pytest.mark.parametrize("sizes", [(12, 20), (7, 12), (16, 16), (30, 5), (6, 6)])
@pytest.mark.parametrize("factor", [0, 2, 5])
def test_the_rank_is_that_of_the_change(sizes, factor):
    if factor and any(n % factor for n in sizes):
        return
    model, tuner, _ = one(*sizes, factor=factor)
    change = tuner.fold(torch.zeros(sizes[1], sizes[0], dtype=torch.float64), None)[0]
    assert torch.linalg.matrix_rank(change) == pk.counts(model).rank == tuner.changes().rank


def test_the_divisors_nearest_the_root_in_the_arrangement_with_the_fewest_numbers():
    assert [split(n) for n in (1, 2, 7, 12, 16, 384, 768, 3072)] == [
        *((1, 1), (1, 2), (1, 7), (3, 4), (4, 4), (16, 24), (24, 32), (48, 64))
    ]
    assert [split(12, most) for most in (1, 2, 3, 100)] == [(1, 12), (2, 6), (3, 4), (3, 4)]
    site = type("Site", (), {"name": "there"})()
    for site.n_out, site.n_in in ((768, 768), (3072, 768), (768, 3072), (30, 12), (7, 12), (11, 13)):
        (a1, a2), (b1, b2) = shapes(pk.KronA(), site, 0)
        assert (a1 * b1, a2 * b2) == (site.n_out, site.n_in)
        assert {a1, b1} == set(split(site.n_out)) and {a2, b2} == set(split(site.n_in))
        ways = [(p * q, site.n_out * site.n_in // (p * q)) for p in split(site.n_out) for q in split(site.n_in)]
        assert a1 * a2 + b1 * b2 == min(map(sum, ways))


@pytest.mark.parametrize("method", [pk.KronA(factor=5), pk.KronARes(factor=5)])
def test_a_factor_that_does_not_divide_is_told_in_a_line(method):
    model = make("bert").model
    with pytest.raises(
        ValueError, match="factor = 5 at .*, a layer of 16 x 16; expected a divisor of 16, or 0"
    ) as error:
        pk.attach(model, method)
    assert "\n" not in str(error.value)
    assert not any("peft" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("make_method", "told"),
    [
        (lambda: pk.KronA(factor=-1), "KronA factor = -1; expected a divisor"),
        (lambda: pk.KronARes(factor=-1), "KronARes factor = -1; expected a divisor"),
        (lambda: pk.KronA(init="zeros"), "KronA init = 'zeros'; expected one of kaiming, nearest"),
    ],
)
def test_bad_values_are_refused(make_method, told):
    with pytest.raises(ValueError, match="Kron") as error:
        make_method()
    assert told in str(error.value)


# -- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])  # rows of a fused linear, and whole ones
def test_the_nearest_start_is_the_left_factor_of_the_weight(family, dtype):
    case = make(family, dtype)
    before = case.call(case.model)
    pk.attach(case.model, pk.KronA(init="nearest"))
    assert torch.equal(case.call(case.model), before)
    seen = 0
    for _, tuner in tuners(case.model, "default"):
        for site, _, part in tuner.parts() if isinstance(tuner, Parts) else ():
            weight = site.weight.detach().float()
            a, b, error = nearest_kronecker(weight, tuple(part.a.shape))
            assert torch.equal(part.a, a[0]) and not part.b.any()
            close((weight - torch.kron(part.a, b[0])).norm() / weight.norm(), torch.tensor(error))
            seen += 1
    assert seen == (4 if family == "gpt2" else 0)


def test_a_weight_of_zeros_has_no_nearest_product():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="a weight of zeros, to which no product is nearest"):
        pk.attach(model, pk.KronA(init="nearest"), ("0",))
    pk.attach(model, pk.KronA(), ("0",))


def test_the_nearest_start_reads_packed_weights():
    case = make("llama")
    pk.quantize(case.model, "nf4")
    dense = {path: m.dense(torch.float32) for path, m in case.model.named_modules() if hasattr(m, "dense")}
    pk.attach(case.model, pk.KronA(init="nearest"))
    for path, tuner in tuners(case.model, "default"):
        assert torch.equal(tuner.a, nearest_kronecker(dense[path], tuple(tuner.a.shape))[0][0])


# -- what runs --------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation inside made, but for views of `frozen`."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen, self.numel = frozen.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        sizes = [t.numel() for t in made if t.untyped_storage().data_ptr() != self.frozen]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("method", [pk.KronA(), pk.LoKr(rank=4), pk.LoKr(rank=64)], ids=["krona", "low", "full"])
def test_the_product_is_never_made(method):
    """Neither in the forward nor in the backward."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(96, 80)), torch.randn(6, 96)
    perturb(pk.attach(model, method, ("0",)))
    with Largest(model[0].weight) as largest:
        model(x).sum().backward()
    assert largest.numel < 96 * 80 / 2


@pytest.mark.parametrize("key", ["krona", "lokr"])
def test_the_op_serves_dense_packed_and_stacked_layers(key, monkeypatch):
    """In place where the output below belongs to the tuner."""
    calls = []
    for name in ("kron_linear", "kron_linear_"):
        real = getattr(pk.ops, name)
        monkeypatch.setattr(pk.ops, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k))

    def made(model, inputs):
        calls.clear()
        model(**inputs)
        return calls

    method, case = pk.methods()[key](), make("llama")  # 2 layers, q and v
    pk.attach(case.model, method)
    assert made(case.model, case.inputs) == ["kron_linear_"] * 4
    pk.attach(case.model, method, name="above")
    assert made(case.model, case.inputs) == ["kron_linear_"] * 8
    pk.attach(pk.detach(case.model), pk.IA3(feedforward=("q", "v")), ("q", "v"), name="below")  # whose output is W's
    pk.attach(case.model, method)
    assert made(case.model, case.inputs) == ["kron_linear"] * 4
    packed = pk.attach(pk.quantize(make("llama").model, "nf4"), method)
    assert made(packed, case.inputs) == ["kron_linear_"] * 4
    fused = make("gpt2")
    assert made(pk.attach(fused.model, method), fused.inputs) == ["kron_linear"] * 4  # views of the fused output


@pytest.mark.parametrize("family", [f for f in (*EVERY, *KINDS) if f != "mlp"])
def test_beside_every_feed_forward_layer(family):
    """y = FFN(x) + s (A kron B) x + s_res x, with what FFN(x) is without the adapter and what x is with it."""
    case = make(family, torch.float64)
    pk.attach(case.model, pk.KronARes(scale=0.5))
    found = [(path, whole(t)) for path, t in tuners(case.model, "default")]
    layers = getattr(case.model.config, "num_hidden_layers", 2)
    assert len(found) in (layers, 2 * layers)  # of encoder and decoder
    base = case.call(make(family, torch.float64).model)
    close(case.call(case.model), base, torch.float64)
    perturb(case.model)
    seen = {}

    def note(path, tuner):
        def hook(_, args, y):
            below, x = args[0], args[1]
            dense = x @ torch.kron(tuner.a, tuner.b).T * 0.5 + tuner.residual * x
            plain = below(*args[1:])
            close(y, plain + dense, torch.float64)
            seen[path] = True

        return tuner.register_forward_hook(hook)

    for path, tuner in found:
        note(path, tuner)
    with torch.no_grad():
        assert not torch.allclose(case.call(case.model), base)
    assert seen.keys() == {path for path, _ in found}


def test_a_residual_needs_equal_sizes():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
    with pytest.raises(ValueError, match="from 4 to 6 features: its input cannot be added"):
        pk.attach(model, pk.KronARes(), ("0>2",))
    x = torch.randn(3, 4)
    base = model(x)
    close(pk.attach(model, pk.KronARes(residual=False), ("0>2",))(x), base)
    with pytest.raises(RuntimeError, match="no weight-space form"):
        pk.merge(model)


@pytest.mark.parametrize("key", ["krona", "krona_res", "lokr"])
def test_under_autocast(key):
    case = attached(key, "bert")
    perturb(case.model).eval()
    truth = case.call(case.model)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call(case.model)
        case.loss(case.model).backward()
    assert (out.float() - truth).abs().max() < 0.05 * truth.abs().max()
    for _, tuner in tuners(case.model, "default"):
        for name, p in whole(tuner).named_parameters():
            assert p.grad is not None and p.grad.dtype == torch.float32, name


def test_it_learns_what_no_product_of_few_ranks_does():
    """A target of Kronecker form, which LoRA with as many numbers cannot reach."""
    made = torch.Generator().manual_seed(1)
    goal = torch.kron(*(torch.randn(4, 4, generator=made) for _ in range(2))) / 4
    x = torch.randn(256, 16, generator=made)
    y = x @ goal.T

    def left(method):
        model = nn.Sequential(nn.Linear(16, 16, bias=False))
        nn.init.zeros_(model[0].weight)
        pk.attach(model, method, ("0",))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        for _ in range(400):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        return math.sqrt(loss.item() / y.square().mean().item()), pk.counts(model).trainable

    own, numbers = left(pk.KronA())
    other, its = left(pk.LoRA(rank=1, alpha=1.0))
    assert numbers == its == 32
    assert own < 0.02 and other > 0.5


@pytest.mark.parametrize("method", [pk.KronA(), pk.KronARes(), pk.LoKr()], ids=["krona", "krona_res", "lokr"])
def test_gated_and_beside_other_methods(method):
    """Each starts as the identity, and everything learns."""
    for recipe in (pk.Gated(method), pk.Union(pk.IA3(), method), pk.ByLayer({0: method, 1: pk.LoRA(rank=2)})):
        case = make("bert")
        base = case.call(case.model)
        pk.attach(case.model, recipe)
        close(case.call(case.model), base)
        perturb(case.model)
        case.loss(case.model).backward()
        assert all(p.grad.abs().sum() > 0 for p in case.model.parameters() if p.requires_grad)
