"""Quantised models: the packed layers, quantize, QLoRA, and what every method does on a packed base."""

import copy
import io
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from models import METHODS, calibrated, close, entered, fits, make, mergeable, perturb, targets_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.packed import Packed
from peft_kernels.engine.site import base_modules, base_values
from peft_kernels.ops.nf4 import LEVELS

FORMATS = {
    "nf4": {"kind": "nf4"},
    "nf4 single": {"kind": "nf4", "double_quant": False},
    "nf4 blocks of 128": {"kind": "nf4", "blocksize": 128},
    "int8": {"kind": "int8"},
}
every_format = pytest.mark.parametrize("name", FORMATS)
nf4_formats = pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8"])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def layer(name, n_in=40, n_out=24, bias=True, dtype=torch.float32):
    """(a packed layer, the dense one it was made of)"""
    dense = nn.Linear(n_in, n_out, bias, dtype=dtype)
    return packed(name, dense), dense


def packed(name, linear):
    settings = {k: v for k, v in FORMATS[name].items() if k != "kind"}
    cls = pk.Int8Linear if name == "int8" else pk.NF4Linear
    return cls.from_linear(linear, **settings)


def quantized(name, family, dtype=torch.float32, **kwargs):
    case = make(family, dtype)
    pk.quantize(case.model, **FORMATS[name], **kwargs)
    return case


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


def same_bits(one, other):
    assert list(one) == list(other)
    for key, t in one.items():
        assert t.dtype == other[key].dtype, key
        assert torch.equal(bits(t), bits(other[key])), key


def packed_layers(model):
    return {path: m for path, m in base_modules(model) if isinstance(m, Packed)}


# -- one layer --------------------------------------------------------------------------------------------------------


@every_dtype
@every_format
def test_a_layer_is_the_linear_of_its_dense_weight(name, dtype):
    tolerance = 20 * torch.finfo(dtype).eps
    for n_in, n_out, bias, lead in (
        (64, 32, True, (3,)),
        (33, 7, False, (2, 5)),
        (96, 40, True, ()),
        (1, 3, True, (9,)),
    ):
        own, source = layer(name, n_in, n_out, bias, dtype)
        x = torch.randn(*lead, n_in, dtype=dtype, requires_grad=True)
        y, weight = own(x), own.dense(dtype)
        assert (y.dtype, y.shape) == (dtype, (*lead, n_out))
        truth = F.linear(x.double(), weight.double(), None if source.bias is None else source.bias.double())
        size = truth.abs().max().item() + 1
        torch.testing.assert_close(y.double(), truth, atol=tolerance * size, rtol=0)
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, g)
        wanted = g.double() @ weight.double()
        torch.testing.assert_close(dx.double(), wanted, atol=tolerance * (wanted.abs().max().item() + 1), rtol=0)
        assert own(x[:0] if lead else x).dtype == dtype


@every_format
def test_second_derivatives(name):
    own, _ = layer(name, 12, 5, dtype=torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: own(x).sin(), x)


def test_int8_is_within_half_a_step_and_by_torch_s_kernel(monkeypatch):
    own, dense = layer("int8", 64, 48)
    step = own.scb[:, None] / 127
    assert ((own.dense() - dense.weight).abs() <= step / 2 * (1 + 1e-5)).all()
    calls, kernel = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *a: calls.append(a) or kernel(*a))
    own(torch.randn(2, 64))
    own(torch.randn(500, 64))  # a product with the dense weight is faster
    layer("int8", 33, 4)[0](torch.randn(2, 33))  # of which the kernel would read past the rows
    assert len(calls) == 1


@every_format
def test_weights_that_are_not_finite_do_not_pass_unseen(name):
    dense = nn.Linear(256, 8)
    with torch.no_grad():
        dense.weight[2, 3], dense.weight[5, 200], dense.weight[7] = torch.nan, torch.inf, 0
    weight = packed(name, dense).dense()
    assert weight[2, 3].isnan()
    assert weight[5, 200].isnan()
    if "single" in name or name == "int8":  # else the scale of one block is in a block of scales itself
        assert weight[0].isfinite().all()
        assert not weight[7].any()


@every_format
def test_packing_is_stable(name):
    """What a format stores, it stores again: of its own values, and of the weight it was made of."""
    own, dense = layer(name, 80, 24)
    before = {k: t.clone() for k, t in own.stored().items()}
    own.pack_(dense.weight)
    same_bits(own.stored(), before)
    again = own.rounded(own.dense())
    if "single" in name:
        assert torch.equal(again, own.dense())
    torch.testing.assert_close(again, own.dense(), atol=0.01 * dense.weight.abs().max().item(), rtol=0)


