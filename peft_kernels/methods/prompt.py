"""Prompt tuning: learned rows in front of the embeddings of the tokens. Lester et al. 2021, arXiv:2104.08691."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..engine.site import Site
from ._prompt import Prompt, PromptTuner


@dataclass(frozen=True)
class PromptTuning(
    Prompt, roles=("backbone",), lr=0.1, tiny={"length": 3}, family="additive", key="prompt", kinds=None
):
    """Learned rows in front of the tokens' embeddings. Lester et al. 2021, arXiv:2104.08691."""

    length: int = 20  # rows


class PromptTuningTuner(PromptTuner, method=PromptTuning):
    def __init__(self, cfg: PromptTuning, site: Site):
        super().__init__(cfg, site)
        self.rows = site.param(self.length, self.width, init=lambda t, g: t.uniform_(-0.5, 0.5, generator=g))

    def prompt(self) -> Tensor:
        return self.rows
