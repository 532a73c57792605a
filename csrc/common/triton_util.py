"""What the Triton kernels share: mixed-precision dots and rounding that also hold in the interpreter, tiles, dropout.

The interpreter (TRITON_INTERPRET=1, CPU tensors) keeps bf16 as bare uint16 patterns: arithmetic on them is silently
integer arithmetic, and its own conversions truncate. So kernels multiply through `dot` and convert through `cast`.
"""

import triton
import triton.language as tl

# Read once: @triton.jit decides at import, too, whether a kernel is compiled or interpreted.
_INTERPRETING = triton.knobs.runtime.interpret
INTERPRET = tl.constexpr(_INTERPRETING)


def interpreting() -> bool:
    """True when kernels run in the interpreter, i.e. on CPU tensors."""
    return _INTERPRETING


def tile(size: int, low: int, high: int) -> int:
    """The smallest power of two that covers size, kept within [low, high]."""
    return min(max(triton.next_power_of_2(size), low), high)


def split(steps: int, tiles: int, programs: int = 256, least: int = 4) -> tuple[int, int]:
    """(splits, chunk): cut a sum of `steps` loop steps into chunks of steps, so that about `programs` programs run.

    Uses shapes alone, never the device: the order of additions, and so every bit, is the same from run to run and from
    GPU to GPU. A chunk has at least `least` steps, which is what the software pipeline needs to fill.
    """
    splits = max(1, min(programs // max(tiles, 1), steps // least, 32))
    chunk = max(1, triton.cdiv(steps, splits))
    return max(1, triton.cdiv(steps, chunk)), chunk


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another floating dtype, rounded to nearest even."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(dtype)
    elif INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _rest(x, part):
    """What a bf16 part leaves of x; 0 where that is not finite, so an infinity stays one and is not turned NaN."""
    rest = x - part.to(tl.float32)
    return tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit
def _bf16_parts(x, EXACT: tl.constexpr):
    """bf16 tensors that add up to x, largest first: 1 for bf16, 2 for fp16, for fp32 3 or, with 2^-17 lost, 2."""
    if x.dtype == tl.bfloat16:
        return (x,)
    else:  # Triton 3.6 goes on behind a return
        high = x.to(tl.bfloat16)
        rest = _rest(x.to(tl.float32), high)
        mid = rest.to(tl.bfloat16)
        if EXACT and x.dtype == tl.float32:
            return (high, mid, _rest(rest, mid).to(tl.bfloat16))
        else:
            return (high, mid)


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr, PARTS: tl.constexpr = False):
    """acc + a b in fp32 for any mix of fp32, bf16 and fp16; EXACT says that the result is stored in fp32.

    Equal dtypes multiply as they are: 16-bit ones on tensor cores, fp32 by fp32 FMA (never TF32). Otherwise, and for
    fp32 when a 16-bit result could not show the difference, operands are cut into bf16 parts (fp16 parts would overflow
    beyond 65504), and tensor cores multiply all pairs of parts but the smallest. What is left out is about 2^-24 of a
    product if EXACT and 2^-16 if not. PARTS: fp32 by fp32 is multiplied in parts also if EXACT, on tensor cores.
    """
    if INTERPRET:
        return tl.dot(cast(a, tl.float32), cast(b, tl.float32), acc, input_precision="ieee")
    elif a.dtype == b.dtype and (a.dtype != tl.float32 or (EXACT and not PARTS)):
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        a_parts = _bf16_parts(a, EXACT)
        b_parts = _bf16_parts(b, EXACT)
        for i in tl.static_range(len(a_parts) - 1, -1, -1):  # the small ones first
            for j in tl.static_range(len(b_parts) - 1, -1, -1):
                if i + j < (3 if EXACT else 2):
                    acc = tl.dot(a_parts[i], b_parts[j], acc)
        return acc


@triton.jit
def keep_mask(rng_ptr, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """Dropout's mask [len(rows), COLUMNS] from Philox4x32-10, a function of (seed, offset, row, column) alone.

    Key = the seed's halves, counter = (column // 8, row, offset low, offset high). The four output words are eight
    16-bit numbers for eight neighbouring columns, low half first; a value is kept iff its number is >= threshold. One
    Philox per eight columns: first_column must be a multiple of 8, and the joins put the numbers side by side.
    """
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    groups = first_column // 8 + tl.arange(0, COLUMNS // 8)
    shape: tl.constexpr = [rows.shape[0], COLUMNS // 8]
    c0 = tl.broadcast_to(groups[None, :], shape).to(tl.uint32)
    c1 = tl.broadcast_to(rows[:, None], shape).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))
    # join adds the fastest axis, so the slowest bit of the lane comes first: [rows, groups, word // 2, word % 2, half].
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    uniform = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [rows.shape[0], COLUMNS])
    return uniform.to(tl.int32) >= threshold
