"""save and load: adapter_model.safetensors and adapter_config.json, written whole or not at all, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .._version import __version__
from .attach import Adapter, attach_parts, detach, names_of, state_of, tuners
from .method import Part, Tuner
from .parts import part_of

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_FORMAT = "peft_kernels"
# What fine-tuning gives the config of a transformers model and the base model's files do not have.
_OF_THE_TASK = ("id2label", "label2id", "problem_type", "pad_token_id")


def tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What the adapter file holds: <site path>.<tensor> -> tensor; tensors tied to each other come once."""
    out: dict[str, Tensor] = {}
    for path, tuner in tuners(model, name):
        kept = {id(p) for p in tuner.parameters()}
        seen: set[int] = set()
        for key, value in tuner.state_dict(keep_vars=True).items():
            if id(value) in seen and id(value) in kept:
                continue
            seen.add(id(value))
            out[f"{path}.{key}" if path else key] = value.detach()
    return out


def save(model: nn.Module, directory: str | os.PathLike, name: str | None = None, *, force: bool = False) -> Path:
    """Writes one adapter (None: all) and returns the directory.

    "default" goes to the directory itself, any other name to a subdirectory of that name. An adapter that exists is
    overwritten only with force=True (FileExistsError). Refuses a directory that holds a model's config.json
    (ValueError), because transformers would take the adapter for part of that model. A bank is left out.
    """
    return write(model, directory, name, force, lambda n: (tensors(model, n), _config(model, n)))


def write(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str | None,
    force: bool,
    contents: Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]],
) -> Path:
    """`save`, where contents(adapter's name) -> (tensors, configuration) of its files."""
    directory = Path(directory)
    refuse_model(directory)
    bank = state_of(model).bank
    names = [n for n in names_of(model, name) if bank is None or n != bank.name]
    if not names:
        raise ValueError("a bank is not saved: its adapters have files of their own; name an attached adapter")
    places = {n: directory if n == "default" else directory / n for n in names}
    for place in places.values():
        if (place / CONFIG).exists() and not force:
            raise FileExistsError(f"{place} holds an adapter already; pass force=True to overwrite it")
    made = {place: contents(n) for n, place in places.items()}  # all, before any is written
    for place, (values, config) in made.items():
        _write(place, values, config)
    return directory


def refuse_model(directory: Path) -> None:
    if (directory / "config.json").exists():
        raise ValueError(f"{directory} holds a model (config.json); choose a directory of its own for the adapter")


def load(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str | None = None,
    *,
    trainable: bool = False,
    part: str | int | None = None,
) -> nn.Module:
    """Attaches a saved adapter, named as it was saved unless `name` says otherwise, and returns the model.

    Where several were saved, `directory` holds "default" and, in a subdirectory, the one called `name`.
    part: of a recipe's adapter this one part alone, by the key of its method or by its number. The parts of a recipe
        in a recipe are counted in its place, and the modules that were trained whole beside it are the last part.

    FileNotFoundError if the directory holds none; ValueError if the file is broken, of another format, or belongs to
    another model. The model is untouched then. Loading reads safetensors and JSON only.
    """
    directory = place_of(Path(directory), name)
    config, digest = read_config(directory)
    adapter, saved_name = from_config(config, str(directory / CONFIG))
    values = read_weights(directory, digest)
    if part is not None:
        try:
            adapter, values = part_of(model, adapter, values, part)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
    return attach_filled(model, saved_name if name is None else name, adapter, values, directory, trainable)


def attach_filled(
    model: nn.Module, name: str, adapter: Adapter, values: dict[str, Tensor], directory: Path, trainable: bool
) -> nn.Module:
    """Attaches an adapter with these tensors, all or nothing; ValueError names the directory they are from."""
    attach_parts(model, name, adapter, filled=True)
    try:
        fill(model, name, values, directory)
    except ValueError:
        detach(model, name)
        raise
    if not trainable:
        for _, tuner in tuners(model, name):
            tuner.requires_grad_(False)
    return model


def place_of(directory: Path, name: str | None) -> Path:
    """Where the adapter called `name` is: a subdirectory if several were saved in `directory`."""
    return directory / name if name is not None and (directory / name / CONFIG).exists() else directory


