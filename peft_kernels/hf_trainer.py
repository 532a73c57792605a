"""pk.hf.Callback: transformers' Trainer drives what methods ask of a training, and saves adapters alone."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from .engine.attach import all_adapters, is_attached, state_of
from .engine.checkpoint import below, set_weights, weights
from .engine.distil import Distillation
from .engine.life import (
    advance,
    all_tuners,
    has_penalty,
    method_terms,
    penalty,
    prepared,
    scheduled,
    timeline,
    trained,
    unmerged,
)
from .engine.store import replacing, save

_WEIGHTS = "model.safetensors"


class Callback(TrainerCallback):
    """Lets transformers' Trainer train an adapted model: Trainer(model=model, ..., callbacks=[pk.hf.Callback()]).

    Checkpoints hold the adapter as `pk.save` writes it, and the same tensors under their names in the model's state
    dict in model.safetensors, from which Trainer resumes and loads the best model; the base is not copied. The same
    goes for trainer.save_model(), and for model.save_pretrained() as long as an adapter is attached and not merged.
    Tuner.step, Tuner.penalty and Method.loss work as in `pk.fit`, the latter two added to the model's own loss, and so
    does a teacher, Callback(teacher=pk.Distillation(model)); learning rates are those of Trainer's arguments.
    ValueError if the model is no transformers model or has no adapter. RuntimeError, when training begins, for methods
    of several phases or learning rates, which need `pk.fit`, and for terms of the loss in several processes.
    """

    _hook: Any = None
    _inside = False

    def __init__(self, teacher: Distillation | None = None):
        if teacher is not None and not isinstance(teacher, Distillation):
            raise ValueError(f"teacher is a {type(teacher).__name__}; expected pk.Distillation(teacher)")
        self.teacher = teacher if teacher is not None and teacher.weight else None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"pk.hf.Callback got a {type(model).__name__}; expected a transformers model, or use pk.fit"
            )
        state_of(model)
        _plant(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _plant(model)  # with model_init, every training has a new one
        unmerged(model, "training")
        names = trained(model)
        prepared(model, names)
        entries = timeline(model, names, state.max_steps)
        if several := [entry.phase.name for entry in entries if entry.phase.steps != state.max_steps]:
            raise RuntimeError(
                f"the method has phases ({', '.join(several)}), each with an optimizer of its own; train it with pk.fit"
            )
        if any(tuner.rates for name in names for tuner in all_tuners(model, name)):
            raise RuntimeError("the method has learning rates of its own for some of its numbers; train it with pk.fit")
        self._scheduled = scheduled(model, names)
        self._terms, self._penalised = method_terms(model), has_penalty(model)
        if self.teacher is not None:
            self.teacher.check(model)
        adding = self._terms or self._penalised or self.teacher
        if adding and args.world_size > 1:
            raise RuntimeError("terms of the loss are added in one process only; train with one, or with pk.fit")
        before, loaded = _trainable(model), {}
        if state.global_step:  # a resume: Trainer has loaded its checkpoint by now
            loaded = {key: t.clone() for key, t in weights(model, names).items()}
        for entry in entries:
            entry.enter(model)
        if loaded:
            advance(self._scheduled, state.global_step / state.max_steps)
            set_weights(model, names, loaded, None)
        if _trainable(model) != before:
            raise RuntimeError("a phase changes what is trained after Trainer has made its optimizer; use pk.fit")
        if adding:
            self._remove_hook()  # of a training that an exception ended
            self._hook = model.register_forward_hook(self._add_terms, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """How many batches this optimizer step takes: the last one of an epoch may have fewer."""
        self._batches = args.gradient_accumulation_steps
        try:
            batches = len(train_dataloader)
        except TypeError:  # a stream
            return
        steps, left = -(-batches // self._batches), batches % self._batches
        if left and state.global_step % steps == steps - 1:
            self._batches = left

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        advance(self._scheduled, state.global_step / state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add_terms(self, model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """A forward hook: what a teacher, Method.loss and penalties add to outputs.loss, in training's first passes."""
        if self._inside or not model.training or not torch.is_grad_enabled():
            return None
        if getattr(outputs, "loss", None) is None:
            raise RuntimeError(
                "the model returned no loss to add a term to (label smoothing? compute_loss_func?); use pk.fit"
            )
        batch = dict(kwargs)
        # With a count of items, losses of an optimizer step are summed; without one, Trainer takes their mean.
        share = 1 if batch.pop("num_items_in_batch", None) is None else 1 / self._batches
        self._inside = True
        try:
            if self.teacher is not None:
                taught = self.teacher.term(model, batch, outputs)
                outputs["loss"] = self.teacher.mixed(outputs["loss"], share * taught)
            term = self._terms and self._terms(model, batch, outputs)
        finally:
            self._inside = False
        if term is not None:
            outputs["loss"] = outputs["loss"] + share * term
        if self._penalised:
            outputs["loss"] = outputs["loss"] + share * penalty(model)
        return outputs


def _trainable(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}


# -- what Trainer asks of the model: to save itself and to load a state dict -------------------------------------------


def _plant(model: nn.Module) -> None:
    for method in (save_pretrained, load_state_dict):
        setattr(model, method.__name__, types.MethodType(method, model))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Key in the model's state dict -> tensor of a tuner; tensors tied to each other come once."""
    out: dict[int, tuple[str, Tensor]] = {}
    for path, adapters in all_adapters(model):
        for key, t in adapters.state_dict(prefix=f"{path}.peft.".lstrip("."), keep_vars=True).items():
            out.setdefault(id(t), (key, t.detach()))
    return dict(out.values())


def save_pretrained(self: Any, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
    """The class's own, except that of an adapted model the adapters are saved, and what else training has moved."""
    if not is_attached(self) or state_of(self).merged:
        type(self).save_pretrained(self, save_directory, is_main_process=is_main_process, **kwargs)
    elif is_main_process:
        save(self, save_directory, force=True)
        moved = _tensors(self) | below(weights(self, []), "buffer/")
        with replacing(Path(save_directory), _WEIGHTS) as temporary:
            contiguous = {key: t.contiguous() for key, t in moved.items()}
            save_file(contiguous, temporary / _WEIGHTS, metadata={"format": "pt"})


def load_state_dict(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
    """The class's own, except that the base is not reported as missing from a file that save_pretrained wrote."""
    result = type(self).load_state_dict(self, state_dict, strict=strict, assign=assign)
    own = _tensors(self)
    if not strict and own.keys() & state_dict.keys():
        result.missing_keys[:] = [key for key in own if key not in state_dict]
    return result
