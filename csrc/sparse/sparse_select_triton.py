"""The k largest scores of many tensors, in Triton: a histogram for each byte of the threshold, then a compaction.

Scores become unsigned integers of the same order. A pass counts the next byte of those whose upper bytes are already
the threshold's, from which one program takes the threshold's next byte: four passes find it, and how many are above.
The counts of a pass are integers, added with atomics: exact, and the same in any order.

The compaction counts, for each block, the scores above the threshold and those equal to it; sums of these over the
blocks before say where a block's indices go and how many of its ties are taken. Only integers are added there, too.
"""

import torch
import triton
import triton.language as tl

from ..common.triton_util import cast, interpreting

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_BLOCK = 1 << 14 if interpreting() else 4096  # the interpreter's time is that of its programs
_PROGRAMS = 1024  # that count one tensor, at most: more would only add more histograms


@triton.jit
def ordered(scores, ABSOLUTE: tl.constexpr):
    """(unsigned integers in the order of the scores, which are NaN); -0 is 0."""
    bits = scores.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = size if ABSOLUTE else tl.where((bits == size) | (size == 0), size | 0x80000000, bits ^ 0xFFFFFFFF)
    return key, size > 0x7F800000


@triton.jit(do_not_specialize=("shift",))
def sparse_topk_count_kernel(
    scores_ptr, histogram_ptr, state_ptr, n, shift, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """histogram [256] += the bytes at `shift` of the scores whose upper bytes are state[0]; state[2] += NaN, once."""
    counts = tl.zeros([256], tl.int32)
    nans = tl.zeros([BLOCK], tl.int32)
    prefix = tl.load(state_ptr)
    stride = tl.num_programs(0) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, stride):
        at = first + tl.arange(0, BLOCK)
        key, nan = ordered(cast(tl.load(scores_ptr + at, mask=at < n, other=0.0), tl.float32), ABSOLUTE)
        upper = key.to(tl.int64) >> shift
        nans += (nan & (at < n)).to(tl.int32)
        counts += tl.histogram((upper & 255).to(tl.int32), 256, (at < n) & (upper >> 8 == prefix))
    bins = tl.arange(0, 256)
    tl.atomic_add(histogram_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    found = tl.sum(nans).to(tl.int64)
    tl.atomic_add(state_ptr + 2, found, mask=(found > 0) & (shift == 24), sem="relaxed")


@triton.jit(do_not_specialize=("rank",))
def sparse_topk_byte_kernel(histogram_ptr, state_ptr, threshold_ptr, rank, ABSOLUTE: tl.constexpr):
    """The byte of the rank-th largest, appended to state[0], and how many are above it, added to state[1].

    state[0] as a score is the threshold, once all bytes are there.
    """
    bins = tl.arange(0, 256)
    counts = tl.load(histogram_ptr + bins)
    from_here = tl.sum(counts) - tl.cumsum(counts, 0) + counts  # in this byte and above
    above = tl.load(state_ptr + 1)
    byte = tl.max(tl.where(above + from_here >= rank, bins, 0)).to(tl.int64)
    prefix = tl.load(state_ptr) * 256 + byte
    tl.store(state_ptr, prefix)
    tl.store(state_ptr + 1, above + tl.sum(tl.where(bins > byte, counts, 0)))
    key = prefix.to(tl.uint32)
    if not ABSOLUTE:
        key = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    tl.store(threshold_ptr, key.to(tl.float32, bitcast=True))


def topk_threshold(k, use_abs, *scores):
    device, total = scores[0].device, sum(s.numel() for s in scores)
    threshold = torch.zeros((), dtype=torch.float32, device=device)
    state = torch.zeros(3, dtype=torch.int64, device=device)  # upper bytes, how many are above, NaN
    if total:
        scores = [s.contiguous() for s in scores if s.numel()]
        histograms = torch.zeros((4, 256), dtype=torch.int64, device=device)
        with torch.cuda.device_of(threshold):
            for histogram, shift in zip(histograms, (24, 16, 8, 0), strict=True):
                for s in scores:
                    sparse_topk_count_kernel[(min(triton.cdiv(s.numel(), _BLOCK), _PROGRAMS),)](
                        s, histogram, state, s.numel(), shift, ABSOLUTE=use_abs, BLOCK=_BLOCK, num_warps=4
                    )
                sparse_topk_byte_kernel[(1,)](histogram, state, threshold, max(k, 1), ABSOLUTE=use_abs, num_warps=4)
    return threshold, state[1].clone(), state[2].clone()


# -- compaction -------------------------------------------------------------------------------------------------------


@triton.jit
def above_and_tied(scores_ptr, at, n, threshold_ptr, ABSOLUTE: tl.constexpr):
    """(1 where a score is above the threshold, 1 where it is equal)"""
    scores = cast(tl.load(scores_ptr + at, mask=at < n, other=0.0), tl.float32)
    scores = tl.abs(scores) if ABSOLUTE else scores
    threshold = tl.load(threshold_ptr)
    return ((at < n) & (scores > threshold)).to(tl.int32), ((at < n) & (scores == threshold)).to(tl.int32)


@triton.jit
def sparse_topk_tally_kernel(
    scores_ptr, threshold_ptr, tally_ptr, n, blocks, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """tally [2, blocks]: how many of the block are above, and how many tied."""
    block = tl.program_id(0).to(tl.int64)
    above, tied = above_and_tied(scores_ptr, block * BLOCK + tl.arange(0, BLOCK), n, threshold_ptr, ABSOLUTE)
    tl.store(tally_ptr + block, tl.sum(above).to(tl.int64))
    tl.store(tally_ptr + blocks + block, tl.sum(tied).to(tl.int64))


@triton.jit(do_not_specialize=("first", "k"))
def sparse_topk_write_kernel(
    scores_ptr, threshold_ptr, taken_ptr, starts_ptr, positions_ptr, n, first, k,
    ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """positions[starts[block] ...] = first + the indices above, and of the first taken[block] tied ones."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    above, tied = above_and_tied(scores_ptr, at, n, threshold_ptr, ABSOLUTE)
    chosen = above | (tied & (tl.cumsum(tied, 0) <= tl.load(taken_ptr + block)).to(tl.int32))
    place = tl.load(starts_ptr + block) + tl.cumsum(chosen, 0) - 1
    tl.store(positions_ptr + place, first + at, mask=(chosen > 0) & (place < k))


def topk_compact(threshold, k, use_abs, *scores):
    device = scores[0].device
    scores = [s.contiguous() for s in scores if s.numel()]
    blocks = [triton.cdiv(s.numel(), _BLOCK) for s in scores]
    positions = torch.full((k,), -1, dtype=torch.int64, device=device)
    tally = torch.empty((2, sum(blocks)), dtype=torch.int64, device=device)
    with torch.cuda.device_of(threshold):
        offset = 0
        for s, own in zip(scores, blocks, strict=True):
            sparse_topk_tally_kernel[(own,)](
                s, threshold, tally[:, offset:], s.numel(), tally.shape[1], ABSOLUTE=use_abs, BLOCK=_BLOCK, num_warps=4
            )
            offset += own
        above, tied = tally
        before = tied.cumsum(0) - tied
        taken = (k - above.sum() - before).clamp_(min=0).minimum(tied)
        chosen = above + taken
        starts = chosen.cumsum(0) - chosen
        offset = first = 0
        for s, own in zip(scores, blocks, strict=True):
            sparse_topk_write_kernel[(own,)](
                s, threshold, taken[offset:], starts[offset:], positions, s.numel(), first, k,
                ABSOLUTE=use_abs, BLOCK=_BLOCK, num_warps=8,
            )  # fmt: skip
            offset, first = offset + own, first + s.numel()
    return positions, chosen.sum()


def why_not_topk_threshold(k, use_abs, *scores) -> str:
    return next((f"no kernel for {s.dtype}" for s in scores if s.dtype not in _DTYPES), "")


def why_not_topk_compact(threshold, k, use_abs, *scores) -> str:
    return why_not_topk_threshold(k, use_abs, threshold, *scores)
