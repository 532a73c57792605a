"""Tiny random models of each family, with inputs: what the laws of the engine run on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.batches import split
from peft_kernels.engine.life import timeline
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


_SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def _config(kind, **sizes):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**sizes)


def _classifier(kind, **changes):
    from transformers import AutoModelForSequenceClassification

    config = _config(kind, **{**_SIZES, "max_position_embeddings": 16, "num_labels": 3, **changes})
    return AutoModelForSequenceClassification.from_config(config), {"input_ids": _tokens()}


def _decoder(kind, **changes):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(_config(kind, **{**_SIZES, **_IDS, **changes})), {"input_ids": _tokens()}


def _gated(kind, **changes):
    """A decoder of Llama's kind, with grouped queries."""
    return _decoder(kind, **{"num_key_value_heads": 1, "head_dim": 8, **changes})


def _seq2seq(kind, **sizes):
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_config(_config(kind, vocab_size=50, decoder_start_token_id=0, **sizes))
    return model, {"input_ids": _tokens(), "decoder_input_ids": _tokens()}


def _t5(kind, **changes):
    return _seq2seq(kind, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, **changes)


_STACKS = dict(d_model=16, max_position_embeddings=16, **_IDS)
for _stack in ("encoder", "decoder"):
    _STACKS |= {f"{_stack}_layers": 2, f"{_stack}_attention_heads": 2, f"{_stack}_ffn_dim": 24}


def _bart(kind, **changes):
    return _seq2seq(kind, **_STACKS, **changes)


def _whisper(kind):
    from transformers import WhisperForConditionalGeneration

    sizes = dict(num_mel_bins=4, max_source_positions=5, max_target_positions=16, vocab_size=50)
    model = WhisperForConditionalGeneration(_config(kind, **_STACKS, **sizes, decoder_start_token_id=0))
    return model, {"input_features": torch.randn(2, 4, 10), "decoder_input_ids": _tokens()}


