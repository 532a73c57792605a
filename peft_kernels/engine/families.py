"""Where the roles of a method live in each model family.

A pattern is matched against the end of a module's path; `#` stands for a number. `path[q]` is one block of output rows
of a fused linear, `entry>exit` the span between two linears where a family has no module of its own for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Layout = Callable[[Any], tuple[int, dict[str, int]]]


@dataclass(frozen=True)
class Family:
    """The modules of a model family.

    roles: role -> patterns.   norms: sublayer (attn, ffn, cross.attn) -> patterns of its LayerNorm; the first that
    exists counts.   prenorm: True: the LayerNorm's input is the residual and its output enters the sublayer; False: it
    comes after the addition; None: neither. A function where it depends on the config.
    fused: config -> (groups, {part: units}), one for each kind of fused linear. Its output rows are that many equal
    groups, inside which the parts follow each other in these proportions.
    """

    roles: dict[str, tuple[str, ...]]
    norms: dict[str, tuple[str, ...]]
    prenorm: bool | Callable[[Any], bool | None]
    fused: tuple[Layout, ...] = ()


def _attention(names: str, path: str, cross: str = "") -> dict[str, tuple[str, ...]]:
    """The roles of attention modules: q k v o by these names inside `path` and, if there is any, in cross-attention."""
    inside = dict(zip("qkvo", (f".{name}" for name in names.split()), strict=True)) | {"attn": ""}
    if not cross:
        return {role: (path + name,) for role, name in inside.items()}
    both = {role: (path + name, cross + name) for role, name in inside.items()}
    return both | {f"cross.{role}": (cross + name,) for role, name in inside.items()}


_HEAD = ("lm_head", "score", "classifier", "classification_head", "qa_outputs")
_QKV = "query_key_value[q] query_key_value[k] query_key_value[v] dense"
_T5_FFN = "block.#.layer.#.DenseReluDense"


def _falcon_qkv(config: Any) -> tuple[int, dict[str, int]]:
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    if config.new_decoder_architecture:
        return kv_heads, {"q": heads // kv_heads, "k": 1, "v": 1}
    return (1, {"q": heads, "k": 1, "v": 1}) if config.multi_query else (heads, {"q": 1, "k": 1, "v": 1})


_OPT = Family(
    roles={
        **_attention("q_proj k_proj v_proj out_proj", "layers.#.self_attn"),
        "up": ("layers.#.fc1",),
        "down": ("layers.#.fc2",),
        "ffn": ("layers.#.fc1>layers.#.fc2",),
        "norm": ("self_attn_layer_norm", "final_layer_norm"),
        "embed": ("embed_tokens",),
        "block": ("layers.#",),
        "head": _HEAD,
    },
    norms={"attn": ("layers.#.self_attn_layer_norm",), "ffn": ("layers.#.final_layer_norm",)},
    prenorm=lambda config: config.do_layer_norm_before,
)
_BART = Family(
    roles={
        **_OPT.roles,
        **_attention("q_proj k_proj v_proj out_proj", "layers.#.self_attn", cross="layers.#.encoder_attn"),
        "norm": (*_OPT.roles["norm"], "encoder_attn_layer_norm", "layer_norm", "layernorm_embedding"),
    },
    norms={**_OPT.norms, "cross.attn": ("layers.#.encoder_attn_layer_norm",)},
    prenorm=False,
)

_LLAMA = Family(
    roles={
        **_attention("q_proj k_proj v_proj o_proj", "layers.#.self_attn"),
        "up": ("layers.#.mlp.up_proj",),
        "gate": ("layers.#.mlp.gate_proj",),
        "down": ("layers.#.mlp.down_proj",),
        "ffn": ("layers.#.mlp",),
        "norm": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "q_norm",
            "k_norm",
            "norm",
        ),
        "embed": ("embed_tokens",),
        "block": ("layers.#",),
        "head": _HEAD,
    },
    norms={
        "attn": ("layers.#.input_layernorm",),
        "ffn": ("layers.#.pre_feedforward_layernorm", "layers.#.post_attention_layernorm"),
    },
    prenorm=True,
)

# Keyed by transformers' config.model_type; those in one row have the same module names.
_ROWS: dict[tuple[str, ...], Family] = {
    ("bert", "roberta", "xlm-roberta", "camembert", "electra"): Family(
        roles={
            **_attention(
                "self.query self.key self.value output.dense", "layer.#.attention", cross="layer.#.crossattention"
            ),
            "up": ("layer.#.intermediate.dense",),
            "down": ("layer.#.output.dense",),
            "ffn": ("layer.#.intermediate.dense>layer.#.output.dense",),
            "norm": ("LayerNorm",),
            "embed": ("embeddings.word_embeddings",),
            "block": ("encoder.layer.#",),
            "head": (
                *_HEAD,
                "cls",
                "discriminator_predictions",
                "generator_predictions",
                "generator_lm_head",
                "sequence_summary",
            ),
        },
        norms={
            "attn": ("layer.#.attention.output.LayerNorm",),
            "cross.attn": ("layer.#.crossattention.output.LayerNorm",),
            "ffn": ("layer.#.output.LayerNorm",),
        },
        prenorm=False,
    ),
    ("distilbert",): Family(
        roles={
            **_attention("q_lin k_lin v_lin out_lin", "layer.#.attention"),
            "up": ("layer.#.ffn.lin1",),
            "down": ("layer.#.ffn.lin2",),
            "ffn": ("layer.#.ffn",),
            "norm": ("LayerNorm", "sa_layer_norm", "output_layer_norm"),
            "embed": ("embeddings.word_embeddings",),
            "block": ("layer.#",),
            "head": (*_HEAD, "pre_classifier", "vocab_transform", "vocab_layer_norm", "vocab_projector"),
        },
        norms={"attn": ("layer.#.sa_layer_norm",), "ffn": ("layer.#.output_layer_norm",)},
        prenorm=False,
    ),
    ("gpt2",): Family(
        roles={
            **_attention("c_attn[q] c_attn[k] c_attn[v] c_proj", "h.#.attn"),
            "up": ("h.#.mlp.c_fc",),
            "down": ("h.#.mlp.c_proj",),
            "ffn": ("h.#.mlp",),
            "norm": ("h.#.ln_1", "h.#.ln_2", "ln_f"),
            "embed": ("wte",),
            "block": ("h.#",),
            "head": (*_HEAD, "multiple_choice_head"),
        },
        norms={"attn": ("h.#.ln_1",), "ffn": ("h.#.ln_2",)},
        prenorm=True,
        fused=(lambda config: (1, {"q": 1, "k": 1, "v": 1}),),
    ),
    ("gpt_neox",): Family(
        roles={
            **_attention(_QKV, "layers.#.attention"),
            "up": ("layers.#.mlp.dense_h_to_4h",),
            "down": ("layers.#.mlp.dense_4h_to_h",),
            "ffn": ("layers.#.mlp",),
            "norm": ("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
            "embed": ("embed_in",),
            "block": ("layers.#",),
            "head": _HEAD,
        },
        norms={"attn": ("layers.#.input_layernorm",), "ffn": ("layers.#.post_attention_layernorm",)},
        prenorm=True,
        fused=(lambda config: (config.num_attention_heads, {"q": 1, "k": 1, "v": 1}),),
    ),
    ("bloom",): Family(
        roles={
            **_attention(_QKV, "h.#.self_attention"),
            "up": ("h.#.mlp.dense_h_to_4h",),
            "down": ("h.#.mlp.dense_4h_to_h",),
            "ffn": ("h.#.mlp",),
            "norm": ("input_layernorm", "post_attention_layernorm", "word_embeddings_layernorm", "ln_f"),
            "embed": ("word_embeddings",),
            "block": ("h.#",),
            "head": _HEAD,
        },
        norms={"attn": ("h.#.input_layernorm",), "ffn": ("h.#.post_attention_layernorm",)},
        # Otherwise the residual is the LayerNorm's output.
        prenorm=lambda config: None if config.apply_residual_connection_post_layernorm else True,
        fused=(lambda config: (config.n_head, {"q": 1, "k": 1, "v": 1}),),
    ),
    ("falcon",): Family(
        roles={
            **_attention(_QKV, "h.#.self_attention"),
            "up": ("h.#.mlp.dense_h_to_4h",),
            "down": ("h.#.mlp.dense_4h_to_h",),
            "ffn": ("h.#.mlp",),
            "norm": ("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp", "ln_f"),
            "embed": ("word_embeddings",),
            "block": ("h.#",),
            "head": _HEAD,
        },
        norms={
            "attn": ("h.#.ln_attn", "h.#.input_layernorm"),
            "ffn": ("h.#.ln_mlp", "h.#.post_attention_layernorm", "h.#.input_layernorm"),
        },
        prenorm=True,
        fused=(_falcon_qkv,),
    ),
    ("opt",): _OPT,
    ("bart", "plbart", "blenderbot-small", "marian"): _BART,
    ("mbart", "pegasus", "blenderbot", "m2m_100"): replace(_BART, prenorm=True),
    ("whisper",): replace(_BART, roles={**_BART.roles, "head": (*_HEAD, "proj_out", "projector")}, prenorm=True),
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"): _LLAMA,
    ("phi3",): replace(
        _LLAMA,
        roles={
            **_LLAMA.roles,
            **_attention("qkv_proj[q] qkv_proj[k] qkv_proj[v] o_proj", "layers.#.self_attn"),
            "up": ("layers.#.mlp.gate_up_proj[up]",),
            "gate": ("layers.#.mlp.gate_up_proj[gate]",),
        },
        fused=(
            lambda config: (
                1,
                {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads},
            ),
            lambda config: (1, {"gate": 1, "up": 1}),
        ),
    ),
    ("phi",): Family(
        roles={
            **_attention("q_proj k_proj v_proj dense", "layers.#.self_attn"),
            "up": ("layers.#.mlp.fc1",),
            "down": ("layers.#.mlp.fc2",),
            "ffn": ("layers.#.mlp",),
            "norm": ("input_layernorm", "q_layernorm", "k_layernorm", "final_layernorm"),
            "embed": ("embed_tokens",),
            "block": ("layers.#",),
            "head": _HEAD,
        },
        norms={"attn": ("layers.#.input_layernorm",), "ffn": ("layers.#.input_layernorm",)},
        prenorm=True,
    ),
    ("t5", "mt5", "umt5"): Family(
        roles={
            **_attention("q k v o", "block.#.layer.0.SelfAttention", cross="block.#.layer.1.EncDecAttention"),
            "up": (f"{_T5_FFN}.wi", f"{_T5_FFN}.wi_1"),
            "gate": (f"{_T5_FFN}.wi_0",),
            "down": (f"{_T5_FFN}.wo",),
            "ffn": (_T5_FFN,),
            "norm": ("layer_norm", "final_layer_norm"),
            "embed": ("embed_tokens",),  # `shared` holds their weight and is never called
            "block": ("block.#",),
            "head": _HEAD,
        },
        norms={
            "attn": ("block.#.layer.0.layer_norm",),
            "cross.attn": ("block.#.layer.1.layer_norm",),
            "ffn": ("block.#.layer.#.layer_norm",),
        },
        prenorm=True,
    ),
    ("vit", "deit"): Family(
        roles={
            **_attention("q_proj k_proj v_proj o_proj", "layers.#.attention"),
            "up": ("layers.#.mlp.fc1",),
            "down": ("layers.#.mlp.fc2",),
            "ffn": ("layers.#.mlp",),
            "norm": ("layernorm_before", "layernorm_after", "layernorm"),
            "embed": ("patch_embeddings.projection",),
            "block": ("layers.#",),
            "head": (*_HEAD, "cls_classifier", "distillation_classifier", "decoder"),
        },
        norms={"attn": ("layers.#.layernorm_before",), "ffn": ("layers.#.layernorm_after",)},
        prenorm=True,
    ),
}
FAMILIES: dict[str, Family] = {kind: row for kinds, row in _ROWS.items() for kind in kinds}