def from_config(config: Mapping[str, Any], where: str) -> tuple[Adapter, str]:
    """(what was attached, its name) as `save` wrote it; ValueError names `where` if it is not complete."""
    try:
        parts = [Part.from_json(part) for part in config["parts"] or [{}]]  # none is as wrong as one without a method
        return Adapter(parts, config["seed"]), config["name"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is not a complete adapter configuration ({error!r})") from None


def fill(model: nn.Module, name: str, values: dict[str, Tensor], directory: Path | None) -> None:
    """Copies `values` into the adapter's tensors; ValueError, and nothing copied, unless they fit exactly."""
    for path, tuner in tuners(model, name):
        for inside, module in tuner.named_modules():
            if isinstance(module, Tuner) and type(module).reshape is not Tuner.reshape:
                place = "".join(f"{part}." for part in (path, inside) if part)
                own = {key.removeprefix(place): t for key, t in values.items() if key.startswith(place)}
                try:
                    module.reshape(own)
                except ValueError as error:
                    raise ValueError(f"{directory}: {place.rstrip('.')}: {error}") from None
    own = tensors(model, name)
    for word, keys in (("lacks", own.keys() - values.keys()), ("has unknown", values.keys() - own.keys())):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise ValueError(
                f"{directory} does not fit this model: it {word} {len(keys)} tensors ({some}); was it another model?"
            )
    for key, value in values.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{directory} does not fit this model: {key} is {tuple(value.shape)}, expected {tuple(own[key].shape)}"
            )
    for key, value in values.items():
        own[key].copy_(value)


def _config(model: nn.Module, name: str) -> dict[str, Any]:
    adapter, own = state_of(model).adapters[name], getattr(model, "config", None)
    kind = getattr(own, "model_type", None)
    task = {key: value for key in _OF_THE_TASK if (value := getattr(own, key, None)) is not None}
    return {
        "format": _FORMAT,
        "version": __version__,
        "name": name,
        "model": {
            "class": type(model).__name__,
            "type": kind,
            "source": str(getattr(own, "name_or_path", "")) or None,
            "config": task if kind else {},
        },
        **described(adapter),
    }


def described(adapter: Adapter) -> dict[str, Any]:
    """What was attached where, for JSON."""
    return {
        "seed": adapter.seed,
        "parts": [part.to_json() for part in adapter.parts],
    }


def _write(place: Path, values: dict[str, Tensor], config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=1) + "\n"
    contiguous = {key: t.contiguous() for key, t in values.items()}
    with replacing(place, WEIGHTS, CONFIG) as temporary:
        # The digest ties the two files together: one replaced without the other is noticed. Other formats have none.
        tie = {"config": _digest(text)} if config.get("format") == _FORMAT else {}
        save_file(contiguous, temporary / WEIGHTS, metadata={"format": "pt", **tie})
        (temporary / CONFIG).write_text(text)


@contextmanager
def replacing(place: Path, *files: str) -> Iterator[Path]:
    """A temporary directory whose `files`, synced, take their places in `place` at the end, one by one and in order.

    A reader never sees half a file, and if `place` is new never a part of them; after an error `place` is as it was.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    inside = place.exists()  # it may be a mount point, and a rename does not cross those
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place if inside else place.parent))
    try:
        yield temporary
        for file in files:
            _sync(temporary / file)
        temporary.chmod(0o755)
        if not inside:
            os.rename(temporary, place)
        else:
            for file in files:
                os.replace(temporary / file, place / file)
        _sync(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(config: str) -> str:
    return hashlib.sha256(config.encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_config(directory: Path) -> tuple[dict[str, Any], str]:
    """(what `save` wrote beside the weights, the digest that ties the two); FileNotFoundError, ValueError as `load`."""
    path = directory / CONFIG
    config, digest = read_json(path)
    if config.get("format") != _FORMAT:
        raise ValueError(
            f"{path} was written by {'Hugging Face PEFT' if 'peft_type' in config else 'another program'}, "
            "not by peft_kernels"
        )
    return config, digest


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """(the configuration of an adapter of any program, its digest); FileNotFoundError, ValueError as `load`."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no adapter ({CONFIG} is missing)")
    try:
        text = path.read_text()
        config = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    return config if isinstance(config, dict) else {}, _digest(text)


def read_weights(directory: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of an adapter on the CPU; ValueError if they were not saved with the configuration of this digest."""
    path = directory / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} holds no adapter weights ({WEIGHTS} is missing; pickled files are not read)"
        )
    values, metadata = read_safetensors(path)
    if metadata.get("config", digest) != digest:
        raise ValueError(f"{path} and {CONFIG} beside it were not saved together; save the adapter again")
    return values


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata) of a file; ValueError if it is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (SafetensorError, ValueError, torch.cuda.OutOfMemoryError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None
