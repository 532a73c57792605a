"""pk.hf.accelerate: PEFT's layers on our kernels compute what PEFT computes, and stay PEFT's in all else."""

import copy
import pickle
import warnings

import pytest
import torch
from models import close, make
from theirs import adapted, moved
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.methods._peft_fused import Fused
from peft_kernels.ops._op import recording

peft = pytest.importorskip("peft")
LoraLayer = peft.tuners.lora.LoraLayer

LORA = [
    ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}),
    ("llama", {"target_modules": "all-linear", "r": 2, "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"q_proj": 2}}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3}),  # Conv1D
    ("t5", {"target_modules": ["q", "v", "wo"], "r": 2}),
    ("bert", {"target_modules": ["query", "dense"], "r": 2, "modules_to_save": ["classifier"]}),
    ("bert", {"target_modules": ["query"], "r": 2, "bias": "all"}),
    ("vit", {"target_modules": ["q_proj", "fc1"], "r": 2}),
]
LOKR = [
    ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 2}),
    ("bert", {"target_modules": ["query", "value"], "r": 2, "decompose_both": True, "decompose_factor": 4}),
    ("t5", {"target_modules": ["q"], "r": 64}),
]
ALL = [(peft.LoraConfig, *one) for one in LORA] + [(peft.LoKrConfig, *one) for one in LOKR]
IDS = [f"{config.__name__}-{family}-{number}" for number, (config, family, _) in enumerate(ALL)]


def pair(config, family, settings, dtype=torch.float64):
    """(inputs, PEFT's model, the same accelerated, the report)"""
    case = make(family, dtype)
    theirs = adapted(case.model, config(**settings)).to(dtype).eval()
    ours = copy.deepcopy(theirs)
    return case, theirs, ours, pk.hf.accelerate(ours)


def lora(family="llama", dtype=torch.float64, **settings):
    return pair(peft.LoraConfig, family, {"target_modules": ["q_proj", "v_proj"], "r": 4, **settings}, dtype)


def gradients(case, model):
    model.zero_grad()
    case.loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(case, ours, theirs, dtype=torch.float64):
    close(case.call(ours), case.call(theirs), dtype)
    found, wanted = gradients(case, ours), gradients(case, theirs)
    assert found.keys() == wanted.keys() and len(wanted) > 0
    for name, g in wanted.items():
        close(found[name], g, dtype)


def used(case, model):
    with recording() as choices:
        case.call(model)
    return {choice["op"] for choice in choices}


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "family", "settings"), ALL, ids=IDS)
def test_outputs_and_gradients_are_those_of_peft(config, family, settings):
    case, theirs, ours, report = pair(config, family, settings)
    assert report.fused and not report.fallback
    op = "kron_linear_add" if config is peft.LoKrConfig else "lora_add" if family == "gpt2" else "lora_linear"
    with torch.no_grad():
        assert used(case, ours) == {op}
    agree(case, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("config", "family", "settings"), [ALL[0], ALL[3], ALL[8]], ids=["lora", "conv1d", "lokr"])
def test_other_dtypes_are_as_near_to_the_truth(config, family, settings, dtype):
    """The factors are fp32 beside a 16-bit model, as PEFT keeps them."""
    case = make(family, dtype)
    theirs = adapted(case.model, config(**settings))
    assert {p.dtype for p in theirs.parameters() if p.requires_grad} == {torch.float32}
    ours, truth = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    assert pk.hf.accelerate(ours).fused
    exact = case.call(truth)
    off, known = ((case.call(m).double() - exact).norm() / exact.norm() for m in (ours, theirs))
    assert off <= 1.5 * known + 4 * torch.finfo(dtype).eps
    assert case.call(ours).dtype == case.call(theirs).dtype
    assert gradients(case, ours).keys() == gradients(case, theirs).keys()


def test_factors_narrower_than_the_model_run_as_before():
    case, theirs, ours, _ = lora(dtype=torch.float32)
    for model in (theirs, ours):
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.bfloat16()
    assert torch.equal(case.call(ours), case.call(theirs))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_that_is_quantised(kind):
    case = make("llama")
    pk.quantize(case.model, kind)
    theirs = adapted(case.model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=3))
    ours = copy.deepcopy(theirs)
    assert not pk.hf.accelerate(ours).fallback
    assert ("nf4_lora_linear" if kind == "nf4" else "lora_add") in used(case, ours)
    torch.testing.assert_close(case.call(ours), case.call(theirs), atol=1e-4, rtol=1e-4)
    wanted = gradients(case, theirs)
    for name, g in gradients(case, ours).items():
        torch.testing.assert_close(g, wanted[name], atol=1e-3, rtol=1e-3)


