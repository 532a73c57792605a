"""LoRA and DoRA against HF PEFT's layers on the same module, with the same numbers and the same dropout masks."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from models import make, perturb
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.ops import _philox

peft = pytest.importorskip("peft")

TARGETS = {"linear": ("0",), "llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}


class Masked(nn.Module):
    """Dropout with the mask of our kernels, seeded from torch's generator as theirs is: equal seeds, equal masks."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        return _philox.dropout(x, self.p, torch.randint(-(2**62), 2**62, (2,)))


def plain(model, dtype=torch.float32):
    """(module, floating input [batch, tokens, features]) of a bare linear or of a tiny transformer of embeddings."""
    if model == "linear":
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 24)).to(dtype), torch.randn(3, 5, 40).to(dtype)
    case = make(model, dtype)
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # torch draws other masks in other dtypes
    case.model.config.use_cache = False
    return case.model, case.model.get_input_embeddings()(case.inputs["input_ids"]).detach()


def numbers(model):
    """name -> parameter of our adapter."""
    return {f"{path}.{n}": p for path, tuner in tuners(model, "default") for n, p in tuner.named_parameters()}


def theirs_of(model, name):
    """The module of HF PEFT's adapted model whose weight is one of our numbers."""
    path, _, which = name.rpartition(".")
    layer = model.get_submodule(path)
    return {"a": layer.lora_A, "b": layer.lora_B, "m": layer.lora_magnitude_vector}[which]["default"]


def both(method, model, dtype=torch.float32, narrow=False, p=0.0, rslora=False, moved=True):
    """(our model, HF PEFT's, an input) in training mode.  narrow: adapters in `dtype`.   moved: off their start."""
    fields = {"rank": 4, "alpha": 6.0, "dropout": p, "rslora": rslora}
    (ours, x), (theirs, _) = plain(model, dtype), plain(model, dtype)
    targets = TARGETS[model] if model == "linear" else tuple(f"*.{t}" for t in TARGETS[model])
    pk.attach(ours, pk.methods()[method](**fields), targets)
    if moved:
        perturb(ours)
    if narrow:
        for _, tuner in tuners(ours, "default"):
            tuner.to(dtype)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.0, use_rslora=rslora, use_dora=method == "dora", target_modules=TARGETS[model]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which it sets for Conv1D
        theirs = peft.inject_adapter_in_model(config, theirs)
    for name, value in numbers(ours).items():
        theirs_of(theirs, name).weight = nn.Parameter(value.detach().clone())
    if p:
        for path, _ in tuners(ours, "default"):
            mask(theirs.get_submodule(path), method, p)
    return ours.train(), theirs.train(), x


def mask(layer, method, p):
    """Our dropout for HF PEFT's. Its DoRA drops the input of the frozen path as well, ours that of A alone."""
    if method == "lora":
        layer.lora_dropout["default"] = Masked(p)
        return
    drop = Masked(p)
    # The input has three dimensions; the identity from which it makes B A for the norm is a matrix.
    layer.lora_A["default"].register_forward_pre_hook(lambda _, xs: (drop(xs[0]),) if xs[0].dim() == 3 else None)


def run(model, x):
    return model(x) if isinstance(model, nn.Sequential) else model(inputs_embeds=x).logits


def gradients(model, x, params, autocast=False, checkpointed=False):
    """name -> gradient, in fp64, of the parameters and of "x"."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = checkpoint(run, model, x, use_reentrant=False) if checkpointed else run(model, x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weight).sum().backward()
    return {n: p.grad.double() for n, p in {**params, "x": x}.items()}


def compared(ours, theirs, x, **how):
    """name -> (our gradient, HF PEFT's, that of HF PEFT's graph in fp64)."""
    params = numbers(ours)
    exact = copy.deepcopy(theirs).double()
    found = [
        gradients(ours, x, params, **how),
        gradients(theirs, x, {n: theirs_of(theirs, n).weight for n in params}, **how),
        gradients(exact, x.double(), {n: theirs_of(exact, n).weight for n in params}),
    ]
    return {n: tuple(grads[n] for grads in found) for n in found[0]}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_in_fp32(method, model, p, checkpointed):
    ours, theirs, x = both(method, model, p=p, rslora=checkpointed)
    for name, (own, other, exact) in compared(ours, theirs, x, checkpointed=checkpointed).items():
        assert (own - other).abs().max() <= 1e-5 * exact.abs().max(), name


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointed"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("how", ["wide adapters", "narrow adapters", "autocast"])
@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_in_bf16_are_as_near_the_truth(method, model, how, p, checkpointed):
    """At most twice HF PEFT's error, in a transformer, whose other layers round too, beside two units of bf16."""
    autocast = how == "autocast"
    dtype = torch.float32 if autocast else torch.bfloat16
    ours, theirs, x = both(method, model, dtype, how == "narrow adapters", p, rslora=checkpointed)
    found = compared(ours, theirs, x, autocast=autocast, checkpointed=checkpointed)
    units = 0 if model == "linear" else 2
    for name, (own, other, exact) in found.items():
        rounding = units * torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (own - exact).abs().max() <= 2 * (other - exact).abs().max() + rounding, name
    together = [sum(((grads[i] - grads[2]).norm() / grads[2].norm()) ** 2 for grads in found.values()) for i in (0, 1)]
    assert together[0] ** 0.5 <= 1.5 * together[1] ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_fifty_steps_of_training(method, model, p):
    """The same losses within 1e-4 of them, from where adapters start."""
    ours, theirs, _ = both(method, model, p=p, rslora=True, moved=False)
    names = numbers(ours)
    ids = torch.randint(3, 50, (4, 8))

    def losses(model, params):
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        for step in range(50):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            yield loss.item()

    own = list(losses(ours, names.values()))
    assert own[-1] < 0.98 * own[0]
    assert own == pytest.approx(list(losses(theirs, [theirs_of(theirs, n).weight for n in names])), rel=1e-4)
    if p:
        undropped, _, _ = both(method, model, rslora=True, moved=False)
        assert own != pytest.approx(list(losses(undropped, numbers(undropped).values())), rel=1e-4)
