"""Adapters in the files of Hugging Face PEFT: a form for each kind of them.

adapter_config.json          the fields of its configuration, of which peft_type says which kind it is
adapter_model.safetensors    the tensors; beside those of the method, modules that are trained whole
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..engine.attach import state_of
from ..engine.store import CONFIG, attach_filled, place_of, read_json, read_weights, write
from ._peft_form import Form
from ._peft_ia3 import IA3Files
from ._peft_lokr import LoKrFiles
from ._peft_lora import LoRAFiles
from ._peft_prefix import PrefixFiles
from ._peft_prompts import PromptFiles, PTuningFiles

_FORMS = (LoKrFiles, LoRAFiles, IA3Files, PromptFiles, PTuningFiles, PrefixFiles)
FORMS: dict[str, Form] = {form.kind: form() for form in _FORMS}


def load(
    model: nn.Module, directory: str | os.PathLike, name: str | None = None, *, trainable: bool = False
) -> nn.Module:
    """Attaches an adapter saved by Hugging Face PEFT, named "default" unless `name` says otherwise.

    Read are LORA (with DoRA, rsLoRA and patterns), LOKR, IA3, PREFIX_TUNING, PROMPT_TUNING and P_TUNING; the last two
    as PromptTuning, since PEFT keeps the rows alone. Outputs are those of PEFT's model, which returns the rows of a
    prompt as well.
    directory: of adapter_config.json and adapter_model.safetensors, or the one above it, in a directory called `name`.
    What PEFT trained whole (modules_to_save) is attached too. Files and errors are treated as by `pk.load`; ValueError
    also for other kinds of PEFT, and for what a configuration asks and the method here has not.
    """
    directory = place_of(Path(directory), name)
    config, digest = read_json(directory / CONFIG)
    if "peft_type" not in config:
        raise ValueError(f"{directory / CONFIG} was not written by Hugging Face PEFT; pk.load reads what pk.save wrote")
    kind = str(getattr(config["peft_type"], "value", config["peft_type"]))
    if kind not in FORMS:
        raise ValueError(f"{directory} is {kind} of PEFT; expected one of {', '.join(FORMS)}")
    adapter, values = FORMS[kind].read(model, config, read_weights(directory, digest), str(directory))
    return attach_filled(model, "default" if name is None else name, adapter, values, directory, trainable)


def save(model: nn.Module, directory: str | os.PathLike, name: str | None = None, *, force: bool = False) -> Path:
    """Writes an adapter as Hugging Face PEFT does, for its PeftModel.from_pretrained, and returns the directory.

    Arguments and errors are those of `pk.save`; ValueError also for what these files cannot hold: other methods than
    those of `pk.hf.load`, several of them in an adapter, layers that PEFT's does not know. LoRA and (IA)^3 of some rows
    of a fused linear are written as what they are of the whole layer.
    """
    return write(model, directory, name, force, lambda n: _theirs(model, n))


def _theirs(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors under PEFT's keys, what its adapter_config.json says) of an adapter of ours."""
    methods = [part.method for part, _ in state_of(model).adapters[name].expanded()]
    form = next((form for form in FORMS.values() for method in methods if form.takes(method)), None)
    if form is None:
        titles = ", ".join(known.title for known in FORMS.values())
        raise ValueError(f"{name!r} has {methods[0].key}; PEFT's files take {titles}")
    return form.write(model, name)