@every_format
def test_packed_tensors_move_and_are_never_cast(name):
    own, _ = layer(name)
    before, x = {k: t.clone() for k, t in own.stored().items()}, torch.randn(3, 40)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        own.to(dtype)
        same_bits(own.stored(), before)
        assert own.dtype == own.bias.dtype == own(x.to(dtype)).dtype == dtype
    assert own(x.bfloat16()).dtype == torch.bfloat16  # whatever its own
    assert not own.weight.requires_grad
    assert all(t.is_meta for t in copy.deepcopy(own).to("meta").stored().values())
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    for twin in (copy.deepcopy(own), torch.load(file, weights_only=False)):
        same_bits(twin.stored(), before)
        assert torch.equal(twin(x), own(x))


def test_new_layers_have_the_initial_weights_of_a_linear():
    for cls, name in ((pk.NF4Linear, "nf4"), (pk.Int8Linear, "int8")):
        torch.manual_seed(3)
        own = cls(40, 24)
        torch.manual_seed(3)
        same_bits(own.state_dict(), packed(name, nn.Linear(40, 24)).state_dict())
        assert name in repr(own)
        assert "in_features=40" in repr(own)
    with pytest.raises(ValueError, match="blocksize is 48"):
        pk.NF4Linear(8, 8, blocksize=48)
    with pytest.raises(ValueError, match="got a LayerNorm; expected a torch.nn.Linear"):
        pk.NF4Linear.from_linear(nn.LayerNorm(3))


# -- state_dict -------------------------------------------------------------------------------------------------------