def _vit(kind, **changes):
    from transformers import AutoModelForImageClassification

    sizes = {k: v for k, v in _SIZES.items() if k != "vocab_size"}
    config = _config(kind, **sizes, image_size=8, patch_size=4, num_labels=3, **changes)
    return AutoModelForImageClassification.from_config(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


def _cross(kind):
    """An encoder with a decoder's cross-attention; its own layers and the encoder's states are the inputs."""
    model, inputs = _decoder(kind, max_position_embeddings=16, is_decoder=True, add_cross_attention=True)
    return model, {**inputs, "encoder_hidden_states": torch.randn(2, 5, 16)}


_FALCON = dict(num_attention_heads=4, ffn_hidden_size=24)

# By transformers' model type; after a space, another layout of the same type.
_MAKERS = {
    "mlp": _mlp,
    "bert": lambda: _classifier("bert"),
    "gpt2": lambda: _decoder("gpt2", n_positions=16),
    "llama": lambda: _gated("llama"),
    "t5": lambda: _t5("t5"),
    "roberta": lambda: _classifier("roberta", pad_token_id=0),
    "distilbert": lambda: _classifier("distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "gpt_neox": lambda: _decoder("gpt_neox"),
    "opt": lambda: _decoder("opt", ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=16),
    "mistral": lambda: _gated("mistral"),
    "qwen2": lambda: _gated("qwen2"),
    "gemma": lambda: _gated("gemma"),
    "phi": lambda: _gated("phi"),
    "phi3": lambda: _gated("phi3"),
    "falcon": lambda: _decoder("falcon", new_decoder_architecture=True, num_kv_heads=2, **_FALCON),
    "bloom": lambda: _decoder("bloom"),
    "bart": lambda: _bart("bart"),
    "vit": lambda: _vit("vit"),
    "whisper": lambda: _whisper("whisper"),
    # The quick laws of roles run on these too.
    "bert cross": lambda: _cross("bert"),
    "gpt_neox serial": lambda: _decoder("gpt_neox", use_parallel_residual=False),
    "opt postnorm": lambda: _decoder("opt", ffn_dim=24, do_layer_norm_before=False, max_position_embeddings=16),
    "falcon multi-query": lambda: _decoder("falcon", **_FALCON),
    "falcon serial": lambda: _decoder("falcon", multi_query=False, parallel_attn=False, **_FALCON),
    "t5 gated": lambda: _t5("t5", feed_forward_proj="gated-gelu"),
    **{kind: partial(_classifier, kind, pad_token_id=0) for kind in ("xlm-roberta", "camembert", "electra")},
    **{kind: partial(_gated, kind) for kind in ("qwen3", "gemma2", "gemma3_text")},
    **{kind: partial(_t5, kind) for kind in ("mt5", "umt5")},
    **{
        kind: partial(_bart, kind)
        for kind in ("plbart", "blenderbot-small", "marian", "mbart", "pegasus", "blenderbot", "m2m_100")
    },
    "deit": lambda: _vit("deit", architectures=["DeiTForImageClassification"]),
}
KINDS = tuple(kind for kind in _MAKERS if kind != "mlp")
EVERY = tuple(_MAKERS)[: tuple(_MAKERS).index("whisper") + 1]
FAMILIES = EVERY[:5]


def make(family: str, dtype: torch.dtype = torch.float32, key: str = "") -> Case:
    """The family's tiny model in eval mode, its weights large enough that a wrong fold shows.

    key: a method that attaching is to find nothing left to prepare for, as QLoRA a quantised base.
    """
    torch.manual_seed(0)
    model, inputs = _MAKERS[family]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    model.to(dtype).eval()
    if key:
        METHODS[key](**METHODS[key].tiny).prepare(model, ())
    return Case(model, inputs)


# -- adapted models ----------------------------------------------------------------------------------------------------

METHODS = pk.methods()

TIED_HEADS = ("gpt2", "t5", "opt", "gemma", "falcon", "bloom", "bart", "whisper")  # to the embedding

PROMPTS = {"infix", "ipt", "prompt", "ptuning", "spot", "warp"}  # rows in the sequence of embeddings
HYBRIDS = {"mam", "s4", "unipelt"}

# A gate depends on the input, and a nonlinearity (an adapter's own, or beside KronARes) leaves no weight.
UNMERGEABLE = {"compacter", "compacterpp", "gated", "krona_res", "lst"}
UNMERGEABLE |= {"adamix", "adapterdrop", "adapterl", "houlsby", "parallel", "pfeiffer", "prefix", "sparseadapter"}
UNMERGEABLE |= PROMPTS | HYBRIDS

# The plain MLP has no layers, and its residual is not known.
NO_MLP = {"adapterdrop", "bylayer", "lst", "pfeiffer", "prefix"} | PROMPTS | HYBRIDS

# Attention there does not go through transformers' AttentionInterface.
NO_SEAM = dict.fromkeys(("prefix", *HYBRIDS), ("falcon", "bloom"))
# A text there is read in both directions, or is none.
NO_SEAM["infix"] = ("bert", "roberta", "distilbert", "t5", "bart", "vit", "whisper")
# Nobody there was taught to fill in a [MASK].
NO_SEAM["warp"] = tuple(f for f in EVERY if f not in ("bert", "roberta", "distilbert"))


def mergeable(key, family):
    """Not where a weight is tied and not the head's alone, either."""
    return key not in UNMERGEABLE and not (key == "head" and family in TIED_HEADS)


def targets_of(key, family):
    if family == "whisper" and key in PROMPTS:  # its encoder takes no embeddings
        return ("*.decoder",)
    if family != "mlp" or key == "full":
        return None
    own = {"head": ("out",), "bitfit": ("first", "ln"), "layertype": ("first", "ln"), "krona_res": ("first>second",)}
    own["parallel"] = own["krona_res"]
    return own.get(key, ("first", "second"))


def fits(key, family):
    return not (family == "mlp" and key in NO_MLP or family in NO_SEAM.get(key, ()))


def over(families):
    """(method, family) for all methods that fit. Quick are the plain MLP and, in turns, two others of FAMILIES."""

    def marks(i, key, family):
        own = [f for f in FAMILIES[1:] if fits(key, f)]
        return () if family in ("mlp", own[i % len(own)], own[(i + 1) % len(own)]) else pytest.mark.slow

    fitting = [(i, k, f) for (i, k), f in itertools.product(enumerate(METHODS), families) if fits(k, f)]
    return [pytest.param(k, f, id=f"{k}-{f}", marks=marks(i, k, f)) for i, k, f in fitting]


def attached(key, family, dtype=torch.float32, **kwargs):
    case = make(family, dtype, key)
    cfg = METHODS[key](**METHODS[key].tiny)
    pk.attach(case.model, cfg, targets_of(key, family), **kwargs)
    return entered(calibrated(case))


def calibrated(case):
    """The case, whose tuners have seen the gradients that they want, row by row."""
    if "x" in case.inputs:
        batch, loss_fn = (case.inputs["x"], torch.arange(5) % 3), cross_entropy
    else:
        classifies = case.call(case.model).dim() == 2
        ids = case.inputs.get("decoder_input_ids", case.inputs.get("input_ids"))
        batch, loss_fn = {**case.inputs, "labels": torch.arange(2) if classifies else ids}, None
    pk.calibrate(case.model, list(split(batch)), loss_fn, progress=False)
    return case


def entered(case):
    """The case as at the first step of a training."""
    for entry in timeline(case.model, pk.active(case.model), 10):
        if not entry.start:
            entry.enter(case.model)
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
