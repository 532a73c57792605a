"""DoRA against its definition: the norm, its gradient, its memory, and what is kept of it between calls."""

import copy
import io

import pytest
import torch
from models import attached, close, make, perturb
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_kernels as pk
from peft_kernels.engine.attach import all_adapters
from peft_kernels.engine.stack import Parts
from peft_kernels.methods import dora


def one(dtype=torch.float64, n_in=12, n_out=7, **fields):
    """(model of one linear, its tuner, x), the tuner away from where it starts."""
    model = nn.Sequential(nn.Linear(n_in, n_out)).to(dtype).eval()
    pk.attach(model, pk.DoRA(**{"rank": 3, **fields}), ("0",))
    perturb(model)
    return model, model[0].peft.tuners["default"], torch.randn(5, n_in, dtype=dtype)


def updated(tuner, weight):
    return weight.double() + tuner.scale * tuner.b.double() @ tuner.a.double()


def norms(tuner, weight):
    return updated(tuner, weight).detach().square().sum(1).sqrt()


# -- the definition ---------------------------------------------------------------------------------------------------


def test_counts_of_bert_base():
    """LoRA's 294,912 and a row norm for each of 768 outputs of 24 layers."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    pk.attach(model, pk.DoRA(rank=8))
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 294_912 + 24 * 768 == 313_344
    assert (counts.changed, counts.rank) == (24 * 768**2, 24 * 768)


def test_forward_and_gradients_are_those_of_the_definition():
    model, tuner, x = one()
    x.requires_grad_()
    params = [tuner.a, tuner.b, tuner.m, x]
    y = model(x)
    w = updated(tuner, model[0].weight)
    detached = x @ (tuner.m[:, None] * w / norms(tuner, model[0].weight)[:, None]).T + model[0].bias
    attached_norm = x @ (tuner.m[:, None] * w / w.norm(dim=1, keepdim=True)).T + model[0].bias
    close(y, detached, torch.float64)
    g = torch.randn_like(y)
    ours, theirs, other = (
        torch.autograd.grad(out, params, g, retain_graph=True) for out in (y, detached, attached_norm)
    )
    for mine, expected in zip(ours, theirs, strict=True):
        close(mine, expected, torch.float64)
    assert not torch.allclose(ours[0], other[0])  # a gradient through the norm would be another


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "gpt2"])  # gpt2 keeps its weights transposed and fused
def test_it_starts_as_the_identity(family, dtype):
    case = attached("dora", family, dtype)
    checked = 0
    for _, adapters in all_adapters(case.model):
        found = adapters.tuners["default"]
        parts = found.parts() if isinstance(found, Parts) else [(adapters.site, None, found)]
        for site, _, tuner in parts:
            g = tuner.m / tuner._norm(site.weight)
            assert ((g - 1).abs() <= torch.finfo(g.dtype).eps).all()
            checked += 1
    assert checked == 4


def test_dropout_is_on_the_low_rank_path_alone():
    model, tuner, x = one(dropout=1.0)
    frozen = x @ model[0].weight.T * (tuner.m / norms(tuner, model[0].weight))
    close(model.train()(x), frozen + model[0].bias, torch.float64)


@pytest.mark.parametrize("below", [pk.BitFit(), pk.LoRA(rank=2), pk.IA3()])
def test_on_top_of_another_tuner_it_is_the_dora_of_what_that_makes(below):
    model = nn.Sequential(nn.Linear(12, 7)).double().eval()
    x = torch.randn(5, 12, dtype=torch.float64)
    pk.attach(model, below, ("0",), name="below")
    pk.attach(model, pk.DoRA(rank=3), ("0",), name="above")
    perturb(perturb(model, "below"), "above")
    with torch.no_grad():
        tuner = model[0].peft.tuners["above"]
        weight, bias = model[0].peft.tuners["below"].fold(model[0].weight, model[0].bias)
        y = x @ (updated(tuner, weight) * (tuner.m / norms(tuner, weight))[:, None]).T + bias
        close(model(x), y, torch.float64)
        pk.merge(model)
        close(model(x), y, torch.float64)


def test_a_row_of_zeros_stays_one():
    model = nn.Sequential(nn.Linear(12, 7))
    model[0].weight.data[2] = 0
    pk.attach(model, pk.DoRA(rank=3), ("0",))
    y = model(torch.randn(5, 12))
    assert torch.equal(y[:, 2], model[0].bias[2].expand(5))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_transforms_see_the_definition_too():
    """Batched and dual numbers, where nothing may be kept."""
    model, tuner, x = one()
    with torch.no_grad():
        model(x)
        values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        stacked = {n: torch.stack([v, 2 * v]) for n, v in values.items()}
        first, second = torch.vmap(lambda v: torch.func.functional_call(model, v, x))(stacked)
        close(first, model(x), torch.float64)
        close(second, torch.func.functional_call(model, {n: 2 * v for n, v in values.items()}, x), torch.float64)
        close(model(x), first, torch.float64)
    tangents = {n: torch.randn_like(v) for n, v in values.items()}
    _, forward = torch.func.jvp(lambda v: torch.func.functional_call(model, v, x).sum(), (values,), (tangents,))
    model(x).sum().backward()
    backward = sum((p.grad * tangents[n]).sum() for n, p in model.named_parameters() if p.requires_grad)
    close(forward, backward, torch.float64)
    assert torch.autograd.gradgradcheck(model, (x.requires_grad_(),), fast_mode=True)


def test_two_are_no_low_rank_sum():
    model, _, _ = one()
    pk.attach(model, pk.DoRA(rank=3), ("0",), name="other")
    with pytest.raises(ValueError, match="neither low-rank nor linear"):
        pk.combine(model, ["default", "other"])


def test_errors_name_the_method():
    with pytest.raises(ValueError, match="DoRA rank = 0"):
        pk.DoRA(rank=0)
    with pytest.raises(ValueError, match="DoRA rank = 8 at 0; a 4 x 4 layer"):
        pk.attach(nn.Sequential(nn.Linear(4, 4)), pk.DoRA(), ("0",))
    case = make("mlp")
    case.model.first.to("meta")
    case.model.first._hf_hook = type("Hook", (), {"execution_device": "cpu"})()
    with pytest.raises(ValueError, match="first is offloaded"):
        pk.attach(case.model, pk.DoRA(rank=2), ("first",))


# -- the norm ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made within it; views of older ones are not made."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_makes_no_second_weight(dtype, monkeypatch):
    monkeypatch.setattr(dora, "_BLOCK", 2**10)
    _, tuner, _ = one(dtype, n_in=128, n_out=256)
    for weight in (torch.randn(256, 128).to(dtype), torch.randn(128, 256).to(dtype).T):
        with Largest(weight) as seen:
            norm = tuner.train()._norm(weight)
        assert 0 < seen.bytes <= (2**10 if dtype == torch.bfloat16 else 128 * 16) * 4
        close(norm, norms(tuner, weight).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_keeps_the_digits_of_fp32(dtype):
    model, tuner, x = one(dtype, n_in=300, n_out=64)
    weight = model[0].weight
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            error = tuner._norm(weight).double() / norms(tuner, weight) - 1
        assert error.abs().max() < 1e-6


# -- what is kept between calls ---------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Counts of how often the norms of W and of the updated W are computed."""
    counts = {"_squares": 0, "_updated": 0}

    def counting(owner, name):
        function = getattr(owner, name)

        def counted(*args):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    counting(dora, "_squares")
    counting(dora, "_updated")
    return counts