def of_bitsandbytes(n, k, blocksize=64, nested=True, dtype="bfloat16", prefix="", bias=False):
    """A state dict as bitsandbytes 0.50 documents and writes it, of arbitrary bytes and scales."""
    blocks = -(-n * k // blocksize)
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": dtype, "shape": [n, k]}
    out = {"weight": torch.randint(0, 256, ((n * k + 1) // 2, 1), dtype=torch.uint8)}
    if bias:
        out["bias"] = torch.randn(n, dtype=getattr(torch, dtype))
    out["weight.absmax"] = torch.rand(blocks)
    out["weight.quant_map"] = torch.tensor(LEVELS)
    if nested:
        out["weight.absmax"] = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        out["weight.nested_absmax"] = torch.rand(-(-blocks // 256))
        out["weight.nested_quant_map"] = torch.rand(256).sort().values
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": torch.rand(()).item()}
    text = json.dumps(state).encode()
    out["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return {prefix + key: t for key, t in out.items()}


def by_hand(state, n, k, blocksize):
    """The weight of such a state dict, number by number."""
    code = torch.stack((state["weight"] >> 4, state["weight"] & 15), -1).view(-1)[: n * k].long()
    scales = state["weight.absmax"]
    if "weight.nested_absmax" in state:
        told = json.loads(bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()))
        second = state["weight.nested_absmax"].repeat_interleave(256)[: len(scales)]
        scales = state["weight.nested_quant_map"][scales.long()] * second + torch.tensor(told["nested_offset"])
    return (torch.tensor(LEVELS)[code] * scales.repeat_interleave(blocksize)[: n * k]).view(n, k)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k", "blocksize"), [(24, 64, 64), (7, 33, 32), (40, 96, 4096)])
def test_bitsandbytes_state_dict_is_read_and_written_to_the_byte(n, k, blocksize, nested, assign):
    state = of_bitsandbytes(n, k, blocksize, nested, bias=True)
    own = pk.NF4Linear(k, n, dtype=torch.bfloat16)  # of other settings, which the file overrules
    assert not own.load_state_dict(dict(state), assign=assign).missing_keys
    same_bits(own.state_dict(), state)
    assert own.dtype == torch.bfloat16
    assert torch.equal(own.dense(torch.float32), by_hand(state, n, k, blocksize))
    assert torch.equal(own.dense(), by_hand(state, n, k, blocksize).bfloat16())
    assert (own.weight.data_ptr() == state["weight"].data_ptr()) == assign


@every_format
def test_state_dicts_go_round(name):
    """Packed into a new layer, into one on the meta device, through safetensors; dense ones are quantised."""
    from safetensors.torch import load, save

    own, dense = layer(name, 40, 24)
    state = load(save(own.state_dict()))
    fresh = packed(name, nn.Linear(40, 24))
    fresh.load_state_dict(state)
    same_bits(fresh.state_dict(), own.state_dict())
    hollow = packed(name, nn.Linear(40, 24)).to("meta")
    hollow.load_state_dict(state, assign=True)
    same_bits(hollow.state_dict(), own.state_dict())
    fresh = packed(name, nn.Linear(40, 24))
    fresh.load_state_dict(dense.state_dict())
    same_bits(fresh.state_dict(), own.state_dict())


def test_state_dicts_that_do_not_fit_say_what_is_wrong():
    state = of_bitsandbytes(24, 64)
    fp4 = {"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [24, 64]}
    mark = "weight.quant_state.bitsandbytes__nf4"
    for change, text in (
        ({"weight": state["weight"][:-1]}, "packed has 767 bytes"),
        ({"weight.nested_absmax": None}, "lacks tensors"),
        ({"weight.absmax": state["weight.absmax"][:-1]}, "absmax_q is torch.uint8"),
        ({"weight.quant_map": torch.rand(16)}, "levels are not those of nf4"),
        ({mark: None}, "without weight.quant_state"),
        ({mark: torch.tensor(list(json.dumps(fp4).encode()), dtype=torch.uint8)}, "fp4 of shape"),
        ({mark: torch.tensor([1, 2], dtype=torch.uint8)}, "is not JSON"),
        ({"weight": None}, 'Missing key.*"weight"'),
        ({"bias": torch.zeros(24)}, 'Unexpected key.*"bias"'),
        ({"weight.more": torch.zeros(1)}, 'Unexpected key.*"weight.more"'),
    ):
        given = {k: t for k, t in {**state, **change}.items() if t is not None}
        own = pk.NF4Linear(64, 24, bias=False)
        before = {k: t.clone() for k, t in own.stored().items()}
        with pytest.raises(RuntimeError, match=text):
            own.load_state_dict(given)
        if "Unexpected" not in text:
            same_bits(own.stored(), before)
    own = pk.Int8Linear(64, 24, bias=False)
    given = own.state_dict()
    for change, text in (
        ({"SCB": torch.rand(3)}, r"with SCB torch.float32 \(3,\)"),
        ({"weight": given["weight"].float()}, "expected int8"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format 2; expected 0"),
    ):
        with pytest.raises(RuntimeError, match=text):
            own.load_state_dict({**given, **change})


def test_packed_bytes_in_a_wider_storage():
    """quant_storage of FSDP: the same bytes as bf16 or fp32."""
    state, x = of_bitsandbytes(24, 64), torch.randn(3, 64)
    plain, wide = pk.NF4Linear(64, 24, bias=False), pk.NF4Linear(64, 24, bias=False)
    plain.load_state_dict(state)
    for storage in (torch.bfloat16, torch.float32):
        given = {k: t.clone() for k, t in state.items()}
        given["weight"] = given["weight"].view(-1).view(storage)[:, None]
        wide.load_state_dict(given, assign=True)
        same_bits(wide.state_dict(), given)
        assert torch.equal(wide(x), plain(x))
        wide.to(torch.float64).to(torch.float32)
        same_bits({"weight": wide.weight}, {"weight": given["weight"]})
        wide.pack_(torch.ones(24, 64))
        torch.testing.assert_close(wide.dense(torch.float32), torch.ones(24, 64), atol=0.01, rtol=0)


# -- bitsandbytes itself ----------------------------------------------------------------------------------------------


class QuantState:
    """What a Linear4bit's weight carries."""

    def __init__(self, own):
        self.quant_type, self.code, self.shape, self.dtype = "nf4", torch.tensor(LEVELS), (24, 64), torch.bfloat16
        self.nested, self.blocksize, self.absmax = own.double_quant, own.blocksize, own.absmax
        if self.nested:
            self.absmax, self.offset, self.state2 = own.absmax_q, own.offset, copy.copy(self)
            vars(self.state2).update(absmax=own.absmax, code=own.code2, blocksize=256)


class Linear4bit(nn.Linear):
    def forward(self, x):
        raise AssertionError("replaced")


class Linear8bitLt(Linear4bit):
    pass


@every_format
def test_live_layers_of_bitsandbytes_are_taken_over_without_a_copy(name):
    own, _ = layer(name, 64, 24, dtype=torch.bfloat16)
    live = (Linear8bitLt if name == "int8" else Linear4bit)(64, 24, dtype=torch.bfloat16)
    live.weight, live.bias = nn.Parameter(own.weight.data, requires_grad=False), own.bias
    if name == "int8":
        live.weight.SCB = own.scb
    else:
        live.weight.quant_state = QuantState(own)
    model = nn.Sequential(live)
    kind = "int8" if name == "nf4" else "nf4"  # it has one already
    pk.quantize(model, kind)
    assert model[0] is live
    assert type(live) is type(own)
    assert {k: t.data_ptr() for k, t in live.stored().items()} == {k: t.data_ptr() for k, t in own.stored().items()}
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(live(x), own(x))
    if name != "int8":
        live = Linear4bit(64, 24)
        live.weight.quant_state = QuantState(own)
        live.weight.quant_state.quant_type = "fp4"
        with pytest.raises(ValueError, match="holds fp4"):
            pk.NF4Linear.from_linear(live)


@nf4_formats
def test_against_bitsandbytes_itself(name):
    bnb = pytest.importorskip("bitsandbytes")
    settings = FORMATS[name]
    nested, blocksize = settings.get("double_quant", True), settings.get("blocksize", 64)
    weight = torch.randn(48, 128, dtype=torch.bfloat16)
    live = bnb.nn.Linear4bit(
        128, 48, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type="nf4", quant_storage=torch.uint8
    )
    live.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type="nf4", blocksize=blocksize
    )
    live = live.to("cpu")
    state = {k: t.clone() for k, t in live.state_dict().items()}
    own = pk.NF4Linear(128, 48)
    own.load_state_dict(state)
    same_bits(own.state_dict(), state)
    taken = pk.NF4Linear.from_linear(live)
    assert taken.weight.data_ptr() == live.weight.data_ptr()
    same_bits({k: t for k, t in taken.state_dict().items()}, state)
    dense = bnb.functional.dequantize_4bit(live.weight.data, live.weight.quant_state)
    assert torch.equal(own.dense(), dense.to(torch.bfloat16))
    linear = nn.Linear(128, 48, bias=False, dtype=torch.bfloat16)
    linear.weight.data = weight
    made = packed(name, linear)
    assert torch.equal(made.weight.view(-1), state["weight"].view(-1))


# -- quantize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mlp", "bert", "gpt2", "llama", "t5", "gpt_neox"])
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_quantize_packs_the_linear_layers(name, family):
    case = make(family, torch.float64)
    before, dense = case.call(case.model), base_values(case.model)
    modules = dict(case.model.named_modules())
    assert pk.quantize(case.model, **FORMATS[name]) is case.model
    assert modules == dict(case.model.named_modules())
    own = packed_layers(case.model)
    linear = {p for p, m in modules.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    kept = {"bert": {"classifier"}, "gpt2": {"lm_head"}, "llama": {"lm_head"}, "gpt_neox": {"lm_head"}}.get(family)
    if family == "t5":
        kept = {p for p in linear if p.endswith((".wo", "lm_head"))}
    assert linear - set(own) == (kept or set())
    for key, value in base_values(case.model).items():
        if key.rpartition(".")[0] in own and key.endswith("weight"):
            whole = dense[key].T if family == "gpt2" else dense[key]
            assert 0 < (value - whole).norm() / whole.norm() < (0.2 if name == "nf4" else 0.02), key
        else:
            assert torch.equal(value, dense[key]), key
    after = case.call(case.model)
    assert 0 < (after - before).norm() / before.norm() < (0.6 if name == "nf4" else 0.05)
    twin = make(family, torch.float64)
    pk.quantize(twin.model, **FORMATS[name], progress=False)
    assert torch.equal(twin.call(twin.model), after)
    with pytest.raises(ValueError, match="nothing to quantise"):
        pk.quantize(case.model)


def test_what_stays_dense():
    case = make("llama")
    pk.quantize(case.model, skip=("q", "*.layers.1", "head"))
    own = packed_layers(case.model)
    assert len(own) == 6
    assert not any("q_proj" in path or ".1." in path for path in own)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 16), nn.Linear(16, 16))
    tied = nn.Sequential(encoder, nn.Linear(8, 8), nn.Linear(8, 8))
    tied[2].weight = tied[1].weight
    pk.quantize(tied)
    assert list(packed_layers(tied)) == ["0.1"]
    assert "1 layers nf4, 5 linear layers dense" in str(pk.footprint(tied))
    for skip in ("q_projj", "*.nothing"):
        with pytest.raises(ValueError, match=rf"{skip.replace('*', '.')}' matches nothing in LlamaForCausalLM"):
            pk.quantize(make("llama").model, skip=skip)


def test_refusals():
    for kwargs, text in (
        ({"kind": "nf5"}, "kind='nf5'; expected one of nf4, int8"),
        ({"blocksize": 63}, "blocksize is 63; expected one of 32"),
    ):
        with pytest.raises(ValueError, match=text):
            pk.quantize(make("mlp").model, **kwargs)
    with pytest.raises(ValueError, match="quantize got a str"):
        pk.quantize("model")
    case = make("mlp")
    pk.attach(case.model, pk.LoRA(rank=1), ("first",))
    for attempt in (lambda: pk.quantize(case.model), lambda: pk.attach(case.model, pk.QLoRA(rank=1), name="b")):
        with pytest.raises(ValueError, match="has an adapter, made for its dense weights"):
            attempt()
    assert not packed_layers(case.model)
    half = make("mlp").model
    half.first.to("meta")
    with pytest.raises(ValueError, match="first.weight is on the meta device while others are not"):
        pk.quantize(half)
    with pytest.raises(ValueError, match="QLoRA kind = 'nf5'; expected one of nf4, int8"):
        pk.QLoRA(kind="nf5")


@every_format
def test_hooks_modes_flags_and_biases_stay(name):
    case, seen = make("mlp"), []
    first, bias = case.model.first, case.model.first.bias
    first.register_forward_hook(lambda *_: seen.append(1))
    bias.requires_grad_(False)
    first.train()
    pk.quantize(case.model, **FORMATS[name])
    assert case.model.first is first
    assert first.bias is bias
    assert first.training
    case.call(case.model)
    assert seen == [1]


@every_format
def test_a_model_on_the_meta_device_takes_a_packed_checkpoint(name):
    full, hollow = quantized(name, "llama"), make("llama").model.to("meta")
    pk.quantize(hollow, **FORMATS[name])
    state = {k: t for k, t in full.model.state_dict().items()}
    assert state.keys() == hollow.state_dict().keys()
    hollow.load_state_dict(state, assign=True)
    hollow.model.rotary_emb = full.model.model.rotary_emb  # a buffer that is in no checkpoint
    assert torch.equal(full.call(hollow), full.call(full.model))


def test_dense_weights_go_one_by_one(monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
    weights, alive = [weakref.ref(linear.weight) for linear in model], []
    original = pk.NF4Linear.from_linear.__func__

    def counted(cls, linear, **settings):
        alive.append(sum(w() is not None for w in weights))
        return original(cls, linear, **settings)

    monkeypatch.setattr(pk.NF4Linear, "from_linear", classmethod(counted))
    pk.quantize(model)
    assert alive == [5, 4, 3, 2, 1]
    assert not any(w() is not None for w in weights)


_STREAMED = """
import sys, threading, torch, time
from safetensors.torch import load_file
from torch import nn
import peft_kernels as pk

torch.set_num_threads(1)
layers, n = 24, 1024
with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(n, n, bias=False) for _ in range(layers)])
model.load_state_dict(load_file(sys.argv[1]), assign=True)  # pages of the file, not memory of the process
pk.NF4Linear(64, 64)


def resident():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))


start, peak, done = resident(), 0, False


def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0005)


thread = threading.Thread(target=watch)
thread.start()
pk.quantize(model, sys.argv[2])
done = True
thread.join()
print(peak - start, pk.footprint(model).bytes, 4 * n * n)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_quantize_streams(tmp_path, name):
    """A model whose dense weights are pages of a file needs its quantised weights and the layer at hand."""
    from safetensors.torch import save_file

    save_file({f"{i}.weight": torch.randn(1024, 1024) for i in range(24)}, tmp_path / "model.safetensors")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(
        [sys.executable, "-c", _STREAMED, str(tmp_path / "model.safetensors"), name],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    peak, quantised, one = map(int, done.stdout.split())
    kernel = name == "int8" or not pk.ops.all_ops()["quantize_nf4"].backends()["cpu"]
    assert quantised < (0.14 if name == "nf4" else 0.26) * 24 * one
    assert peak < quantised + (1 if kernel else 4) * one  # of 24; plain torch holds more on the way to NF4


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


# -- QLoRA ------------------------------------------------------------------------------------------------------------


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
