"""The k largest of many tensors together, without joining or sorting them: global masks of sparse fine-tuning.

    threshold = the k-th largest score    n_above = how many are larger    the chosen: these, and the first ties

Ties are chosen in the order of the tensors and, within one, of its flat indices: k in all, the same on every backend.
Scores order as numbers, -0 like 0, or by magnitude. Guo et al. 2021, arXiv:2012.07463; Sung et al.
2021, arXiv:2111.09839.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._op import Cost, Op, Sample


def _joined(scores: Sequence[Tensor], use_abs: bool) -> Tensor:
    flat = torch.cat([s.flatten() for s in scores])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return flat.abs() if use_abs else flat


def _threshold_reference(k, use_abs, *scores):
    flat = _joined(scores, use_abs)
    threshold = flat.topk(max(k, 1)).values[-1] + 0.0 if len(flat) else flat.new_zeros(())  # -0 + 0 is 0
    return threshold, (flat > threshold).sum(), flat.isnan().sum()


def _compact_reference(threshold, k, use_abs, *scores):
    flat = _joined(scores, use_abs)
    above, tied = flat > threshold, flat == threshold
    chosen = above | (tied & (tied.cumsum(0) <= k - above.sum()))
    count = chosen.sum()
    position = torch.arange(k, device=flat.device)
    return torch.where(position < count, torch.argsort((~chosen).byte(), stable=True)[:k], -1), count


# id: shapes, k, use_abs
_SHAPES = {
    "two": (((3, 5), (17,)), 7, True),
    "one": (((1,),), 1, False),
    "none": (((4, 4), (3,)), 0, True),
    "all": (((5, 3), (0,), (7,)), 22, False),
    "odd": (((0, 4), (33, 7), (1,), (129,)), 50, True),
    "signed": (((9, 31), (40,)), 100, False),
    "ties": (((13, 11), (64,), (21,)), 75, True),
    "signed_ties": (((13, 11), (64,), (21,)), 160, False),
    "zeros": (((6, 5), (40,)), 33, False),
    "empty": (((0,), (0, 3)), 0, False),
    "long": (((70, 1000), (3001,)), 365, True),
    "transposed": (((12, 18), (18,)), 40, True),
}


def _threshold_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, (shapes, k, use_abs) in _SHAPES.items():
        made = torch.Generator().manual_seed(k)
        scores = [torch.randn(s, generator=made, dtype=torch.float64) for s in shapes]
        if name.endswith("ties"):
            scores = [s.mul(2).round() / 2 * (1 if s.dim() == 1 else -1) for s in scores]  # with -0 among them
        if name == "zeros":
            scores = [torch.zeros_like(s).copysign(s) for s in scores]
        if name == "odd":
            scores[1][3, :3] = torch.tensor([math.inf, -math.inf, 1e-300])
        scores = [s.to(device, dtype) for s in scores]
        if name == "transposed":
            scores[0] = scores[0].T
        yield Sample(name, (k, use_abs, *scores))


def _compact_samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
    for name, (k, use_abs, *scores), _ in _threshold_samples(dtype, device):
        threshold = _threshold_reference(k, use_abs, *scores)[0]
        yield Sample(name, (threshold, k, use_abs, *scores))
        if name == "signed":  # of other scores: fewer than k are found, or more
            yield Sample("high", (threshold + 1, k, use_abs, *scores))
            yield Sample("low", (threshold - 1, k, use_abs, *scores))


def _read(scores: Sequence[Tensor]) -> int:
    return sum(s.numel() * s.element_size() for s in scores)


_threshold = Op(
    "topk_threshold",
    "(int k, bool use_abs, Tensor[] scores) -> (Tensor, Tensor, Tensor)",  # threshold, n_above and the number of NaN
    family="sparse",
    reference=_threshold_reference,
    samples=_threshold_samples,
    cost=lambda k, use_abs, *scores: Cost(0, _read(scores) + 20),
)

_compact = Op(
    "topk_compact",
    "(Tensor threshold, int k, bool use_abs, Tensor[] scores) -> (Tensor, Tensor)",  # positions [k] and their number
    family="sparse",
    reference=_compact_reference,
    samples=_compact_samples,
    cost=lambda threshold, k, use_abs, *scores: Cost(0, _read(scores) + 8 * k),
)


def _checked(op: str, scores: Sequence[Tensor], k: int) -> list[Tensor]:
    total = sum(s.numel() for s in scores)
    if not scores or not 0 <= k <= total:
        raise ValueError(f"{op}: k is {k} of {len(scores)} tensors with {total} scores; expected 0 to {total} of one")
    for i, s in enumerate(scores):
        if not s.is_floating_point() or s.device != scores[0].device:
            raise ValueError(f"{op}: scores[{i}] is {s.dtype} on {s.device}; expected floats on {scores[0].device}")
    return [s.detach() for s in scores]


def topk_threshold(scores: Sequence[Tensor], k: int, *, use_abs: bool = False) -> tuple[Tensor, Tensor]:
    """(threshold, n_above): the k-th largest of all scores, and how many are larger, for `topk_compact`.

    scores: tensors of any shape, fp32, bf16, fp16 or fp64   threshold 0-d fp32 (fp64 of fp64)   n_above 0-d int64
    use_abs: by magnitude, else signed. k = 0 gives the largest score, no scores 0. Waits for the device.
    Raises ValueError on a NaN, and on k beyond the number of scores.
    """
    threshold, n_above, n_nan = _threshold(k, use_abs, *_checked("topk_threshold", scores, k))
    if n_nan:
        raise ValueError(f"topk_threshold: {int(n_nan)} scores are NaN; expected numbers, look for where they arise")
    return threshold, n_above


def topk_compact(scores: Sequence[Tensor], threshold: Tensor, k: int, *, use_abs: bool = False) -> list[Tensor]:
    """For each tensor the flat int64 indices of its scores among the k largest of all, ascending; k in all.

    scores, k, use_abs: as in `topk_threshold`, which gives the threshold. Waits for the device.
    Raises ValueError if the threshold is not that of these scores and this k.
    """
    scores = _checked("topk_compact", scores, k)
    if threshold.dim() or threshold.device != scores[0].device:
        raise ValueError(
            f"topk_compact: threshold is {tuple(threshold.shape)} on {threshold.device}; expected 0-d on "
            f"{scores[0].device}, from topk_threshold"
        )
    wide = functools.reduce(torch.promote_types, (s.dtype for s in scores), torch.float32)
    positions, count = _compact(threshold.detach().to(wide), k, use_abs, *scores)
    if count != k:
        raise ValueError(f"topk_compact: the threshold chooses {int(count)} scores, not k = {k}; give topk_threshold's")
    ends = list(itertools.accumulate(s.numel() for s in scores))
    cuts = torch.searchsorted(positions, torch.tensor(ends, device=positions.device)).tolist()
    starts = zip([0, *cuts], cuts, [0, *ends], strict=False)
    return [positions[begin:end] - first for begin, end, first in starts]
