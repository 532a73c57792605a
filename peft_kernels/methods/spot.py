"""SPoT: a prompt that begins as what the prompts of other tasks have become."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.site import Site
from ._saved import saved_prompt, similar_prompts
from .prompt import PromptTuning, PromptTuningTuner


@dataclass(frozen=True)
class SPoT(PromptTuning, roles=("backbone",), lr=0.03, tiny={"length": 3}, kinds=("module",), family="additive"):
    """A prompt that begins as those of other tasks. Vu et al. 2022, arXiv:2110.07904.

    The first rows are those of the prompt in `source`, the directory of a saved adapter: of a longer one as many as
    fit. What a shorter one lacks, and without a source the whole prompt, begins as with PromptTuning. Of several
    sources each row is the weighted mean over those that have it. With `nearest`, the directory of a prompt for the
    task itself, as a short training leaves it, the `top` sources most similar to that are taken, weighted by their
    similarity (`pk.similar_prompts`). Sources are read when it is attached: the saved adapter does not need them.
    """

    length: int = 100  # rows
    source: tuple[str, ...] = ()  # directories of saved adapters
    weights: tuple[float, ...] = ()  # one for each source; (): all the same
    nearest: str = ""  # the directory of an adapter for the task itself, which chooses among the sources
    top: int = 1  # how many sources it chooses

    def __post_init__(self):
        super().__post_init__()
        if self.weights and (len(self.weights) != len(self.source) or not all(w > 0 for w in self.weights)):
            raise ValueError(
                f"SPoT weights = {self.weights} for {len(self.source)} sources; expected a positive one for each"
            )
        if self.weights and self.nearest:
            raise ValueError("SPoT weights and nearest, which weighs the sources by their similarity; give one of them")
        if self.nearest and not self.source or self.top < 1:
            raise ValueError(
                f"SPoT nearest = {self.nearest!r}, top = {self.top} of {len(self.source)} sources; expected sources to "
                "choose from, and at least 1"
            )
        if self.source and self.subspace:
            raise ValueError(
                f"SPoT subspace = {self.subspace} begins at a drawn prompt, not at a source; give one of them"
            )

    def chosen(self) -> list[tuple[str, float]]:
        """(directory, weight) of the sources that the prompt begins with."""
        if not self.nearest:
            return list(zip(self.source, self.weights or [1.0] * len(self.source), strict=True))
        best = similar_prompts(self.nearest, self.source)[: self.top]
        positive = [(str(place), similarity) for place, similarity in best if similarity > 0]
        return positive if len(positive) > 1 else [(str(best[0][0]), 1.0)]


class SPoTTuner(PromptTuningTuner, method=SPoT):
    def __init__(self, cfg: SPoT, site: Site):
        super().__init__(cfg, site)
        if cfg.source and not site.filled:
            with torch.no_grad():
                begin(self.rows, cfg.chosen())


def begin(rows: Tensor, sources: list[tuple[str, float]]) -> None:
    """Fills the rows that any of the sources, (directory, weight), has with the weighted mean."""
    total, weight = torch.zeros_like(rows), rows.new_zeros(len(rows), 1)
    for place, w in sources:
        prompt = saved_prompt(place)[: len(rows)].to(rows)
        if prompt.shape[1] != rows.shape[1]:
            raise ValueError(
                f"SPoT source {place} has a prompt of {prompt.shape[1]} features, the model takes {rows.shape[1]}; "
                "expected one of this base model"
            )
        total[: len(prompt)] += w * prompt
        weight[: len(prompt)] += w
    rows.copy_(torch.where(weight > 0, total / weight, rows))
