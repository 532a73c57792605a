"""Prompts in the files of saved adapters, and how similar they are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..engine.store import read_config, read_weights

ROWS = "rows"  # the tensor of a prompt, [length, width]
HOWS = ("average", "per-token")


def saved_prompt(directory: str | os.PathLike) -> Tensor:
    """The prompt [length, width] of a saved adapter, on the CPU; FileNotFoundError, ValueError if it holds none."""
    place = Path(directory).expanduser()
    _, digest = read_config(place)
    values = read_weights(place, digest)
    found = [
        t for key, t in values.items() if key.rpartition(".")[2] == ROWS and t.is_floating_point() and t.dim() == 2
    ]
    if len(found) != 1:
        raise ValueError(
            f"{place} holds {len(found) or 'no'} prompts; expected an adapter with one, of a method such as prompt, or "
            "of ptuning after pk.eject"
        )
    return found[0]


def similar_prompts(
    prompt: str | os.PathLike, candidates: Iterable[str | os.PathLike], how: str = "average"
) -> list[tuple[str | os.PathLike, float]]:
    """(directory, similarity in [-1, 1]) of the candidates, the most similar to the prompt first.

    prompt, candidates: directories of saved adapters of one base model, whose prompts may have different lengths.
    how: "average", the cosine of the mean rows, or "per-token", the mean cosine over all pairs of rows.
    Reads safetensors and JSON only. FileNotFoundError; ValueError for an adapter without a prompt or another width.
    Vu et al. 2022, arXiv:2110.07904, section 4.
    """
    if how not in HOWS:
        raise ValueError(f"how = {how!r}; expected {' or '.join(map(repr, HOWS))}")
    own = saved_prompt(prompt)
    found = []
    for directory in candidates:
        other = saved_prompt(directory)
        if other.shape[1] != own.shape[1]:
            raise ValueError(
                f"{directory} has a prompt of {other.shape[1]} features and {prompt} one of {own.shape[1]}; expected "
                "prompts of one base model"
            )
        found.append((directory, _cosine(own, other, how)))
    return sorted(found, key=lambda pair: -pair[1])


def _cosine(a: Tensor, b: Tensor, how: str) -> float:
    if how == "average":
        return F.cosine_similarity(a.double().mean(0), b.double().mean(0), dim=0).item()
    return (F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T).mean().item()
