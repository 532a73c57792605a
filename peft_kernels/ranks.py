"""ranks: how high a rank the change of a weight has for how many numbers, method by method, by measurement."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from .engine.attach import active, attach, tuners
from .engine.calibrate import calibrate
from .engine.counts import counts
from .engine.life import timeline
from .engine.method import Method, Tuner, methods, needed
from .engine.site import Site
from .engine.text import columns
from .methods.lora import LoRA
from .methods.svd import SVD, SVDTuner

_STEPS, _ROWS = 10, 4  # a training that long, on so many rows
_ZERO = 1e-10  # a singular value below this part of the largest


def ranks(size: int = 768) -> list[dict[str, Any]]:
    """Rows dict(method, settings, numbers, rank, bound, rank_per_number, why), for one linear layer of size x size.

    Every registered method with its defaults, on a weight of random numbers and with random numbers of its own after
    its phases; LoRA with a rank of 1 as well, and SVD with a rank of size // 4, because random weights have no energies
    to keep. numbers: what it trains in its last phase.   rank: of the change, of its singular values in fp64; of SVD,
    which replaces the weight, of what it puts there.   bound: the upper bound of it that `pk.counts` states.
    why: "" or, where these are None, what is missing.
    """
    if size < 8:
        raise ValueError(f"size = {size}; expected at least 8")
    rows = []
    for key, cls in methods().items():
        for settings in ({"rank": size // 4},) if cls is SVD else ({"rank": 1}, {}) if cls is LoRA else ({},):
            rows.append({"method": key, "settings": settings, **_measured(cls, settings, size)})
    return rows


class _Layer(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _measured(cls: type[Method], settings: dict[str, Any], size: int) -> dict[str, Any]:
    if lacks := needed(cls):
        return _without(f"needs {', '.join(lacks)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Layer(size)
        try:
            attach(model, cls(**settings), "layer")
        except ValueError as error:
            return _without(f"not on one layer: {error}")
        ((_, tuner),) = tuners(model, "default")
        if not tuner.mergeable:
            return _without("no weight-space form")
        batch = torch.randn(_ROWS, size), torch.randn(_ROWS, size)
        calibrate(model, [batch], mse_loss, progress=False)
        _randomize(tuner)
        for entry in timeline(model, active(model), _STEPS):
            entry.enter(model)
            _randomize(tuner)
        own = counts(model)
        tuner.double()
        weight = Site("layer", model.layer).weight.detach().double()
        with torch.no_grad():
            new, _ = tuner.fold(weight, None)
    rank = int(torch.linalg.matrix_rank(new if isinstance(tuner, SVDTuner) else new - weight, rtol=_ZERO))
    if not rank:
        return _without("the weight stays as it is")
    share = rank / own.trainable
    return {"numbers": own.trainable, "rank": rank, "bound": own.rank, "rank_per_number": share, "why": ""}


def _without(why: str) -> dict[str, Any]:
    return {**dict.fromkeys(("numbers", "rank", "bound", "rank_per_number")), "why": why}


@torch.no_grad()
def _randomize(tuner: Tuner) -> None:
    for p in tuner.parameters():
        p.copy_(torch.randn(p.shape))


def table(found: list[dict[str, Any]]) -> str:
    """A line for each method."""
    rows = [("method", "numbers", "rank", "rank per number", "")]
    for r in found:
        fields = ", ".join(f"{name}={value}" for name, value in r["settings"].items())
        numbers, share = (f"{r['numbers']:,}", f"{r['rank_per_number']:.2g}") if r["numbers"] else ("-", "-")
        rows.append((f"{r['method']} {fields}".strip(), numbers, str(r["rank"] or "-"), share, r["why"]))
    return columns(rows)
