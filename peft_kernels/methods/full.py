"""Full fine-tuning of the model or of its head, each as a separate copy beside the frozen original."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.method import Method, Replica


@dataclass(frozen=True)
class FullTuning(Method, roles=("model",), lr=2e-4, tiny={}, key="full", kinds=None, family="selective"):
    """Every number of the model is trained: the yardstick of all other methods."""


@dataclass(frozen=True)
class Head(Method, roles=("head",), lr=5e-3, tiny={}, kinds=None, family="selective"):
    """Only the task head is trained: a linear probe when the head is linear."""


class FullTuner(Replica, method=FullTuning):
    """The whole model's trainable copy."""


class HeadTuner(Replica, method=Head):
    """The head's trainable copy."""
