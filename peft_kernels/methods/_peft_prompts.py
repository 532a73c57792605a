"""Prompts in the files of Hugging Face PEFT: the rows that an encoder made, if there was one, without it.

prompt_embeddings [length, width]    base_model.<path>.<parameter> of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine.attach import Adapter, chosen_sites, state_of, tuners
from ..engine.method import Method, Part, Replica, Tuner
from ..engine.site import Site, base_modules, base_values
from ..engine.store import tensors
from ._peft_form import Form, common, kept
from ._prompt import PromptTuner
from .prompt import PromptTuning

PREFIX, ROWS = "base_model.", "prompt_embeddings"
# task_type -> the end of the name of transformers' class for it, and the modules that PEFT then takes for a head.
_TASKS: dict[str, tuple[str | tuple[str, ...], tuple[str, ...]]] = {
    "SEQ_CLS": ("ForSequenceClassification", ("classifier", "score")),
    "TOKEN_CLS": ("ForTokenClassification", ("classifier", "score")),
    "QUESTION_ANS": ("ForQuestionAnswering", ("qa_outputs",)),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration", ()),
    "CAUSAL_LM": (("ForCausalLM", "LMHeadModel"), ()),
}


class PromptFiles(Form):
    """Prompts of which P alone is kept."""

    kind, title = "PROMPT_TUNING", "prompt tuning"
    keys: ClassVar[tuple[str, ...]] = ("prompt", "ipt", "spot")  # of methods with P in front, whatever the text

    def takes(self, method):
        return method.key in self.keys

    def read(self, model, config, given, where):
        length, rows = config.get("num_virtual_tokens"), given.pop(ROWS, None)
        if rows is None or rows.dim() != 2 or not isinstance(length, int) or not 0 < length <= len(rows):
            shape = None if rows is None else tuple(rows.shape)
            raise ValueError(f"{where} has {ROWS} {shape} and num_virtual_tokens = {length}; expected [length, width]")
        if config.get("task_type") == "SEQ_CLS":
            _pooled(model, where)
        part = Part(PromptTuning(length=length), PromptTuning.roles)
        site = next(s for _, m, s in chosen_sites(model, Adapter([part], 0)) if m is part.method)
        heads, values = self.heads(model, config, given, where)
        # PEFT makes as many rows again for a decoder, which never sees them.
        return Adapter([part, *heads], 0), {**values, f"{site.name}.rows".lstrip("."): rows[:length]}

    def heads(
        self, model: nn.Module, config: Mapping[str, Any], given: dict[str, Tensor], where: str
    ) -> tuple[list[Part], dict[str, Tensor]]:
        """Of modules trained whole, and those that PEFT takes for heads: a part, if any, and its tensors."""
        names = [*(config.get("modules_to_save") or ()), *_TASKS.get(str(config.get("task_type")), ("", ()))[1]]
        return self.whole(model, given, PREFIX, names, where)

    def write(self, model, name):
        found, whole = self.parts(model, name)
        prompts = [tuner for _, method, tuner in found if isinstance(tuner, PromptTuner) and self.takes(method)]
        if len(prompts) != 1 or "inputs_embeds" not in prompts[0].names:
            raise ValueError(f"{name!r} is not one prompt of texts, which is what PEFT's files take")
        with torch.no_grad():
            rows = prompts[0].prompt()
        task, values, fields = described(model, name, whole)
        if task == "SEQ_CLS":
            _pooled(model, repr(name))
        return {ROWS: rows, **values}, {
            **common(model, self.kind, task),
            "num_virtual_tokens": len(rows),
            "token_dim": rows.shape[1],
            **fields,
        }

    def parts(self, model: nn.Module, name: str) -> tuple[list[tuple[Site, Method, Tuner]], list[str]]:
        """([(site, method, tuner)] but for modules trained whole, the paths of those); ValueError for other methods."""
        made, found, whole = dict(tuners(model, name)), [], []
        for level, method, site in chosen_sites(model, adapter := state_of(model).adapters[name]):
            tuner = made[site.name]
            if isinstance(tuner, Replica) and site.name:
                whole.append(site.name)
            elif not self.takes(asked := adapter.expanded()[level][0].method):
                raise ValueError(f"{name!r} has {asked.key} at {site}; these files of PEFT take {self.title} alone")
            else:
                found.append((site, method, tuner))
        return found, whole


class PTuningFiles(PromptFiles):
    kind, title, keys = "P_TUNING", "P-tuning", ("ptuning",)


def described(model: nn.Module, name: str, whole: list[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(task_type, the tensors of heads under PEFT's keys, fields of the configuration)."""
    cls, config = type(model).__name__, getattr(model, "config", None)
    task = next((task for task, (ends, _) in _TASKS.items() if cls.endswith(ends)), "FEATURE_EXTRACTION")
    values = kept(tensors(model, name), whole, PREFIX)
    for path, module in base_modules(model):  # of these PEFT makes copies, and finds no file without them
        if path.endswith(_TASKS.get(task, ("", ()))[1] or ("\0",)) and path not in whole:
            values |= {f"{PREFIX}{path}.{key}": t.detach() for key, t in base_values(module).items()}
    return (
        task,
        values,
        {
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "num_transformer_submodules": 1,
            "modules_to_save": whole or None,
        },
    )


def _pooled(model: nn.Module, where: str) -> None:
    """ValueError where a head reads the first row, which is the prompt's for PEFT and the text's here."""
    causal = [m.is_causal for _, m in base_modules(model) if hasattr(m, "is_causal")]
    if not any(causal):
        raise ValueError(
            f"{where}: a prompt under a {type(model).__name__}, whose head in PEFT reads the first row of P, and "
            "here the first token; use the model without its head, or PrefixTuning"
        )
