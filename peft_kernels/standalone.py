"""merge as a job: a model and its adapter in, the directory of a model out that plain transformers loads."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hf
from .engine.attach import detach
from .engine.merge import MergeReport, merge
from .engine.store import WEIGHTS
from .files import output, size
from .quant import footprint
from .shrink import shrink

REPORT = "merge.json"
_INTO = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def standalone(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    source: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    packed: bool = False,
    small: bool = False,
) -> dict[str, Any]:
    """Writes `source` (None: the model that the adapter names) with the adapter merged, and returns the report.

    A quantised base comes out dense, in the values that it was trained on; packed: the merged weights are packed again.
    small: without the units that structured pruning has cut off, by `pk.shrink`.
    out: whole or absent; force replaces an earlier one.   dtype: of its weights; None: that of the source.
    What was written is loaded again with plain transformers and compared with model and adapter on random tokens.
    ValueError where the adapter does not fit or the weights of a new part of the model are not in it; RuntimeError
    where model and adapter have no form as weights of the same class.
    """
    with output(out, force, REPORT) as directory:
        model = hf.load_adapted(adapter, source, dtype)
        tokens = hf.random_tokens(model)
        adapted, kind, base = _logits(model, tokens), type(model).__name__, model.name_or_path
        smaller = shrink(model) if small else None
        into = _INTO[str(model.dtype)] if footprint(model).packed and not packed else None
        done = merge(model, into=into, stash=False)
        if done.created:
            raise RuntimeError(
                f"the adapter gives {kind} {len(done.created)} biases ({done.created[0]} ...) that its class has no "
                "place for, so no model directory can hold them; load the adapter with pk.load instead"
            )
        detach(model)
        model = model if smaller is None else smaller
        if dtype and not all(p.isfinite().all() for p in model.to(dtype).parameters()):
            raise RuntimeError(f"a weight of {base} is too large for {dtype}; choose another --dtype")
        hf.save_model(model, directory)
        stored = str(model.dtype).removeprefix("torch.")
        del model, smaller
        logits = _logits(hf.load_model(str(directory))[0], tokens)
        files = sorted(path.name for path in directory.iterdir())
        report = {
            "model": base,
            "adapter": str(adapter),
            "class": kind,
            "dtype": stored,
            "merge": asdict(done),
            "logits": _difference(logits, adapted),
            "bytes": {
                "adapter": (Path(adapter) / WEIGHTS).stat().st_size,
                "model": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
            },
            "files": [*files, REPORT],
        }
        (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


@torch.inference_mode()
def _logits(model: nn.Module, tokens: dict[str, Tensor] | None) -> Tensor | None:
    """The model's first output, in fp32: its logits, or its last hidden state where it has no head."""
    return None if tokens is None else model(**tokens)[0].float()


def _difference(logits: Tensor | None, adapted: Tensor | None) -> dict[str, float] | None:
    if logits is None or adapted is None:
        return None
    difference, largest = (logits - adapted).abs().max().item(), adapted.abs().max().item()
    if not difference < torch.inf:
        raise RuntimeError("the saved model computes numbers that are not finite; choose a wider --dtype")
    return {"difference": difference, "largest": largest}


def table(report: dict[str, Any]) -> str:
    """What the command prints."""
    sizes, logits = report["bytes"], report["logits"]
    compared = "not compared: the model reads more than text"
    if logits is not None:
        compared = f"largest difference {logits['difference']:.1e} from model and adapter, of {logits['largest']:.2g}"
    return "\n".join(
        [
            str(MergeReport(**report["merge"])),
            f"logits   {compared}",
            f"adapter  {size(sizes['adapter'])}",
            f"model    {size(sizes['model'])}, {report['class']} in {report['dtype']}",
        ]
    )
