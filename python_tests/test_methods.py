"""The laws of every method on every family: what the engine promises of a method, whatever it computes."""

import ast
import copy
import dataclasses
import inspect
import io
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from models import (
    EVERY,
    METHODS,
    assert_same,
    attached,
    calibrated,
    close,
    fits,
    make,
    mergeable,
    over,
    perturb,
    snapshot,
    targets_of,
)
from prompts import decoder, prompt

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.life import trained
from peft_kernels.engine.method import needed
from peft_kernels.engine.site import base_parameters, base_values
from peft_kernels.ops._op import Op, recording

grid = pytest.mark.parametrize(("key", "family"), over(EVERY))
every_method = pytest.mark.parametrize("key", METHODS)


# -- identity, freezing, gradients ------------------------------------------------------------------------------------


@grid
def test_identity_at_the_start(key, family):
    case = make(family, key=key)
    before = case.call(case.model)
    pk.attach(case.model, METHODS[key](**METHODS[key].tiny), targets_of(key, family))
    if METHODS[key].identity:
        close(case.call(case.model), before)
    else:
        assert not torch.allclose(case.call(case.model), before)


@grid
def test_only_the_adapter_trains_and_the_base_stays_bit_equal(key, family):
    case = attached(key, family)
    before = snapshot(case.model)
    trainable = {n for n, p in case.model.named_parameters() if p.requires_grad}
    own = {
        f"{s}.peft.default.{n}".lstrip(".") for s, t in tuners(case.model, "default") for n, _ in t.named_parameters()
    }
    assert trainable == own
    optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.1)
    case.model.train()
    case.loss(case.model).backward()
    optimizer.step()
    assert_same(case.model, before)


@grid
def test_every_tuner_parameter_gets_a_gradient(key, family):
    case = attached(key, family)
    perturb(case.model).train()
    missing = {
        n for n, p in case.model.named_parameters() if p.requires_grad and p.numel()
    }  # a mask may leave a layer out
    for _ in range(3 if key != "diffpruning" else 30):  # dropout and closed gates may leave an entry out
        case.loss(case.model).backward()
        for n, p in case.model.named_parameters():
            if p.grad is not None and p.grad.abs().sum() > 0:
                missing.discard(n)
    # A key's bias shifts all scores of a query alike: softmax cancels it, so its gradient is truly zero.
    unseen = {n for n in missing if ".key." in n and n.endswith("bias")}
    # Token types and positions that the inputs do not use; nothing else.
    unseen |= {n for n in missing if "token_type" in n or "position" in n or "wpe" in n}
    assert missing <= unseen


@grid
def test_gradients_match_the_plain_torch_fold_in_fp64(key, family):
    """The forward of a method against the definition, its fold, gradients of the input side included."""
    case = attached(key, family, torch.float64)
    perturb(case.model).eval()
    params = [p for p in case.model.parameters() if p.requires_grad]
    fast = torch.autograd.grad(case.loss(case.model), params, allow_unused=True)
    with folded_forwards(case.model):
        slow = torch.autograd.grad(case.loss(case.model), params, allow_unused=True)
    for f, s in zip(fast, slow, strict=True):
        assert (f is None) == (s is None)
        if f is not None:
            close(f, s, torch.float64)


@pytest.mark.gpu
@every_method
def test_a_gpu_computes_what_the_cpu_does(key):
    """Outputs and gradients, of a model that moves with its adapter."""
    case = attached(key, "bert" if fits(key, "bert") else "gpt2")
    params = [p for p in perturb(case.model).eval().parameters() if p.requires_grad]

    def results():
        grads = torch.autograd.grad(case.loss(case.model), params, allow_unused=True)
        return [case.call(case.model).detach(), *grads]

    before = results()
    case.model.cuda()
    case.inputs.update({name: value.cuda() for name, value in case.inputs.items()})
    for there, here in zip(results(), before, strict=True):
        assert (there is None) == (here is None)
        if here is not None:
            close(there.cpu(), here)


