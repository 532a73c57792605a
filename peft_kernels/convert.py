"""convert as a job: the directory of a transformers model in, one with quantised linear layers out, file by file."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import hf
from .files import output, size
from .quant import KINDS, footprint, plan, quantize, weight_of
from .shards import INDEX, SINGLE, shards, tensors

REPORT = "convert.json"
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    kind: str = "nf4",
    *,
    double_quant: bool = True,
    blocksize: int = 64,
    skip: tuple[str, ...] = ("head", "embed"),
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the model in `source` with its linear layers quantised, and returns the report.

    kind, double_quant, blocksize, skip: as of pk.quantize, which chooses the layers.   out: whole or absent; force
    replaces an earlier result.   progress: a bar over the bytes read.
    The result has the keys and the config of a model saved with bitsandbytes, so transformers reads it where that is
    installed, and peft-kernels everywhere. One file is in memory at a time, quantised, and one dense tensor.
    FileNotFoundError, FileExistsError; ValueError for a model that is quantised already, broken files, weights that
    are not finite, and where nothing is to be quantised.
    """
    from tqdm.auto import tqdm

    source = Path(source).expanduser()
    settings: dict[str, Any] = {"double_quant": double_quant, "blocksize": blocksize} if kind == "nf4" else {}
    with output(out, force, REPORT) as directory:
        model, files = hf.skeleton(source), shards(source)
        if getattr(model.config, "quantization_config", None) is not None or any(map(_packed, files.values())):
            raise ValueError(f"{source} is quantised already; convert the model that it was made from")
        chosen = {f"{path}.weight": module for path, module in plan(model, kind, blocksize=blocksize, skip=skip)}
        if not chosen:
            raise ValueError(f"nothing to quantise in {source}, a {type(model).__name__}, beside {' '.join(skip)}")
        if missing := chosen.keys() - {name for names in files.values() for name in names}:
            raise ValueError(f"{source} lacks {min(missing)}, a weight of its {type(model).__name__}")
        before = sum((source / file).stat().st_size for file in files)
        bar = tqdm(desc=kind, total=before, unit="B", unit_scale=True, delay=3, disable=not progress)
        index: dict[str, str] = {}
        error = _Error()
        for file in files:
            shard: dict[str, Tensor] = {}
            for name, tensor in tensors(source, file):
                if name in chosen:
                    shard |= _quantised(name, tensor, chosen[name], KINDS[kind], settings, error)
                else:
                    shard[name] = tensor
                bar.update(tensor.numel() * tensor.element_size())
            save_file(shard, directory / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
        bar.close()
        after = sum((directory / file).stat().st_size for file in files)
        if files.keys() != {SINGLE}:
            text = json.dumps({"metadata": {"total_size": after}, "weight_map": index}, indent=1)
            (directory / INDEX).write_text(text + "\n")
        _copy_the_rest(source, directory)
        config = json.loads((source / "config.json").read_text())
        quantize(model, kind, skip=skip, progress=False, **settings)  # of its shapes, for the config
        config["quantization_config"], dense = hf.quantization_config(model), footprint(model).dense
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        report = {
            "model": str(source),
            "class": type(model).__name__,
            "kind": kind,
            **settings,
            "layers": len(chosen),
            "dense": list(dense),
            "error": error.relative,
            "bytes": {"before": before, "after": after},
            "files": [*sorted(path.name for path in directory.iterdir()), REPORT],
        }
        (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


class _Error:
    """Of all weights so far: the norm of the change, relative to the norm of the weights."""

    def __init__(self) -> None:
        self.change, self.weight = 0.0, 0.0

    def add(self, change: Tensor, weight: Tensor) -> None:
        self.change += torch.linalg.vector_norm(change, dtype=torch.float64).item() ** 2
        self.weight += torch.linalg.vector_norm(weight, dtype=torch.float64).item() ** 2

    @property
    def relative(self) -> float:
        return math.sqrt(self.change / self.weight) if self.weight else 0.0


def _quantised(
    name: str, tensor: Tensor, module: nn.Module, cls: Any, settings: dict[str, Any], error: _Error
) -> dict[str, Tensor]:
    """What a file holds in place of the dense weight `name` of a layer without values."""
    expected = tuple(module.get_parameter("weight").shape)
    if tensor.shape != expected or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; the config makes it {expected}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} is not finite throughout; the model is broken, and no scale would hold it")
    linear = copy.copy(module)
    linear._parameters = {"weight": nn.Parameter(tensor, requires_grad=False), "bias": None}
    packed = cls.from_linear(linear, **settings)
    weight = weight_of(linear).float()
    error.add(packed.dense(torch.float32) - weight, weight)
    return {name.removesuffix("weight") + key: t for key, t in packed.state_dict().items()}


def _packed(names: list[str]) -> bool:
    return any(".quant_state." in name or name.endswith((".SCB", ".qweight", ".weight_scale")) for name in names)


def _copy_the_rest(source: Path, directory: Path) -> None:
    """Config, tokenizer and whatever else is no weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in _OTHER_WEIGHTS and path.name != INDEX:
            shutil.copyfile(path, directory / path.name)


def table(report: dict[str, Any]) -> str:
    """What the command prints."""
    before, after = report["bytes"]["before"], report["bytes"]["after"]
    kept = (
        f"; {len(report['dense'])} linear layers stay dense: {' '.join(report['dense'][:3])}" if report["dense"] else ""
    )
    return "\n".join(
        [
            f"{report['class']}: {report['layers']} layers in {report['kind']}{kept}",
            f"size   {size(before)} -> {size(after)}, {after / before:.1%}",
            f"error  {report['error']:.3g} of the weights' norm",
        ]
    )
