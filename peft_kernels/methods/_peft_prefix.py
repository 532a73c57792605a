"""Prefixes in the files of Hugging Face PEFT: the keys and values that a network made, if there was one, without it.

prompt_embeddings [length, layers * 2 * width], of each layer its keys and then its values; heads as beside prompts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..engine.attach import Adapter, chosen_sites
from ..engine.method import Part
from ..engine.roles import roles_of
from ..engine.site import Site
from ._peft_form import common
from ._peft_prompts import ROWS, PromptFiles, described
from .prefix import PrefixTuner, PrefixTuning


class PrefixFiles(PromptFiles):
    kind, title, keys = "PREFIX_TUNING", "prefix tuning", ("prefix",)

    def read(self, model, config, given, where):
        length, rows = config.get("num_virtual_tokens"), given.pop(ROWS, None)
        sites = attentions(model, where)
        if rows is None or rows.dim() != 2 or len(rows) != length or rows.shape[1] % (2 * len(sites)):
            shape = None if rows is None else tuple(rows.shape)
            expected = f"[{length}, {len(sites)} layers * 2 * width]"
            raise ValueError(f"{where} has {ROWS} {shape}; expected {expected}; was it another model?")
        method = PrefixTuning(length=length, hidden=0, shift=True)
        heads, values = self.heads(model, config, given, where)
        pairs = rows.view(length, len(sites), 2, -1).permute(1, 2, 0, 3)  # [layers, 2, l, width]
        for site, place in zip(sites, _places(model, len(sites)), strict=True):
            values |= {f"{site.name}.k": pairs[place, 0], f"{site.name}.v": pairs[place, 1]}
        return Adapter([Part(method, tuple(site.address for site in sites)), *heads], 0), values

    def write(self, model, name):
        members, whole = self.parts(model, name)
        own = {site.name: tuner for site, _, tuner in members if isinstance(tuner, PrefixTuner)}
        sites = attentions(model, repr(name))
        lengths = {tuner.length for tuner in own.values()}
        if own.keys() != {site.name for site in sites} or len(lengths) != 1:
            raise ValueError(
                f"{name!r} has not one prefix at every self-attention, of the decoder if there is one, and nowhere "
                f"else, as PEFT's files have; such as targets {' '.join(site.address for site in sites[:2])} ..."
            )
        if any(isinstance(tuner.cfg, PrefixTuning) and not tuner.cfg.shift for tuner in own.values()):
            raise ValueError(f"{name!r} has shift=False; in PEFT the positions of the text begin behind the prefix")
        with torch.no_grad():
            found = [torch.stack(own[site.name].prefix(), 1) for site in sites]  # [l, 2, width]
        pairs = [torch.zeros_like(pair) for pair in found]
        for place, pair in zip(_places(model, len(sites)), found, strict=True):
            if pairs[place].any() and not torch.equal(pairs[place], pair):
                raise ValueError(f"{name!r}: PEFT gives two layers of such a decoder one prefix, and these differ")
            pairs[place] = pair
        task, values, fields = described(model, name, whole)
        config: Any = model.config
        kv = getattr(config, "num_key_value_heads", None) or fields["num_attention_heads"]
        return {ROWS: torch.stack(pairs, 1).flatten(1), **values}, {
            **common(model, self.kind, task),
            **fields,
            "num_virtual_tokens": lengths.pop(),
            "token_dim": pairs[0].shape[-1],
            "num_layers": len(sites),
            "num_attention_heads": kv,
            "num_transformer_submodules": 2 if task == "SEQ_2_SEQ_LM" else 1,
            "prefix_projection": False,
        }


def _places(model: nn.Module, layers: int) -> list[int]:
    """Where each layer's pair is: PEFT takes every second for a cross-attention's and drops it."""
    step = 2 if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else 1
    return [step * layer % layers for layer in range(layers)]


def attentions(model: nn.Module, where: str) -> list[Site]:
    """The self-attentions that PEFT gives a prefix, in the order of their layers: of a decoder, if there is one."""
    if hasattr(getattr(model, "config", None), "relative_attention_num_buckets"):
        raise ValueError(
            f"{where}: a prefix of PEFT has a place among the relative positions of a {type(model).__name__}, and one "
            "of PrefixTuning has none; the two cannot be the same"
        )
    part = Part(PrefixTuning(), PrefixTuning.roles)
    sites = [site for _, _, site in chosen_sites(model, Adapter([part], 0))]
    across = [s for s in sites if "cross.attn" in roles_of(getattr(model, "config", None), s.name)]
    layers = {site.name.rpartition(".")[0] for site in across}
    return [s for s in sites if s not in across and (not layers or s.name.rpartition(".")[0] in layers)]
