"""The random matrices of Fastfood as integers that are functions of a seed alone: the same bits on every machine.

With Philox(seed, s) the words of _philox.py of the counters (i, 0, s, 0), i = 0, 1, ..., and k = padded(d):

    sign     of word 0, 1, ... of Philox(seed, 0): 1 where the top bit is 0, else -1
    g        the 16-bit numbers u of Philox(seed, 1), low half of a word first: the quantile (u + 1/2) / 2^16 of the
             normal distribution, rounded to units of 2^-12
    pi_mod   Pi(i) modulo k, Pi a Feistel network of 8 rounds on the m bits of i, n = 2^m. In round r the key is word r
             of Philox(seed, 2), and one half of the bits is changed by the other half:
             low ^= F(high) for even r, high ^= F(low) for odd r, low being the (m + 1) // 2 lower bits, and F(x) the
             top bits, as many as are changed, of y * 0x846CA68B with y = z ^ (z >> 15), z = (x ^ key) * 0x7FEB352D,
             all modulo 2^32

F need not be invertible for Pi to be a permutation; every value below k occurs n / k times.
"""

from __future__ import annotations

import functools
import math
import statistics

import torch
from torch import Tensor

from . import _philox
from .hadamard import LARGEST, padded

UNIT = 2.0**-12  # of g
_ROUNDS = 8
_CHUNK = 1 << 15  # elements at a time, so that what is between stays in the cache
_LOW = 0xFFFFFFFF


@functools.cache
def quantiles() -> Tensor:
    """int16 [65536]. None is within 1e-5 of the middle of two integers, so that every libm rounds it the same way."""
    half = [round(statistics.NormalDist().inv_cdf((u + 0.5) / 65536) / UNIT) for u in range(32768)]
    return torch.tensor(half + [-q for q in reversed(half)], dtype=torch.int16)


def _words(seed: int, stream: int, first: int, count: int) -> Tensor:
    """Words first, first + 1, ... of the stream; first a multiple of 4."""
    rng = torch.tensor([seed, stream])
    return torch.stack(_philox.words(rng, 1, -(-count // 4), first // 4), -1).flatten()[:count]


def _permuted(i: Tensor, bits: int, keys: list[int]) -> Tensor:
    high_bits = bits // 2
    low_bits = bits - high_bits
    low, high = i & ((1 << low_bits) - 1), i >> low_bits

    def mixed(x: Tensor, key: int, kept: int) -> Tensor:
        z = ((x ^ key) * 0x7FEB352D) & _LOW
        return (((z ^ (z >> 15)) * 0x846CA68B) & _LOW) >> (32 - kept)

    for r, key in enumerate(keys):
        if r % 2:
            high = high ^ mixed(low, key, high_bits)
        else:
            low = low ^ mixed(high, key, low_bits)
    return high << low_bits | low


def plain_state(seed: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `fastfood_state` makes, in plain torch; seed an int64, n a power of two."""
    k, keys = padded(d), _words(seed, 2, 0, _ROUNDS).tolist()
    sign = torch.empty(d, dtype=torch.int8)
    pi_mod = torch.empty(n, dtype=torch.int16 if k <= 1 << 15 else torch.int32)
    g = torch.empty(n, dtype=torch.int16)
    for i in range(0, d, _CHUNK):
        size = min(_CHUNK, d - i)
        sign[i : i + size] = 1 - (_words(seed, 0, i, size) >> 31) * 2
    for i in range(0, n, _CHUNK):
        size = min(_CHUNK, n - i)
        words = _words(seed, 1, i // 2, (size + 1) // 2)
        g[i : i + size] = quantiles()[torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[:size]]
        pi_mod[i : i + size] = _permuted(torch.arange(i, i + size), n.bit_length() - 1, keys) & (k - 1)
    return sign, pi_mod, g


def fastfood_state(
    seed: int, numel: int, d: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(sign int8 [d], pi_mod int16 or int32 [n], g int16 [n]) of `fastfood`, n = 2^m the smallest >= numel and d.

    Functions of the arguments alone, the same bits on every machine, device and version of torch. seed: taken modulo
    2^64. pi_mod is int32 where d > 2^15. 4 or 6 bytes for each of the n elements, made on the CPU.
    Raises ValueError unless numel and d are from 1 to 2^26.
    """
    if not (1 <= numel <= LARGEST and 1 <= d <= LARGEST):
        raise ValueError(f"fastfood_state: numel is {numel}, d {d}; expected numbers from 1 to 2^26")
    from ..kernels.hadamard import hadamard_native as native

    seed, n = (seed + 2**63) % 2**64 - 2**63, padded(max(numel, d))
    made = plain_state(seed, n, d) if native.unavailable("cpu") else native.fastfood_state(quantiles(), seed, n, d)
    sign, pi_mod, g = (t.to(device) for t in made)
    return sign, pi_mod, g


def fastfood_norm(g: Tensor, numel: int) -> float:
    """1 / (sqrt(n sum g^2) sqrt(numel / n)), the scale of the paper, with which P keeps norms on average.

    g [n] int16 of `fastfood_state`: the squares are summed exactly, and every machine gets the same float.
    Raises ValueError on another dtype.
    """
    if g.dtype != torch.int16:
        raise ValueError(f"fastfood_norm: g is {g.dtype}; expected int16, as fastfood_state makes it")
    return 1 / (UNIT * math.sqrt(int(g.long().square().sum()) * numel))