def test_training_keeps_the_norm_of_w_and_evaluation_the_whole_norm(computed):
    model, _, x = one()
    computed.update(_squares=0, _updated=0)
    for _ in range(3):
        model.train()(x)
    assert computed == {"_squares": 1, "_updated": 3}
    for _ in range(3):
        model.eval()(x)  # with gradients: these may be training steps too
    assert computed == {"_squares": 2, "_updated": 6}
    with torch.no_grad():
        for _ in range(3):
            model(x)
    with torch.inference_mode():
        model(x)
    assert computed == {"_squares": 2, "_updated": 7}


def writes(model, tuner):
    """Every way in which what the norm depends on may change, one after the other."""
    for t in (tuner.a, tuner.b, model[0].weight):
        with torch.no_grad():
            t.mul_(1.5)
        yield
        with torch.inference_mode():
            t.add_(0.3)
        yield
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
    yield
    model.half().double()  # values are rounded, and memory may be where it was
    yield
    model.train()
    tuner.b.data.mul_(3)  # no version counts this
    model.eval()
    yield
    fused = torch.optim.AdamW([tuner.a, tuner.b], lr=0.1, fused=True)  # nor this
    for _ in range(2):
        with torch.inference_mode(False), torch.enable_grad():
            model(torch.ones(1, tuner.a.shape[1], dtype=torch.float64)).sum().backward()
            fused.step()
        yield
    pk.merge(model)
    pk.unmerge(model)
    yield


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_kept_is_never_stale(mode):
    model, tuner, x = one()
    with mode():
        model(x)
    for _ in writes(model, tuner):
        with mode():
            y = model(x)
        weight = updated(tuner, model[0].weight) * (tuner.m / norms(tuner, model[0].weight))[:, None]
        close(y, x @ weight.T + model[0].bias, torch.float64)


def test_a_weight_that_is_trained_below_is_measured_anew():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    pk.attach(model, pk.Union(pk.at("0", pk.Head()), pk.at("0", pk.DoRA(rank=2))))
    perturb(model).train()
    fused = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    x = torch.randn(3, 6, dtype=torch.float64)
    for _ in range(3):
        y = model(x)
        y.square().sum().backward()
        head, tuner = model[0].peft.tuners["default"].members()
        close(y, nn.functional.linear(x, *tuner.fold(head.copy.weight, head.copy.bias)), torch.float64)
        fused.step()


def test_memory_that_is_used_again_is_not_mistaken():
    """Below another tuner the weight is a new tensor in every call, at the address of the last one as often as not."""
    model = nn.Sequential(nn.Linear(128, 256)).eval()
    pk.attach(model, pk.IA3(), ("0",), name="below")
    pk.attach(model, pk.DoRA(rank=3), ("0",), name="above")
    perturb(model, "above")
    below, tuner = (model[0].peft.tuners[name] for name in ("below", "above"))
    x = torch.randn(5, 128)
    with torch.no_grad():
        for _ in range(5):
            below.l.add_(0.5)
            y = model(x)
            weight, bias = below.fold(model[0].weight, model[0].bias)
            close(y, (x @ updated(tuner, weight).float().T) * (tuner.m / norms(tuner, weight).float()) + bias)
            del weight


def test_tensors_without_versions_are_computed_anew(computed):
    with torch.inference_mode():
        model, tuner, x = one()
        model(x)
        tuner.b.mul_(2)
        computed.update(_squares=0, _updated=0)
        close(
            model(x) - model[0].bias,
            x @ updated(tuner, model[0].weight).T * (tuner.m / norms(tuner, model[0].weight)),
            torch.float64,
        )
    assert computed == {"_squares": 1, "_updated": 1}


def test_nothing_kept_is_saved_or_copied():
    model, tuner, x = one()
    with torch.no_grad():
        expected = model(x)
    assert set(tuner.state_dict()) == {"a", "b", "m"}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not other[0].peft.tuners["default"]._kept
        with torch.no_grad():
            assert torch.equal(other(x), expected)
