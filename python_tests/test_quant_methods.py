"""Methods on a packed base: every one, merging, training in all its ways, and the command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from models import METHODS, calibrated, close, entered, fits, make, mergeable, perturb, targets_of
from quantized import FORMATS, every_format, layer, packed_layers, quantized, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk

# -- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mlp", "gpt2", "llama"])
@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_every_method_attaches_to_a_packed_base(key, family, name):
    """It starts as on a dense base, trains alone, leaves every bit of the base, and merges into any format and back."""
    if not fits(key, family):
        return
    case = quantized(name, family)
    own, base = packed_layers(case.model), case.call(case.model)
    before = {path: {k: t.clone() for k, t in m.stored().items()} for path, m in own.items()}
    pk.attach(case.model, METHODS[key](**METHODS[key].tiny), targets_of(key, family))
    start = entered(calibrated(case)).call(case.model)
    if (key, name) == ("qlora", "nf4"):  # packs its weight anew, and the scales of the scales then differ a little
        torch.testing.assert_close(start, base, atol=1e-3, rtol=0)
    elif METHODS[key].identity:
        close(start, base)
    total = sum(p.numel() for p in make(family).model.parameters())
    assert pk.counts(case.model).total == total
    perturb(case.model)
    case.loss(case.model).backward()
    assert any(p.grad.abs().sum() > 0 for p in case.model.parameters() if p.grad is not None)
    adapted = case.call(case.model)
    if mergeable(key, family):
        report = pk.merge(case.model)
        assert 0 <= report.error < (0.3 if name == "nf4" else 0.03)
        pk.unmerge(case.model)
        assert torch.equal(case.call(case.model), adapted)
        report = pk.merge(case.model, into="fp32")
        assert report.error < 1e-6
        close(case.call(case.model), adapted)
        assert not packed_layers(case.model)
        pk.unmerge(case.model)
        assert torch.equal(case.call(case.model), adapted)
    pk.detach(case.model)
    for path, module in own.items():
        same_bits(module.stored(), before[path])
    assert torch.equal(case.call(case.model), base)


def test_methods_stack_and_route_on_a_packed_base():
    case = quantized("nf4", "llama")
    for name, method in (("a", pk.LoRA(rank=2)), ("b", pk.DoRA(rank=2)), ("c", pk.IA3())):
        pk.attach(case.model, method, name=name)
        perturb(case.model, name)
    together = case.call(case.model)
    pk.merge(case.model, into="fp32")
    close(case.call(case.model), together)
    pk.unmerge(case.model)
    single = {}
    for name in "ab":
        pk.set_active(case.model, [name])
        single[name] = case.call(case.model)
    with pk.route(case.model, ["a", "b"]):
        out = case.call(case.model)
    close(out[0], single["a"][0])
    close(out[1], single["b"][1])


@every_format
def test_a_bank_and_combine_on_a_packed_base(name):
    case, twin = quantized(name, "llama"), quantized(name, "llama")
    for i, method in enumerate((pk.LoRA(rank=2), pk.QLoRA(rank=3))):
        pk.attach(twin.model, method, ("q", "v"), name="ab"[i], seed=i)
        perturb(twin.model, "ab"[i]).eval()
    bank = pk.AdapterBank(case.model, slots=2, max_rank=3)
    single = {}
    for adapter in "ab":
        bank.load(adapter, twin.model)
        pk.set_active(twin.model, [adapter])
        single[adapter] = twin.call(twin.model)
    with pk.route(case.model, ["b", "a"]), torch.no_grad():
        out = case.call(case.model)
    close(out[0], single["b"][0].detach())
    close(out[1], single["a"][1].detach())
    pk.set_active(twin.model, ["a", "b"])
    both = twin.call(twin.model)
    assert pk.combine(twin.model, ["a", "b"]).exact
    pk.set_active(twin.model, ["combined"])
    close(twin.call(twin.model), both)


# -- merge ------------------------------------------------------------------------------------------------------------


@every_format
def test_merge_reports_what_packing_loses(name):
    case = quantized(name, "mlp", torch.float64)
    pk.attach(case.model, pk.LoRA(rank=2), ("first",))
    perturb(case.model)
    module = case.model.first
    tuner = module.peft.tuners["default"]
    folded = tuner.fold(module.dense(), None)[0].detach()
    report = pk.merge(case.model, stash=False)
    stored = module.dense()
    off = stored - folded
    bias = module.bias.detach()
    length = (folded.square().sum() + bias.square().sum()).sqrt()
    assert report.error == pytest.approx((off.norm() / length).item())
    assert report.rounding == pytest.approx(off.abs().max().item())
    assert "relative error" in str(report)
    pk.detach(case.model)
    assert torch.equal(module.dense(), stored)


@every_format
def test_merge_into_a_dense_model(name):
    case = quantized(name, "llama")
    pk.attach(case.model, pk.LoRA(rank=2))
    perturb(case.model)
    adapted = case.call(case.model)
    report = pk.merge(case.model, into="bf16", stash=False)
    assert report.error < 2**-8
    pk.detach(case.model)
    linears = [m for m in case.model.modules() if type(m) is nn.Linear]
    assert len(linears) == 15
    assert {m.weight.dtype for m in linears} == {torch.bfloat16, torch.float32}  # and the head, which was dense
    case.model.bfloat16()
    off = case.call(case.model).float() - adapted
    assert off.norm() / adapted.norm() < 0.05
    with pytest.raises(ValueError, match="a dense model merges into its own format"):
        pk.merge(pk.attach(make("mlp").model, pk.LoRA(rank=1), ("first",)), into="bf16")
    with pytest.raises(ValueError, match="into='int4'; expected into=None"):
        pk.merge(pk.attach(quantized("nf4", "mlp").model, pk.LoRA(rank=1), ("first",)), into="int4")


def test_a_merge_that_fails_changes_nothing():
    case = quantized("nf4", "mlp")
    pk.attach(case.model, pk.LoRA(rank=2), ("first", "second"))
    before = case.model.state_dict()
    before = {k: t.clone() for k, t in before.items()}
    with torch.no_grad():
        case.model.second.peft.tuners["default"].b.fill_(torch.inf)
    for into in (None, "fp32"):
        with pytest.raises(RuntimeError, match="second.weight would not be finite"):
            pk.merge(case.model, into=into)
        after = case.model.state_dict()
        same_bits(
            {k: t for k, t in after.items() if "peft" not in k}, {k: t for k, t in before.items() if "peft" not in k}
        )


# -- compile, checkpointing, autocast, sharding -----------------------------------------------------------------------


def tuned(name, **kwargs):
    case = quantized(name, "llama")
    pk.attach(case.model, pk.QLoRA(**{"rank": 2, "dropout": 0.0, **kwargs}))
    return perturb(case.model), case


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train_aware", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_one_graph_for_every_length(name, train_aware):
    case = quantized(name, "mlp")
    pk.attach(case.model, pk.QLoRA(rank=2, dropout=0.0, quantization_aware=train_aware), ("first", "second"))
    perturb(case.model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.model, fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 9, 12):
        case.inputs["x"] = torch.randn(length, 12)
        slow = gradients(case.model, case.loss(case.model))
        for n, g in gradients(case.model, case.loss(compiled)).items():
            close(g, slow[n])
    assert counter.frame_count <= 2


@every_format
def test_activation_checkpointing(name):
    model, case = tuned(name, dropout=0.3, quantization_aware=True)
    model.train()
    torch.manual_seed(2)
    plain = gradients(model, case.loss(model))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    torch.manual_seed(2)
    for n, g in gradients(model, case.loss(model)).items():
        close(g, plain[n])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer(reentrant):
    own, _ = layer("nf4", 64, 64)
    x = torch.randn(4, 64, requires_grad=True)
    (wanted,) = torch.autograd.grad(own(x).sum(), x)
    (dx,) = torch.autograd.grad(own(x).sum(), x)
    checkpoint(own, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, dx)
    assert torch.equal(dx, wanted)


@pytest.mark.parametrize("train_aware", [False, True])
@every_format
def test_autocast(name, train_aware):
    model, case = tuned(name, quantization_aware=train_aware)
    wanted, slow = case.call(model), gradients(model, case.loss(model))
    with torch.autocast("cpu", torch.bfloat16):
        out, loss = case.call(model), case.loss(model)
    assert out.dtype == torch.bfloat16
    assert (out - wanted).norm() / wanted.norm() < 0.05
    own = next(iter(packed_layers(model).values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert own(torch.randn(3, own.in_features)).dtype == torch.bfloat16
    for n, g in gradients(model, loss).items():
        assert (g - slow[n]).norm() / (slow[n].norm() + 1e-3) < 0.3, n


_SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch import nn
import peft_kernels as pk

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()


def model():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 8))
    pk.attach(m, pk.QLoRA(rank=2, dropout=0.0, kind=kind, quantization_aware=kind == "int8"))
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return m


for kind in ("nf4", "int8"):
    whole, sharded = model(), model()
    before = {n: t.clone() for n, t in whole.state_dict().items()}
    for m in sharded:
        if isinstance(m, nn.Linear):
            fully_shard(m)
    fully_shard(sharded)
    assert type(sharded[0].weight).__name__ == "DTensor"
    torch.manual_seed(5)
    x = torch.randn(2, 6, 48)
    whole(x.flatten(0, 1)).square().sum().backward()
    sharded(x[rank]).square().sum().backward()
    for (n, p), (_, q) in zip(whole.named_parameters(), sharded.named_parameters()):
        if p.requires_grad:
            torch.testing.assert_close(q.grad.full_tensor() * 2, p.grad, atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    for n, t in sharded.state_dict().items():
        t = t.full_tensor() if hasattr(t, "full_tensor") else t
        assert t.dtype == before[n].dtype, n
        if ".peft." not in n:
            assert torch.equal(t.contiguous().view(torch.uint8), before[n].contiguous().view(torch.uint8)), n
    out = sharded(x[rank])
    assert out.isfinite().all()
dist.destroy_process_group()
print("sharded")
"""


