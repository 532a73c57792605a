"""Tiny random models of each family, with inputs: what the laws of the engine run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.site import base_parameters


class MLP(nn.Module):
    """A plain module that no table knows: targets are globs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.ln = nn.LayerNorm(20)
        self.second = nn.Linear(20, 12, bias=False)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(x + self.second(torch.relu(self.ln(self.first(x)))))


@dataclass(frozen=True)
class Case:
    """A model and inputs.  call(model) -> the output that the laws compare."""

    model: nn.Module
    inputs: dict

    def call(self, model: nn.Module) -> torch.Tensor:
        out = model(**self.inputs)
        return out if isinstance(out, torch.Tensor) else out.logits

    def loss(self, model: nn.Module) -> torch.Tensor:
        out = self.call(model)
        return (
            out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
        ).sum()


def _mlp():
    return MLP(), {"x": torch.randn(5, 12)}


def _tokens(vocabulary=50):
    return torch.randint(3, vocabulary, (2, 7))


def _bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    config = BertConfig(**sizes, max_position_embeddings=16, num_labels=3)
    return BertForSequenceClassification(config), {"input_ids": _tokens()}


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), {"input_ids": _tokens()}


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)), {"input_ids": _tokens()}


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=50, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"input_ids": _tokens(), "decoder_input_ids": _tokens()}


_MAKERS = {"mlp": _mlp, "bert": _bert, "gpt2": _gpt2, "llama": _llama, "t5": _t5}
FAMILIES = tuple(_MAKERS)


def make(family: str, dtype: torch.dtype = torch.float32) -> Case:
    """The family's tiny model in eval mode, its weights large enough that a wrong fold shows."""
    torch.manual_seed(0)
    model, inputs = _MAKERS[family]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return Case(model.to(dtype).eval(), inputs)


# -- adapted models ----------------------------------------------------------------------------------------------------

METHODS = pk.methods()

TIED_HEADS = ("gpt2", "t5")  # to the embedding


def targets_of(key, family):
    if family != "mlp" or key == "full":
        return None
    own = {"head": ("out",), "bitfit": ("first", "ln"), "layertype": ("first", "ln")}
    return own.get(key, ("first", "second"))


def attached(key, family, dtype=torch.float32, **kwargs):
    case = make(family, dtype)
    cfg = METHODS[key](**METHODS[key].tiny)
    pk.attach(case.model, cfg, targets_of(key, family), **kwargs)
    return case


def perturb(model, name="default"):
    """Every tuner number moves, so that no law holds only because the update is zero."""
    made = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, tuner in tuners(model, name):
            for p in tuner.parameters():
                p.add_(torch.randn(p.shape, generator=made, dtype=torch.float64).to(p) * 0.1)
    return model


def snapshot(model):
    return {name: p.detach().clone() for name, p in base_parameters(model)}


def assert_same(model, before):
    now = dict(base_parameters(model))
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


def close(out, truth, dtype=torch.float32):
    torch.testing.assert_close(out, truth, atol={torch.float32: 1e-5, torch.float64: 1e-11}[dtype], rtol=1e-5)
