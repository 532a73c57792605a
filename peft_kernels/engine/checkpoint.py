"""Checkpoints of fit: all that a training needs to go on bit-equal, in files that nothing ever unpickles.

DIRECTORY holds the adapter as `pk.save` writes it, training.safetensors and, to be read by people and tools,
training.json. A resume reads training.safetensors alone (the text of training.json is a tensor in it), so that one
atomic rename makes a checkpoint: whenever the process dies, the last one or the new one is whole.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .attach import base_buffers, state_of
from .store import CONFIG, fill, read_safetensors, refuse_model, replacing, save, tensors

TENSORS, RECORD = "training.safetensors", "training.json"


@dataclass(frozen=True)
class Comparable:
    """What a resume must have in common with what was written."""

    def check(self, written: dict[str, Any], directory: Path | None) -> None:
        for field, value in json.loads(json.dumps(dataclasses.asdict(self))).items():
            if written.get(field) != value:
                raise ValueError(
                    f"{directory} was written with {field}={written.get(field)!r}, this training has {value!r}; "
                    "resume with the same settings"
                )


@dataclass(frozen=True)
class Settings(Comparable):
    """What decides the numbers of a training."""

    epochs: int
    lr: float | None
    warmup: float
    weight_decay: float
    clip: float
    seed: int
    accumulate: int
    precision: str | None
    patience: int | None
    monitor: str
    batches: int  # per epoch
    method: dict[str, Any]  # by adapter
    teacher: dict[str, Any] | None = None
    steps: int | None = None
    seconds: float | None = None


@dataclass
class Position:
    """Where a training stands between two steps, which with the weights and the log is all that a resume needs."""

    step: int = 0  # optimizer steps taken
    epoch: int = 1  # under way
    batch: int = 0  # batches taken in it
    begun: bool = False  # its batches are being iterated: the random state is one of after iter(batches)
    entered: int = 0  # entries of the timeline
    best: float | None = None  # lowest value of the monitor
    waited: int = 0  # epochs since
    stopped: bool = False
    seconds: float = 0.0  # since the beginning
    spent: float = 0.0  # of them on steps
    pace: float = 0.0  # of a step, lately
    begins: int = 0  # the step before which the phase under way was entered


# -- files ------------------------------------------------------------------------------------------------------------


def write(directory: Path, model: nn.Module, names: list[str], record: dict[str, Any], values: dict[str, Tensor]):
    """Writes the record (for JSON), the tensors and the named adapters."""
    try:
        text = json.dumps(record, indent=1) + "\n"
    except TypeError as error:
        raise ValueError(f"the log cannot be saved ({error}); let on_epoch return numbers and text") from None
    contiguous = {key: t.contiguous() for key, t in values.items()}
    with replacing(directory, TENSORS, RECORD) as temporary:
        save_file({**contiguous, "record": _packed(text)}, temporary / TENSORS)
        (temporary / RECORD).write_text(text)
    for name in names:
        save(model, directory, name, force=True)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(record, tensors), or None where no training has left a checkpoint yet.

    FileExistsError if the directory holds an adapter that is not a checkpoint's; ValueError if it is a model's or if
    the file is broken.
    """
    refuse_model(directory)
    path = directory / TENSORS
    if not path.exists():
        if (directory / CONFIG).exists():
            raise FileExistsError(
                f"{directory} holds an adapter but no checkpoint; choose another checkpoint directory"
            )
        return None
    values, _ = read_safetensors(path)
    if "record" not in values:
        raise ValueError(f"{path} was not written by pk.fit; choose another checkpoint directory")
    return json.loads(_unpacked(values.pop("record"))), values


# -- weights ----------------------------------------------------------------------------------------------------------


def weights(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """What training moves: the named adapters, and buffers of the base that are not as they were (BatchNorm)."""
    before = state_of(model).buffers
    adapters = {f"adapter/{n}/{key}": t for n in names for key, t in tensors(model, n).items()}
    moved = {
        f"buffer/{path}": b
        for path, b in base_buffers(model)
        if path not in before or not torch.equal(b, before[path].to(b))
    }
    return adapters | moved


def set_weights(model: nn.Module, names: list[str], values: Mapping[str, Tensor], source: Path | None) -> None:
    """The inverse of weights; ValueError names `source` if the values do not fit."""
    for n in names:
        fill(model, n, below(values, f"adapter/{n}/"), source)
    before = state_of(model).buffers
    for path, b in base_buffers(model):
        b.copy_(values.get(f"buffer/{path}", before.get(path, b)))


def below(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The values whose keys start with `prefix`, without it."""
    return {key.removeprefix(prefix): t for key, t in values.items() if key.startswith(prefix)}


# -- optimizer state --------------------------------------------------------------------------------------------------


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """ "<number of the parameter>/<name>" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": t for i, own in state.items() for key, t in own.items()}


def set_moments(optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for path, t in values.items():
        i, key = path.split("/")
        state.setdefault(int(i), {})[key] = t
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# -- random numbers ---------------------------------------------------------------------------------------------------


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators of Python, torch and, where the model is on one, its GPU, as uint8 tensors."""
    states = {"python": _packed(json.dumps(random.getstate())), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    version, internal, gauss = json.loads(_unpacked(states["python"]))
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _packed(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _unpacked(t: Tensor) -> str:
    return t.numpy().tobytes().decode()


# -- interrupts -------------------------------------------------------------------------------------------------------


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is through, so that a checkpoint never holds half a step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)  # None: one that C installed
    if caught and callable(before):
        before(*caught[0])
