"""Quantised layers and models for tests."""

import pytest
import torch
from models import make
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.packed import Packed
from peft_kernels.engine.site import base_modules

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