def test_dropout():
    case, theirs, ours, _ = lora(lora_dropout=0.5)
    close(case.call(ours), case.call(theirs), torch.float64)
    ours.train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(case.call(ours))
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2])
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
    with theirs.disable_adapter():
        close(case.call(ours), case.call(theirs), torch.float64)


def test_the_mean_over_masks_is_the_layer_without_dropout():
    torch.manual_seed(0)
    layer = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_dropout=0.25, target_modules=["0"]), nn.Sequential(nn.Linear(64, 48))
    )
    moved(layer, 0.3)
    pk.hf.accelerate(layer)
    x = torch.randn(64)
    whole, many = layer.eval()(x), layer.train()(x.expand(4096, 64))
    spread = many.std(0) / 64  # of the mean
    assert ((many.mean(0) - whole).abs() < 6 * spread + 1e-5).all()


def test_autocast():
    case, theirs, ours, _ = lora(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = case.call(ours), case.call(theirs)
    assert out.dtype == wanted.dtype
    torch.testing.assert_close(out, wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    case, theirs, ours, _ = lora(lora_dropout=0.3)
    layer = next(m for m in ours.modules() if isinstance(vars(m).get("forward"), Fused)).train()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)

    def grads(run):
        torch.manual_seed(3)
        own = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return torch.autograd.grad(run().sum(), own) if not reentrant else backward(run, own)

    def backward(run, own):
        for p in own:
            p.grad = None
        run().sum().backward()
        return [p.grad for p in own]

    plain = grads(lambda: layer(x))
    for got, wanted in zip(grads(lambda: checkpoint(layer, x, use_reentrant=reentrant)), plain, strict=True):
        close(got, wanted, torch.float64)


@pytest.mark.parametrize("settings", [ALL[0], ALL[8]], ids=["lora", "lokr"])
def test_compiled_whole(settings):
    torch._dynamo.reset()
    case, theirs, ours, _ = pair(*settings, dtype=torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(case.call(compiled), case.call(theirs))
    case.loss(compiled).backward()
    for name, g in gradients(case, theirs).items():
        close(ours.get_parameter(name).grad, g)


# -- adapters come and go ---------------------------------------------------------------------------------------------


def with_another(model, **settings):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("other", peft.LoraConfig(**{"target_modules": ["q_proj", "k_proj"], "r": 2, **settings}))
    model.set_adapter("other")
    moved(model).eval()
    model.set_adapter("default")


def test_what_peft_does_with_its_adapters():
    case, theirs, ours, report = lora()
    plain = case.call(theirs)
    for model in (theirs, ours):
        with_another(model)
    assert pk.hf.accelerate(ours).fused != report.fused  # k_proj is new
    steps = [
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: [layer.set_scale("other", 3.0) for layer in m.modules() if isinstance(layer, LoraLayer)],
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.set_adapter("default"),
        lambda m: m.delete_adapter("other"),
    ]
    for step in steps:
        for model in (theirs, ours):
            step(model)
        close(case.call(ours), case.call(theirs), torch.float64)
    close(case.call(ours), plain, torch.float64)
    agree(case, ours, theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(case.call(ours), case.call(theirs))
    assert type(ours.merge_and_unload()) is type(theirs.merge_and_unload())


def test_several_active_adapters():
    case, theirs, ours, _ = lora()
    for model in (theirs, ours):
        with_another(model)
        model.base_model.set_adapter(["default", "other"])
        model.requires_grad_(True)
    pk.hf.accelerate(ours)
    agree(case, ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mixed_batches(family):
    target = {"target_modules": ["q_proj", "v_proj"]} if family == "llama" else {"target_modules": ["c_attn"]}
    case, theirs, ours, _ = lora(family, **target)
    for model in (theirs, ours):
        with_another(model, **({} if family == "llama" else target))
    pk.hf.accelerate(ours)
    for names in (["default", "other"], ["__base__", "other"], ["__base__", "__base__"], ["default"] * 2):
        with torch.no_grad():
            out, wanted = (m(**case.inputs, adapter_names=names).logits for m in (ours, theirs))
            close(out, wanted, torch.float64)
            moved(ours, 0.0)  # written into, to the same: what was kept is found out of date or right
            close(ours(**case.inputs, adapter_names=names).logits, wanted, torch.float64)
        close(ours(**case.inputs, adapter_names=names).logits, wanted, torch.float64)  # with gradients
    with torch.no_grad():
        for model in (ours, theirs):
            for name, p in model.named_parameters():
                if "lora_A" in name:
                    p.mul_(2)
        out, wanted = (m(**case.inputs, adapter_names=["default", "other"]).logits for m in (ours, theirs))
        close(out, wanted, torch.float64)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(**case.inputs, adapter_names=["default"])


# -- what stays PEFT's ------------------------------------------------------------------------------------------------

OTHERS = [
    (peft.LoraConfig, "llama", {"target_modules": ["q_proj"], "use_dora": True}, "more than LoRA"),
    (peft.LoraConfig, "llama", {"target_modules": ["q_proj"], "lora_bias": True}, "has lora_bias"),
    (peft.LoraConfig, "llama", {"target_modules": ["embed_tokens"]}, "Embedding has no fused form"),
    (peft.IA3Config, "llama", {"target_modules": ["k_proj"], "feedforward_modules": []}, "Linear has no fused form"),
    (peft.LoKrConfig, "llama", {"target_modules": ["q_proj"], "rank_dropout": 0.5}, "fused in eval mode alone"),
]


@pytest.mark.parametrize(("config", "family", "settings", "reason"), OTHERS, ids=lambda v: v if type(v) is str else "")
def test_what_has_no_kernel_runs_as_before(config, family, settings, reason):
    case, theirs, ours, report = pair(config, family, settings)
    assert not report.fused and all(reason in why for why in report.fallback.values())
    assert f"0 layers of PEFT fused, {len(report.fallback)} as they were" in str(report) and reason in str(report)
    for mode in (False, True):
        results = []
        for model in (ours.train(mode), theirs.train(mode)):
            torch.manual_seed(4)
            results.append(case.call(model))
        close(*results, torch.float64)
        if "dropout" not in str(settings):
            assert torch.equal(*results)


def test_hooks_are_called():
    case, theirs, ours, _ = lora()
    seen = []
    for model in (theirs, ours):
        for name, module in model.named_modules():
            if name.endswith(("lora_A.default", "base_layer")):
                module.register_forward_hook(lambda module, args, out: seen.append(type(module)) or out * 2)
    close(case.call(ours), case.call(theirs), torch.float64)
    assert len(seen) == 2 * 2 * 4  # models, of each layer two, layers
    assert "have hooks" in str(pk.hf.accelerate(ours))


def test_an_instance_forward_is_left_alone():
    case, theirs, ours, report = lora()
    report.undo()
    layer = ours.get_submodule(report.fused[0])
    layer.forward = lambda x: type(layer).forward(layer, x) * 2
    again = pk.hf.accelerate(ours)
    assert "instance forward" in again.fallback[report.fused[0]] and len(again.fused) == len(report.fused) - 1
    again.undo()
    assert "forward" in vars(layer)


def test_undo_copies_pickles_and_files(tmp_path):
    case, theirs, ours, report = lora()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    twin, read = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    with torch.no_grad():
        next(p for n, p in ours.named_parameters() if "lora_B" in n).add_(1)
    for other in (twin, read):  # have numbers of their own
        close(case.call(other), case.call(theirs), torch.float64)
        assert used(case, other) == {"lora_linear"}
    assert not torch.allclose(case.call(ours), case.call(theirs))
    twin.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make("llama", torch.float64).model, tmp_path)
    close(case.call(again), case.call(theirs), torch.float64)
    report.undo()
    report.undo()
    assert not any("forward" in vars(m) for m in ours.modules()) and not used(case, ours)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(case.call(ours), case.call(theirs))


def test_twice_is_once():
    case, theirs, ours, report = lora()
    before = [vars(m)["forward"] for m in ours.modules() if "forward" in vars(m)]
    assert pk.hf.accelerate(ours).fused == report.fused
    assert [vars(m)["forward"] for m in ours.modules() if "forward" in vars(m)] == before


def test_a_model_without_layers_of_peft():
    with pytest.raises(ValueError, match="no layer of PEFT"):
        pk.hf.accelerate(nn.Linear(2, 2))


def test_a_training_learns_the_same():
    case, theirs, ours, _ = lora()
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            case.loss(model).backward()
            optimizer.step()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-9, rtol=1e-9, msg=name)
