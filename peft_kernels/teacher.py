"""The teacher of `peft-kernels tune --teacher`: a model that knows the task, from its files to the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import hf
from .batches import Batches, device_of
from .engine.distil import Distillation
from .engine.site import base_parameters
from .tasks import Task


class Teacher:
    """What `source` holds: a model for the task, or an adapter of one as tune and pk.save write it.

    ValueError if it is no such model, or one of other classes.
    """

    def __init__(self, source: str, task: Task):
        self.source, self.task = source, task
        with self._named():
            self.model, self.tokenizer = hf.load_trained(task.kind, source)
            task.check_teacher(self.model)
        self.figures: dict[str, float] = {}

    def join(self, model: nn.Module, tokenizer: Any) -> None:
        """Goes to the device of the model that it will teach, whose weights it takes for its own where they are equal.

        Nothing ever writes into them but a merge, which is undone. ValueError if the tokens are others.
        """
        if self.tokenizer is not None and self.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"--teacher {self.source}: its tokens are not those of the model; both need one vocabulary"
            )
        self.model.to(device_of(model))
        own = dict(base_parameters(model))
        for name, p in base_parameters(self.model):
            if name in own and p.dtype == own[name].dtype and torch.equal(p, own[name]):
                p.data = own[name].data

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"--teacher {self.source}: {error}") from None

    def distillation(self, temperature: float | None, weight: float | None) -> Distillation:
        """None: the default."""
        given = {"temperature": temperature, "weight": weight}
        return Distillation(self.model, **{name: value for name, value in given.items() if value is not None})

    @torch.no_grad()
    def try_out(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        """ValueError if the two predict different things."""
        with self._named():
            Distillation(self.model).term(model.eval(), batch, model(**batch))

    def look(self, test: Batches) -> None:
        """Takes its own figures."""
        self.figures = self.task.evaluate(self.model, test)[0]

    def facts(self, settings: Distillation | None = None) -> dict[str, Any]:
        """For the summary."""
        own = {} if settings is None else {"temperature": settings.temperature, "weight": settings.weight}
        return {"source": self.source, **own, "test": self.figures}