class folded_forwards:
    """Within the `with`, tuners that fold run the engine's default forward instead of their own."""

    def __init__(self, model):
        self.modules = [t for _, t in tuners(model, "default") if t.mergeable and not t.opaque]

    def __enter__(self):
        for t in self.modules:
            t.forward = pk.Tuner.forward.__get__(t)

    def __exit__(self, *_):
        for t in self.modules:
            del t.forward


@grid
def test_fold_law_16_bit(key, family):
    """In bf16, forward and folded are both within twice plain torch's distance from the fp64 truth."""
    case = attached(key, family, torch.bfloat16)
    perturb(case.model)
    truth = copy.deepcopy(case.model).double()
    exact = dataclasses.replace(
        case, model=truth, inputs={k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    )
    with torch.no_grad():
        t, fast = exact.call(truth), case.call(case.model)
        if not mergeable(key, family):
            return
        pk.merge(case.model)
        merged = case.call(case.model)
    base = (merged.double() - t).abs().max()
    scale = t.abs().max() * torch.finfo(torch.bfloat16).eps
    assert (fast.double() - t).abs().max() <= 2 * base + 2 * scale


# -- life -------------------------------------------------------------------------------------------------------------


@grid
def test_merge_and_unmerge(key, family):
    case = attached(key, family)
    perturb(case.model)
    if not mergeable(key, family):
        with pytest.raises(RuntimeError, match="shares its weight|no weight-space form"):
            pk.merge(case.model)
        return
    before, adapted = snapshot(case.model), case.call(case.model)
    report = pk.merge(case.model)
    assert report.numbers > 0
    close(case.call(case.model), adapted)
    with pytest.raises(RuntimeError, match="merged already"):
        pk.merge(case.model)
    pk.unmerge(case.model)
    assert_same(case.model, before)
    assert torch.equal(case.call(case.model), adapted)
    with pytest.raises(RuntimeError, match="nothing is merged"):
        pk.unmerge(case.model)


@grid
def test_detach_restores_everything(key, family):
    case = make(family, key=key)
    flags = {n: p.is_floating_point() and i % 3 != 0 for i, (n, p) in enumerate(case.model.named_parameters())}
    for n, p in case.model.named_parameters():
        p.requires_grad_(flags[n])
    classes = {n: type(m) for n, m in case.model.named_modules()}
    before, out, keys = snapshot(case.model), case.call(case.model), list(case.model.state_dict())
    pk.attach(case.model, METHODS[key](**METHODS[key].tiny), targets_of(key, family))
    perturb(case.model)
    pk.detach(case.model)
    assert classes == {n: type(m) for n, m in case.model.named_modules()}
    assert flags == {n: p.requires_grad for n, p in case.model.named_parameters()}
    assert keys == list(case.model.state_dict())
    assert_same(case.model, before)
    assert torch.equal(case.call(case.model), out)


@grid
def test_save_and_load(key, family, tmp_path):
    case = attached(key, family, seed=3)
    perturb(case.model)
    expected, counts = case.call(case.model), pk.counts(case.model)
    where = pk.save(case.model, tmp_path / "adapter")
    fresh = make(family, key=key)
    pk.load(fresh.model, where)
    close(fresh.call(fresh.model), expected)
    for (_, ours), (_, saved) in zip(tuners(fresh.model, "default"), tuners(case.model, "default"), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), saved.parameters(), strict=True))
    assert pk.counts(fresh.model) == dataclasses.replace(counts, trainable=0)
    again = pk.load(make(family, key=key).model, where, "other", trainable=True)
    assert pk.counts(again, "other") == counts
    assert counts.bytes <= (where / "adapter_model.safetensors").stat().st_size <= counts.bytes + 100_000
    assert not list(tmp_path.glob(".*"))


@grid
def test_copies_and_pickles(key, family):
    case = attached(key, family)
    perturb(case.model)
    expected = case.call(case.model)
    twin = copy.deepcopy(case.model)
    file = io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    thawed = torch.load(file, weights_only=False)
    perturb(case.model)  # the copies have their own numbers
    for other in (twin, thawed):
        assert torch.equal(case.call(other), expected)
        pk.detach(other)
        close(case.call(other), case.call(make(family, key=key).model))


