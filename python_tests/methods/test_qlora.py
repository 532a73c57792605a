"""QLoRA, and training that knows what packing will do."""

import pytest
import torch
import torch.nn.functional as F
from models import close, make, perturb, targets_of
from quantized import FORMATS, every_dtype, every_format, layer, packed_layers, quantized
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners


@every_format
def test_qlora_is_quantize_and_lora(name):
    case, twin = make("llama"), quantized(name, "llama")
    settings = {"rank": 2, "dropout": 0.0}
    pk.attach(case.model, pk.QLoRA(**settings, **FORMATS[name]), seed=3)
    pk.attach(twin.model, pk.LoRA(**settings), "*", seed=3)
    for model in (case.model, twin.model):
        perturb(model)
    assert torch.equal(case.call(case.model), twin.call(twin.model))
    assert len(packed_layers(case.model)) == 14
    pk.detach(case.model)
    plain = quantized(name, "llama")
    assert torch.equal(case.call(case.model), plain.call(plain.model))


def test_qlora_in_recipes_gates_and_files(tmp_path):
    for method in (pk.Union(pk.QLoRA(rank=2), pk.IA3()), pk.Gated(pk.QLoRA(rank=2, quantization_aware=True))):
        case = make("llama")
        pk.attach(case.model, method)
        assert len(packed_layers(case.model)) == 14
        perturb(case.model)
        case.loss(case.model).backward()
    case = make("llama")
    pk.attach(case.model, pk.QLoRA(rank=2, blocksize=128, skip=("head", "down"), quantization_aware=True))
    perturb(case.model)
    where, fresh = pk.save(case.model, tmp_path / "adapter"), make("llama")
    pk.load(fresh.model, where)
    assert torch.equal(fresh.call(fresh.model), case.call(case.model))
    assert len(packed_layers(fresh.model)) == 12


def test_attaching_quantises_only_what_fits():
    case = make("llama")
    with pytest.raises(ValueError, match="a 8 x 16 layer takes at most 8"):
        pk.attach(case.model, pk.QLoRA(rank=12))
    assert not packed_layers(case.model)


# -- quantisation-aware training --------------------------------------------------------------------------------------


def aware(name, family, dtype=torch.float32, **kwargs):
    case = make(family, dtype)
    settings = {"rank": 2, "dropout": 0.0, "quantization_aware": True, **FORMATS[name], **kwargs}
    pk.attach(case.model, pk.QLoRA(**settings), targets_of("qlora", family))
    perturb(case.model)
    return case


@every_dtype
@every_format
def test_a_merge_computes_what_was_trained(name, dtype):
    case = aware(name, "mlp", dtype)
    trained = case.call(case.model.train())
    adapted = case.call(case.model.eval())
    tight = dict(atol=4 * torch.finfo(dtype).eps * trained.abs().max().item(), rtol=0)
    own = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    for into in (None, own) if own else (None,):
        pk.merge(case.model, into=into)
        if into is None:
            assert torch.equal(case.call(case.model), adapted)
        torch.testing.assert_close(case.call(case.model), adapted, **tight)
        pk.unmerge(case.model)
        assert torch.equal(case.call(case.model), adapted)
    torch.testing.assert_close(trained, adapted, **tight)


@every_format
def test_its_gradient_goes_straight_through(name):
    """The factors get the gradient of the dense weight that is packed, the input that of the packed one."""
    own, _ = layer(name, 40, 24, dtype=torch.float64)
    model = nn.Sequential(own)
    pk.attach(model, pk.QLoRA(rank=3, dropout=0.0, quantization_aware=True))
    perturb(model)
    tuner = model[0].peft.tuners["default"]
    x, g = torch.randn(5, 40, dtype=torch.float64, requires_grad=True), torch.randn(5, 24, dtype=torch.float64)
    dx, da, db = torch.autograd.grad(model(x), (x, tuner.a, tuner.b), g)
    dw = g.T @ x.detach()
    close(da, tuner.scale * tuner.b.T @ dw, torch.float64)
    close(db, tuner.scale * dw @ tuner.a.T, torch.float64)
    weight = own.rounded(own.dense() + tuner.scale * tuner.b.detach() @ tuner.a.detach())
    close(dx, g @ weight, torch.float64)


def test_its_dropout_is_that_of_lora():
    """The gradients of the factors are LoRA's under the same draw."""
    case = aware("nf4", "mlp", torch.float64, dropout=0.5)
    case.model.train()
    assert not torch.equal(case.call(case.model), case.call(case.model))
    first = case.model.first
    x = torch.randn(5, 12, dtype=torch.float64)
    grads = []
    for rounds in (True, False):
        torch.manual_seed(1)
        tuner = first.peft.tuners["default"]
        if not rounds:
            tuner.forward = lambda base, x, t=tuner: pk.ops.lora_add(
                base(x), x, t.a, t.b, t.scale, **dict(zip(("p", "rng"), t.draw(x), strict=True))
            )
        grads.append(torch.autograd.grad(first(x).sum(), list(tuner.parameters())))
    del tuner.forward
    for a, b in zip(*grads, strict=True):
        close(a, b, torch.float64)


@every_format
def test_training_through_the_packed_weight_learns(name):
    """And what is merged scores as what was trained, where LoRA's merge falls back."""
    torch.manual_seed(1)
    x, teacher = torch.randn(256, 32), nn.Linear(32, 16)
    model = pk.quantize(nn.Sequential(nn.Linear(32, 16)), **FORMATS[name])
    pk.attach(model, pk.QLoRA(rank=8, dropout=0.0, quantization_aware=True))

    def loss():
        return F.mse_loss(model(x), teacher(x).detach())

    first, optimizer = loss().item(), torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    last = loss().item()
    assert last < 0.6 * first
    pk.merge(model)
    assert loss().item() == pytest.approx(last, rel=1e-5)


def test_where_it_cannot_be():
    with pytest.raises(ValueError, match="whose blocks of weights others share; .* target the whole of it"):
        pk.attach((plain := make("gpt2")).model, pk.QLoRA(rank=2, quantization_aware=True), ("q", "v"))
    assert not packed_layers(plain.model)
    case = make("gpt2")
    pk.attach(case.model, pk.QLoRA(rank=2), ("q", "v"))
    pk.attach(case.model, pk.QLoRA(rank=2, quantization_aware=True), name="b")
    perturb(case.model, "b")
    assert len(list(tuners(case.model, "b"))) == 8
    both = case.call(case.model)  # above another adapter it packs the sum
    pk.merge(case.model)
    close(case.call(case.model), both)
