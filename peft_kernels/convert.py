"""convert as a job: the directory of a dense model in, the directory of a quantised one out, a layer at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import hf
from .files import output, size
from .quant import KINDS, footprint, plan

REPORT = "convert.json"
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", _INDEX)
_QUANTIZED = (".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".weight_scale")


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    kind: str = "nf4",
    *,
    double_quant: bool = True,
    blocksize: int = 64,
    skip: Iterable[str] = ("head", "embed"),
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the safetensors model directory `source` with its linear layers quantised as pk.quantize does; the report.

    out: whole or absent; force replaces an earlier one. It has the files of `source`, its tensors under the keys of
    bitsandbytes, and a config that says so to transformers. No more than one file of quantised weights and one dense
    layer are in memory. ValueError for a source that is broken, already quantised or has weights that are not finite.
    """
    from tqdm.auto import tqdm

    place = Path(source).expanduser()
    config, files = _config(place), _files(place)
    model = hf.skeleton(str(place))
    chosen = plan(model, kind, blocksize=blocksize, skip=skip)
    settings = {"double_quant": double_quant, "blocksize": blocksize} if kind == "nf4" else {}
    layers = _keys(model, chosen, {key for _, keys in files for key in keys})
    if not layers:
        raise ValueError(f"{place} has no layer to quantise: {footprint(model)}")
    sizes = {"dense": sum(file.stat().st_size for file, _ in files), "quantised": 0}
    with output(out, force, REPORT) as directory:
        with tqdm(total=len(layers), desc=kind, unit="layer", delay=1, disable=not progress, dynamic_ncols=True) as bar:
            index: dict[str, str] = {}
            for file, _ in files:
                tensors: dict[str, Tensor] = {}
                for key, value in _tensors(file):
                    if key in layers:
                        tensors |= _packed(f"{file}: {key}", key, value, layers[key], kind, settings)
                        bar.update()
                    else:
                        tensors[key] = value
                save_file(tensors, directory / file.name, metadata={"format": "pt"})
                index |= dict.fromkeys(tensors, file.name)
                sizes["quantised"] += (directory / file.name).stat().st_size
        if len(files) > 1:
            total = {"metadata": {"total_size": sizes["quantised"]}, "weight_map": index}
            (directory / _INDEX).write_text(json.dumps(total, indent=1) + "\n")
        for path in place.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
                shutil.copyfile(path, directory / path.name)
        dense = [path for path in footprint(model).dense if path not in dict(chosen)]
        config["quantization_config"] = _described(kind, double_quant, dense, config)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        report = {
            "source": str(place),
            "kind": kind,
            **settings,
            "layers": len(layers),
            "dense": dense,
            "bytes": sizes,
            "files": sorted([*(path.name for path in directory.iterdir()), REPORT]),
        }
        (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def table(report: dict[str, Any]) -> str:
    """What the command prints."""
    sizes, dense = report["bytes"], report["dense"]
    kept = f"; {len(dense)} linear layers stay dense ({', '.join(dense[:3])}{', ...' if len(dense) > 3 else ''})"
    return "\n".join(
        [
            f"{report['layers']} layers in {report['kind']}{kept if dense else ''}",
            f"source  {size(sizes['dense'])}",
            f"result  {size(sizes['quantised'])}, {sizes['quantised'] / sizes['dense']:.1%} of it",
        ]
    )


# -- the source -------------------------------------------------------------------------------------------------------


def _config(place: Path) -> dict[str, Any]:
    if not place.is_dir():
        raise FileNotFoundError(f"no directory {place}; expected a model with config.json and {_ONE}")
    if not (place / "config.json").is_file():
        raise ValueError(f"{place} holds no config.json; expected the directory of a transformers model")
    config = _json(place / "config.json")
    if how := config.get("quantization_config"):
        raise ValueError(f"{place} is quantised already ({how.get('quant_method')}); convert the dense model")
    return config


def _files(place: Path) -> list[tuple[Path, list[str]]]:
    """(file, keys in it) of the weights; what an index says is held against the files."""
    if (place / _ONE).is_file():
        found = [(place / _ONE, _header(place / _ONE))]
    elif (place / _INDEX).is_file():
        index = _json(place / _INDEX).get("weight_map", {})
        found = [(place / name, _header(place / name)) for name in sorted(set(index.values()))]
        if lost := sorted(set(index) - {key for _, keys in found for key in keys}):
            raise ValueError(f"{place / _INDEX} names {lost[0]}, which its file lacks; download the model again")
    else:
        raise FileNotFoundError(f"{place} holds neither {_ONE} nor {_INDEX}; pickled weights are not read")
    for file, keys in found:
        if marks := [key for key in keys if key.endswith(_QUANTIZED)]:
            raise ValueError(f"{file} is quantised already (it has {marks[0]}); convert the dense model")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no JSON object")
    return data


def _header(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; download the model again")
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error})") from None


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118  # it is no mapping
            yield key, opened.get_tensor(key)


# -- its layers -------------------------------------------------------------------------------------------------------


def _keys(model: nn.Module, chosen: list[tuple[str, nn.Module]], keys: set[str]) -> dict[str, nn.Module]:
    """Key of a weight in the files -> its layer; the files may be of the model without its head, or with one."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, nn.Module] = {}
    for path, module in chosen:
        key = f"{path}.weight"
        names = (key, key.removeprefix(prefix), prefix + key)
        found |= {name: module for name in dict.fromkeys(names) if name in keys}
    return found


def _packed(
    where: str, key: str, value: Tensor, layer: nn.Module, kind: str, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors of one quantised layer, by their keys."""
    expected = tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]
    if not value.is_floating_point() or tuple(value.shape) != expected:
        raise ValueError(f"{where} is {value.dtype} {tuple(value.shape)}; expected floating numbers {expected}")
    if not value.isfinite().all():
        raise ValueError(f"{where} has numbers that are not finite; the model is broken")
    dense = nn.Linear(1, 1, bias=False, device="meta")
    dense.weight = nn.Parameter(value if isinstance(layer, nn.Linear) else value.T, requires_grad=False)
    packed = KINDS[kind].from_linear(dense, **settings)  # type: ignore[attr-defined]
    path = key.removesuffix("weight")
    return {path + name: t.detach().contiguous() for name, t in packed.state_dict().items()}


def _described(kind: str, double_quant: bool, dense: list[str], config: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config by which transformers loads it with bitsandbytes."""
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind == "nf4",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 0.0,
        "llm_int8_skip_modules": dense,
    }