@pytest.mark.parametrize(("key", "family"), over(("mlp", "llama", "gpt_neox")))
def test_compiled_in_one_graph(key, family):
    case = attached(key, family)
    perturb(case.model)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    close(case.call(compiled), case.call(case.model))
    case.loss(compiled).backward()
    grads = {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    case.loss(case.model).backward()
    for n, p in case.model.named_parameters():
        if p.grad is not None:
            close(grads[n], p.grad)


@pytest.mark.parametrize(("key", "family"), over(f for f in EVERY if f != "mlp"))  # the switch is transformers'
def test_gradient_checkpointing_repeats_the_draw(key, family):
    case = attached(key, family)
    perturb(case.model).train()

    def gradients():
        torch.manual_seed(7)
        case.model.zero_grad()
        case.loss(case.model).backward()
        return {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}

    for m in case.model.modules():  # the base model's own dropouts
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    plain = gradients()
    enable = getattr(case.model, "activation_checkpointing_enable", None) or case.model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for n, g in plain.items():
        close(checkpointed[n], g)


def _two():
    return prompt(0), prompt(1)


# method -> field -> another value than that of `tiny`, or a function that makes it
_LORA = {"rank": 3, "alpha": 3.0, "dropout": 0.7, "rslora": True, "rank_pattern": {"q": 1}, "alpha_pattern": {"v": 5.0}}
_COMPACTER = {"n": 4, "reduction_factor": 4, "rank": 0, "activation": "tanh", "norms": False}
_BOTTLENECK = {"reduction_factor": 4, "size": 3, "activation": "tanh", "init": "bert", "dropout": 0.5}
_PROMPT = {
    "length": 4,
    "init": "vocabulary",
    "text": "four",
    "tokens": (4, 5),
    "classes": ((4, 5),),
    "subspace": 3,
}
OTHER_VALUES = {
    "adamix": {
        **_BOTTLENECK,
        "experts": 2,
        "share_up": False,
        "share_down": True,
        "consistency": 1e6,
        "average": False,
    },
    "adapterdrop": {**_BOTTLENECK, "drop": 0, "random": True},
    "adapterl": _BOTTLENECK,
    "bylayer": {"members": [pk.at("q", pk.LoRA(rank=2), layers=0)]},
    "compacter": _COMPACTER,
    "compacterpp": _COMPACTER,
    "diffpruning": {
        "keep_ratio": 0.4,
        "pattern": "1:4",
        "structured": False,
        "alpha": 0.6,
        "alpha_lr": 0.5,
        "penalty": 10.0,
        "l0": "sum",
        "finetune": 0.7,
        "finetune_lr": 0.1,
    },
    "far": {"ratio": 0.6, "prime": 0.5},
    "fishmask": {"keep_ratio": 0.4, "pattern": "1:4", "expected": True, "samples": 1, "count_head": False},
    "gated": {"inner": pk.LoRA(rank=3), "reads": "output"},
    "union": {"members": [pk.LoRA(rank=1)]},
    "dora": _LORA,
    "houlsby": {**_BOTTLENECK, "norms": False},
    "ia3": {"feedforward": ("v", "down")},
    "infix": {"length": 4},
    "ipt": {"length": 4, "k": 5, "inner": 6, "decoder": decoder},
    "krona": {"factor": 2, "scale": 3.0, "init": "nearest"},
    "krona_res": {"factor": 2, "scale": 3.0, "residual": False},
    "layertype": {"types": ("o",)},
    "lets": {"keep_ratio": 0.4, "pattern": "1:4", "tuned": 1, "samples": 1},
    "lokr": {
        "rank": 2,
        "alpha": 3.0,
        "decompose_both": False,
        "decompose_factor": 2,
        "use_effective_conv2d": True,
        "rank_dropout": 0.7,
        "rank_dropout_scale": True,
        "module_dropout": 1.0,
        "zero": "w2",
        "rank_pattern": {"q": 2},
        "alpha_pattern": {"v": 5.0},
    },
    "lora": _LORA,
    "lst": {"reduction": 4, "drop": 0, "keep": (0,), "temperature": 1.0, "init": "random"},
    "ltsft": {"keep_ratio": 0.4, "pattern": "1:4", "prime": 0.3, "l1": 100.0},
    "mam": {"length": 4, "hidden": 0, "size": 3, "scale": 3.0},
    "magnitude": {
        "keep_ratio": 0.4,
        "pattern": "1:4",
        "scope": "global",
        "schedule": "cubic",
        "warm_up": 0.4,
        "cool_down": 0.5,
        "retrain": False,
    },
    "movement": {
        "keep_ratio": 0.4,
        "pattern": "1:4",
        "scope": "global",
        "mode": "soft",
        "threshold": 0.4,
        "penalty": 0.5,
        "warm_up": 0.4,
        "cool_down": 0.5,
        "scores_lr": 0.5,
        "freeze": True,
    },
    "parallel": {**_BOTTLENECK, "scale": 3.0, "learned": True},
    "pfeiffer": _BOTTLENECK,
    "prefix": {"length": 4, "hidden": 0, "shift": True},
    "prompt": _PROMPT,
    "ptuning": {"length": 4, "encoder": "mlp", "hidden": 5, "layers": 1, "dropout": 0.5},
    "qlora": {
        **_LORA,
        "kind": "int8",
        "double_quant": True,
        "blocksize": 32,
        "skip": ("head", "q"),
        "quantization_aware": False,
    },
    "random": {"keep_ratio": 0.4, "pattern": "1:4"},
    "s4": {"budget": 12.0, "members": [pk.LoRA(rank=2)]},
    "said": {"d": 500, "structure_aware": False, "compat_grad_scale": True},
    "sparseadapter": {
        **_BOTTLENECK,
        "init": "normal",
        "placement": "pfeiffer",
        "keep_ratio": 0.3,
        "score": "grasp",
        "scope": "tensor",
        "rounds": 1,
        "samples": 1,
    },
    "spot": {
        **_PROMPT,
        "source": partial(prompt, 0),
        "weights": (1.0, 3.0),
        "nearest": partial(prompt, 9),
        "top": 2,
    },
    "structured": {"neurons": 0.25, "heads": 1.0, "score": "gradient", "scope": "global"},
    "svd": {"rank": 3, "energy": 0.5, "form": "kron", "factor": 2},
    "toplayers": {"n": 2},
    "unipelt": {"rank": 1, "length": 4, "hidden": 0, "reduction_factor": 4},
    "warp": {
        "length": 5,
        "front": 2,
        "behind": 0,
        "mask_token": 7,
        "text": "five!",
        "tokens": (8,),
        "init": "labels",
        "classes": ((3, 4), (5,), (6,)),
        "num_labels": 1,
    },
}
# (method, field) -> other fields with which alone it is read
BESIDE = {
    ("adamix", "consistency"): {"init": "bert"},
    ("adamix", "reduction_factor"): {"size": 0},
    ("adamix", "share_down"): {"share_up": False},
    ("sparseadapter", "rounds"): {"score": "synflow"},
    ("diffpruning", "l0"): {"penalty": 10.0},
    ("lokr", "rank_dropout_scale"): {"rank_dropout": 0.5},
    ("magnitude", "warm_up"): {"schedule": "cubic"},
    ("magnitude", "cool_down"): {"schedule": "cubic"},
    ("movement", "scores_lr"): {"mode": "soft"},
    ("movement", "threshold"): {"mode": "soft", "scores_lr": 0.5},
    ("movement", "penalty"): {"mode": "soft", "scores_lr": 0.5},
    ("prompt", "text"): {"init": "text", "text": "five!"},
    ("prompt", "tokens"): {"init": "text", "tokens": (3,)},
    ("prompt", "classes"): {"init": "labels", "classes": ((3,),)},
    ("spot", "text"): {"init": "text", "text": "five!"},
    ("spot", "tokens"): {"init": "text", "tokens": (3,)},
    ("spot", "classes"): {"init": "labels", "classes": ((3,),)},
    **{("spot", name): {"source": _two} for name in ("weights", "nearest")},
    ("spot", "top"): {"source": _two, "nearest": partial(prompt, 9)},
    ("svd", "energy"): {"rank": 0},
    ("svd", "factor"): {"form": "kron"},
}
BESIDE |= {("warp", "init"): {"classes": ((3,), (5,), (6,))}}
BESIDE |= {("warp", "classes"): {"init": "labels", "classes": ((7,), (5,), (6,))}}
# (method, field) -> (family, targets) of the sites where alone it is read
ELSEWHERE = {("infix", "length"): ("gpt2", None), ("lokr", "use_effective_conv2d"): ("vit", "embed")}


@every_method
def test_every_field_is_read(key):
    """Changing a field changes what is built or saved: no field is decoration."""

    def fingerprint(family, targets, **fields):
        fields = {name: value() if callable(value) else value for name, value in fields.items()}
        case, cfg = make(family), METHODS[key](**{**METHODS[key].tiny, **fields})
        cfg = cfg.spelled(lambda text: [len(text)], ())
        pk.attach(case.model, cfg, targets, train=("head",) if cfg.samples else ())
        for m in case.model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
        calibrated(case)
        trains = type(cfg).phases is not pk.Method.phases or key == "said"
        if trains and trained(case.model):  # some fields speak of training alone
            pk.fit(case.model, [{**case.inputs, "labels": torch.arange(2)}] * 10, progress=False)
        perturb(case.model).train()
        torch.manual_seed(0)
        return case.call(case.model).detach()

    for field in dataclasses.fields(METHODS[key]):
        beside, other = BESIDE.get((key, field.name), {}), {field.name: OTHER_VALUES[key][field.name]}
        where = ELSEWHERE.get((key, field.name), ("bert", None))
        assert not torch.allclose(fingerprint(*where, **beside), fingerprint(*where, **{**beside, **other})), field.name


@every_method
def test_method_goes_through_json(key):
    cfg = METHODS[key](**METHODS[key].tiny)
    assert pk.Method.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
    assert cfg.lr > 0
    assert METHODS[key].__doc__
    assert dataclasses.is_dataclass(cfg)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.rank = 1


def reached(module, seen):
    """The csrc folders of the ops that a module of methods calls, itself or by what it imports from its package."""
    if module in seen:
        return set()
    seen.add(module)
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops":
            home = vars(inspect.getmodule(getattr(pk.ops, node.attr)))
            found |= {op.family for op in home.values() if isinstance(op, Op)}
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found |= reached(sys.modules[f"peft_kernels.methods.{node.module}"], seen)
        elif isinstance(node, ast.ImportFrom) and node.module is None and "quant" in [a.name for a in node.names]:
            found |= {"nf4"}
    return found


OPS = pk.ops.all_ops()


@every_method
def test_the_kernels_of_a_method_are_those_that_it_runs_on(key):
    cls = METHODS[key]
    assert set(cls.kernel) <= {op.family for op in OPS.values()}
    assert set(cls.kernel) <= reached(sys.modules[cls.__module__], set())
    if needed(cls):  # it runs on what it is given
        return
    with recording() as choices:
        case = attached(key, "bert" if fits(key, "bert") else "gpt2")
        case.model.train()
        case.loss(case.model).backward()
    assert {OPS[choice["op"]].family for choice in choices} <= set(cls.kernel)


def test_a_method_needs_a_family():
    with pytest.raises(ValueError, match="class Odd has family = 'odd'; expected one of additive, selective"):

        class Odd(pk.Method, roles=("q",), lr=1e-3, tiny={}, family="odd"):
            pass


def values(model):
    return {n: t.clone() for n, t in base_values(model).items()}


@grid
def test_counts_agree_with_each_other(key, family):
    case = attached(key, family)
    counts = pk.counts(case.model)
    assert counts.total == sum(p.numel() for _, p in base_parameters(make(family).model))
    base = make(family, key=key).model  # its buffers are stored with a whole copy of it
    kept = sum(b.numel() for n, b in base.named_buffers() if n in base.state_dict()) if key == "full" else 0
    assert 0 < counts.trainable == counts.stored - kept
    if key != "full":
        before, _ = values(case.model), perturb(case.model)
        if mergeable(key, family):
            pk.merge(case.model, into="fp32" if key == "qlora" else None)
            now = values(case.model)
            moved = sum(int((now[n] != v).sum()) for n, v in before.items() if n in now)
            assert (0 if key == "qlora" else 0.9) * counts.changed <= moved <= counts.changed  # a level may stay