@pytest.mark.slow
def test_packed_tensors_are_sharded(tmp_path):
    """FSDP2 on two processes: the bytes come back as they were, and the gradients are those of one process."""
    port = str(29500 + os.getpid() % 2000)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _SHARDED],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert out.strip().endswith("sharded"), err[-3000:]


# -- the command line -------------------------------------------------------------------------------------------------


def test_tune_reports_a_quantised_base_and_a_sweep_starts_from_a_dense_one(model_dir, tmp_path, capsys, undrawn):
    for module in ("transformers", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    from texts import run, toy, write

    data = write(tmp_path / "toy.tsv", toy())
    same = ("tune", "--model", model_dir, "--data", data, "--set", "rank=2", "--batch-size", "40", "--json")
    code, text, err = run(capsys, *same, "--method", "lora", "--out", tmp_path / "dense")
    assert code == 0, err
    dense = json.loads(text)
    assert dense["base"]["packed"] == {}
    assert dense["base"]["bytes"] == dense["base"]["dense_bytes"]
    code, text, err = run(capsys, *same, "--method", "qlora", "--out", tmp_path / "swept", "--sweep", "kind=nf4,int8")
    assert code == 0, err
    assert json.loads(text)["baseline"] == dense["baseline"]
    for kind in ("nf4", "int8"):
        summary = json.loads((tmp_path / "swept" / f"kind-{kind}" / "summary.json").read_text())
        assert list(summary["base"]["packed"]) == [kind]
        assert summary["base"]["bytes"] < summary["base"]["dense_bytes"] == dense["base"]["bytes"]
        assert summary["merge"]["merged"]
    from peft_kernels import report

    assert "layers in int8; dense it is" in report.table(summary)


@every_format
def test_a_merged_directory_of_a_quantised_model_is_dense(name, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from texts import run

    make("llama").model.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    pk.attach(model, pk.QLoRA(rank=2, quantization_aware=True, **FORMATS[name]))
    pk.save(perturb(model).eval(), tmp_path / "adapter")
    code, text, err = run(capsys, "merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not packed_layers(plain)
    ids = torch.tensor([[3, 4, 5]])
    close(plain(ids).logits, model(ids).logits)
    assert json.loads(text)["merge"]["error"] < 1e-6


def test_counts_and_footprint_see_the_numbers_behind_the_bytes():
    dense = make("llama").model
    total = sum(p.numel() for p in dense.parameters())
    for name in FORMATS:
        case = quantized(name, "llama")
        print_ = pk.footprint(case.model)
        assert print_.packed == {FORMATS[name]["kind"]: 14}
        assert print_.dense == ("lm_head",)
        assert print_.dense_bytes == 4 * total
        own = sum(t.numel() * t.element_size() for m in packed_layers(case.model).values() for t in m.stored().values())
        linear = sum(p.numel() for n, p in dense.named_parameters() if "proj" in n)
        assert print_.bytes == 4 * (total - linear) + own
        pk.attach(case.model, pk.LoRA(rank=2))
        counts = pk.counts(case.model)
        assert counts.total == total
        again = make("llama").model
        pk.attach(again, pk.LoRA(rank=2))
        assert counts == pk.counts(again)
        assert {row["op"] for row in pk.explain(case.model)} == {"lora_add" if name == "int8" else "nf4_lora_linear"}
    assert "14 layers nf4, 1 linear layers dense (lm_head, ...)" in str(pk.footprint(quantized("nf4", "llama").model))
    assert "no packed layer" in str(pk.footprint(dense))


def test_what_is_trained_whole_stays_dense_and_merges_exactly():
    """BERT's pooler, trained beside the head: packed, its copy would be rounded by the merge."""
    case = make("bert")
    pk.attach(case.model, pk.QLoRA(rank=2, quantization_aware=True), train=("classifier", "bert.pooler"))
    perturb(case.model)
    assert pk.footprint(case.model).dense == ("bert.pooler.dense", "classifier")
    case.model.eval()
    with torch.no_grad():
        trained = case.call(case.model)
        pk.merge(case.model)
        assert torch.equal(case.call(case.model), trained)
