"""Quantised models: the packed layers, their files, and quantize."""

import copy
import io
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import make
from quantized import (
    FORMATS,
    every_dtype,
    every_format,
    layer,
    nf4_formats,
    packed,
    packed_layers,
    quantized,
    same_bits,
)
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.site import base_values
from peft_kernels.ops.nf4 import LEVELS

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
