"""Distillation: what a teacher predicts, as a part of the loss of any training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attach import active, is_attached, names_of, set_active, tuners
from .batches import LossFn, answered, logits_of, mapped, task_loss
from .life import trained
from .losses import counted, distillation
from .store import tensors


class Distillation:
    """A teacher: pk.fit(model, batches, teacher=pk.Distillation(teacher)), with any method.

    The loss becomes weight T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - weight) task loss, the
    divergence a mean over the rows, or positions, that have a label. Hinton et al. 2015, arXiv:1503.02531.

    teacher: a model that takes the student's batches and has the same classes or vocabulary; it is called in eval mode
        without gradients, on its own device and in its own dtype, and belongs to no checkpoint of the student. Or the
        name of an adapter of the student's model that is not trained, which saves a second base.
    temperature: T, above 1 for more of the teacher's order among unlikely classes.
    weight: 1 is the teacher alone, and batches need no labels; 0 is training without it.
    ValueError for other values, and in training where the two models' logits differ in shape.
    """

    def __init__(self, teacher: nn.Module | str, temperature: float = 2.0, weight: float = 0.5):
        if not isinstance(teacher, (nn.Module, str)):
            raise ValueError(f"teacher is a {type(teacher).__name__}; expected a model or the name of an adapter")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature = {temperature!r}; expected a positive number")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight = {weight!r}; expected a number from 0 to 1")
        self.teacher, self.temperature, self.weight = teacher, temperature, weight

    def __repr__(self) -> str:
        who = repr(self.teacher) if isinstance(self.teacher, str) else type(self.teacher).__name__
        return f"Distillation({who}, temperature={self.temperature!r}, weight={self.weight!r})"

    def check(self, student: nn.Module) -> None:
        """ValueError if the teacher cannot teach this model."""
        if isinstance(self.teacher, str):
            names_of(student, self.teacher)
            if self.teacher in trained(student):
                raise ValueError(f"adapter {self.teacher!r} is to be trained, so it cannot teach; activate the others")
        elif self.teacher is student:
            raise ValueError("the teacher is the student; name another model, or an adapter of this one by its name")

    def described(self, student: nn.Module) -> dict[str, Any]:
        """What decides the numbers of a training, for JSON: a digest stands for the teacher's weights."""
        if isinstance(self.teacher, str):
            kind, values = f"adapter {self.teacher}", tensors(student, self.teacher)
        else:
            kind, values = type(self.teacher).__name__, _in_use(self.teacher)
        return {"teacher": kind, "weights": digest(values), "temperature": self.temperature, "weight": self.weight}

    def taught(self, student: nn.Module, batch: Any, loss_fn: LossFn | None) -> tuple[Tensor, Any]:
        """(the loss of training, the student's outputs), as task_loss without a teacher."""
        if self.weight == 1:
            outputs = answered(student, batch, loss_fn)
            return self.term(student, batch, outputs), outputs
        task, outputs = task_loss(student, batch, loss_fn)
        return self.mixed(task, self.term(student, batch, outputs)) if self.weight else task, outputs

    def mixed(self, task: Tensor, term: Tensor) -> Tensor:
        """The two parts of the loss by their weights; labels that do not count may make the first one NaN."""
        return term if self.weight == 1 else self.weight * term + (1 - self.weight) * task

    def term(self, student: nn.Module, batch: Any, outputs: Any) -> Tensor:
        """T^2 KL, before it is weighted."""
        logits = logits_of(outputs)
        if logits is None:
            raise ValueError(f"distillation needs logits, the student returned a {type(outputs).__name__} without any")
        wanted = self.logits(student, batch)
        if wanted.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits are {tuple(wanted.shape)}, the student's {tuple(logits.shape)}; "
                "expected the same classes or vocabulary in both"
            )
        if logits.shape[-1] < 2:
            raise ValueError("the logits have one class, over which every model agrees; distillation needs several")
        return distillation(logits, wanted.to(logits.device), self.temperature, counted(student, batch, logits))

    @torch.no_grad()
    def logits(self, student: nn.Module, batch: Any) -> Tensor:
        """What the teacher predicts for a batch, on its device and in its dtype."""
        with self._teaching(student) as teacher:
            p = next(p for p in (*teacher.parameters(), *student.parameters()) if p.is_floating_point())
            if isinstance(batch, Mapping):
                # An encoder-decoder makes the inputs of its decoder from the labels.
                kept = getattr(getattr(teacher, "config", None), "is_encoder_decoder", False)
                batch = {key: value for key, value in batch.items() if kept or key != "labels"}
            else:
                batch = batch[0]
            batch = mapped(batch, lambda t: t.to(p.device, p.dtype if t.is_floating_point() else t.dtype))
            with torch.autocast(p.device.type, enabled=False):  # that of the student
                outputs = teacher(**batch) if isinstance(batch, Mapping) else teacher(batch)
        if (logits := logits_of(outputs)) is None:
            raise ValueError(
                f"the teacher returned a {type(outputs).__name__} without logits; expected a model with a head"
            )
        return logits

    @contextmanager
    def _teaching(self, student: nn.Module) -> Iterator[nn.Module]:
        """The model that teaches, in eval mode; where that is the student's own, it is a student again at the end."""
        if not isinstance(self.teacher, str):
            yield self.teacher.eval()
            return
        before, training = active(student), student.training
        try:
            yield set_active(student, self.teacher).eval()
        finally:
            set_active(student, before).train(training)


def _in_use(model: nn.Module) -> dict[str, Any]:
    """The state dict without what an adapter trained whole takes the place of, such as a head never trained."""
    values = model.state_dict()
    for name in active(model) if is_attached(model) else ():
        for path, tuner in tuners(model, name):
            own = f"{path}." if path else ""
            if tuner.opaque:
                values = {k: t for k, t in values.items() if not k.startswith(own) or k.startswith(f"{own}peft.")}
    return values


def digest(values: Mapping[str, Any]) -> str:
    """Of tensors by name, with every bit in it; at the speed of memory, where the tensors are."""
    whole = hashlib.sha256()
    for key, t in values.items():
        if isinstance(t, Tensor):
            words = t.detach().contiguous().view(-1).view(_WORDS[t.element_size()])
            whole.update(json.dumps([key, str(t.dtype), [*t.shape], words.sum(dtype=torch.int64).item()]).encode())
    return whole.hexdigest()


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by bytes of an element
