"""The safetensors files of a model directory, as transformers lays them out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def shards(source: str | os.PathLike) -> dict[str, list[str]]:
    """File name -> names of its tensors, in the order of the index where there are several files.

    FileNotFoundError for a directory without such files or lacking one of them; ValueError for a broken one.
    """
    source = Path(source)
    if (source / SINGLE).is_file():
        return {SINGLE: _names(source / SINGLE)}
    if not (source / INDEX).is_file():
        raise FileNotFoundError(
            f"{source} holds neither {SINGLE} nor {INDEX}; expected a model saved with save_pretrained"
        )
    try:
        names = json.loads((source / INDEX).read_text())["weight_map"]
        files = dict.fromkeys(sorted(set(names.values())))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{source / INDEX} is not an index of safetensors files; download it again") from None
    found = {}
    for file in files:
        if Path(file).name != file or not (source / file).is_file():
            raise FileNotFoundError(f"{source} lacks {file}, which {INDEX} names; download it again")
        found[file] = _names(source / file)
    held = {name for names in found.values() for name in names}
    if missing := sorted(names.keys() - held):
        raise ValueError(f"{source}: no file holds {missing[0]}, which {INDEX} names; download the files again")
    return found


def tensors(source: str | os.PathLike, file: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file, read as they are asked for."""
    with _opened(Path(source) / file) as handle:
        for name in handle.keys():  # noqa: SIM118  a handle is no mapping
            yield name, handle.get_tensor(name)


def _names(path: Path) -> list[str]:
    with _opened(path) as handle:
        return list(handle.keys())


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or no safetensors file ({error}); download it again") from None
