"""The Walsh-Hadamard transform and Fastfood beyond the laws of test_ops: sizes, the published formula, the bits."""

import hashlib
import math

import pytest
import torch
from laws import LEVELS, at_level

import peft_kernels as pk
from peft_kernels.kernels.hadamard import hadamard_native as native
from peft_kernels.ops import all_ops, fastfood, fastfood_norm, fastfood_state, fwht
from peft_kernels.ops.fastfood_state import plain_state, quantiles
from peft_kernels.ops.hadamard import padded, transform

UNIT = 2.0**-12
QUANTILES = "1ea009ce409dac97d6bd609266910f809c5fb912f78e16bd89145b08174d6fc5"
STATE = "ac88026e332e85b41c0d7bdcee330a1280fd73b13e40a0f32205bc867ac63503"
LONG_STATE = "2449a7141a1db10c92670243ff484b7a035c7e5fa101edd315c8855dcd8ce20d"


def digest(*tensors):
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def whole(x, scale=1.0):
    """What fwht is to give, in fp64."""
    n = x.shape[-1]
    y = torch.nn.functional.pad(x.double(), (0, padded(n) - n))
    return transform(y)[..., :n] * scale


def matrix(size):
    """H from its definition: the sign is the parity of the bits that row and column share."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


# -- the transform ----------------------------------------------------------------------------------------------------


def test_the_known_answer():
    x = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0])
    for name in ("cpu", "reference"):
        with pk.backend(name):
            assert fwht(x).tolist() == [4, 2, 0, -2, 0, 2, 0, 2]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 64, 100, 128, 200])
@pytest.mark.parametrize("rows", [0, 1, 3, 70])
def test_short_rows_are_the_product_with_the_definition(n, rows):
    x = torch.randint(-9, 10, (rows, n)).float()
    assert torch.equal(fwht(x, 0.5), x @ matrix(padded(n))[:n, :n] * 0.5)


@pytest.mark.parametrize("n", [256, 300, 1 << 10, 5000, 1 << 13, 1 << 15, 40_000, 1 << 16, (1 << 17) - 5, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_rows(n, dtype):
    x = torch.randn(2 if n < 1 << 20 else 1, n).to(dtype)
    y, expected = fwht(x, n**-0.5), whole(x, n**-0.5)
    assert y.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 2e-6)
    assert (y - expected).abs().max() <= eps * expected.abs().max()


@pytest.mark.parametrize("m", [0, 1, 5, 12, 15, 16, 19, 24])
def test_twice_gives_n_times_x(m):
    x = torch.randint(-8, 9, (1 << m,)).float()
    assert torch.equal(fwht(fwht(x)), x * 2.0**m)


def test_a_row_does_not_see_the_others():
    for n in (4, 24, 1 << 16):
        x = torch.randn(3, n)
        x[1, n // 2] = math.nan
        y = fwht(x)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], torch.stack([fwht(x[0]), fwht(x[2])]))


def test_the_gradient_is_the_transform():
    x, g = torch.randn(2, 70_000, requires_grad=True), torch.randn(2, 70_000)
    (dx,) = torch.autograd.grad(fwht(x, 0.25), x, g)
    assert torch.equal(dx, fwht(g, 0.25))


# -- Fastfood ---------------------------------------------------------------------------------------------------------


def published(theta, signs, permutation, g, numel, scale, base):
    """Two transforms of n, with all n signs and the permutation itself."""
    padded_theta = torch.nn.functional.pad(theta, (0, len(g) - len(theta)))
    return base + scale * transform(transform(padded_theta * signs)[permutation.long()] * g)[:numel].view(base.shape)


@pytest.mark.parametrize(
    ("numel", "d"),
    [(1, 1), (12, 3), (12, 40), (1000, 5), (30_000, 700), (100_000, 1), (150_000, 3000), (70_000, 40_000)],
)
@pytest.mark.parametrize("floats", [False, True])
def test_one_transform_is_as_good_as_two(numel, d, floats):
    """The kernels against the published formula in fp64, of the same B, Pi and G; and the three gradients."""
    n = padded(max(numel, d))
    signs, permutation, g = fastfood_state(5, numel, n)
    scale = torch.tensor(fastfood_norm(g, numel) * 0.7, dtype=torch.float64)
    pi_mod = (permutation % padded(d)).to(torch.int32 if floats or d > 1 << 15 else torch.int16)
    theta, base, dy = torch.randn(d), torch.randn(numel), torch.randn(numel)
    own = [t.clone().requires_grad_() for t in (theta, scale.float(), base)]
    true = [t.double().requires_grad_() for t in own]
    given = g * UNIT if floats else g
    out = fastfood(own[0], signs[:d], pi_mod, given, numel, own[1], base=own[2])
    expected = published(true[0], signs, permutation, g.double() * UNIT, numel, true[1], true[2])
    pairs = zip(
        (out, *torch.autograd.grad(out, own, dy)),
        (expected, *torch.autograd.grad(expected, true, dy.double())),
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).abs().max() <= 3e-6 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [100, 100_000])
def test_what_is_16_bit_is_rounded_once(dtype, numel):
    state = fastfood_state(1, numel, 50)
    theta, base, dy = torch.randn(50), torch.randn(numel).to(dtype), torch.randn(numel).to(dtype)
    scale = fastfood_norm(state[2], numel)
    wide = fastfood(theta, *state, numel, scale, base=base.float())
    assert torch.equal(fastfood(theta, *state, numel, scale, base=base), wide.to(dtype))
    short = fastfood(theta.to(dtype), *state, numel, scale)
    assert torch.equal(short, fastfood(theta.to(dtype).float(), *state, numel, scale).to(dtype))
    backward = all_ops()["fastfood_backward"].run
    assert torch.equal(backward(dy, *state, scale), backward(dy.float(), *state, scale))


def test_the_projection_keeps_norms_on_average():
    state = fastfood_state(3, 6000, 500)
    theta = torch.randn(40, 500)
    made = torch.stack([fastfood(t, *state, 6000, fastfood_norm(state[2], 6000)) for t in theta])
    assert (made.norm(dim=1) / theta.norm(dim=1)).mean().sub(1).abs() < 0.02


def test_values_of_the_permutation_count_modulo_k():
    sign, pi_mod, g = fastfood_state(3, 60, 5)
    theta = torch.randn(5)
    expected = fastfood(theta, sign, pi_mod, g, 60, 1.0)
    for name in ("cpu", "reference"):
        with pk.backend(name):
            for other in (pi_mod + 8 * 400, pi_mod - 8 * 400):
                torch.testing.assert_close(fastfood(theta, sign, other, g, 60, 1.0), expected, atol=1e-4, rtol=0)


def test_a_scale_of_one_number_keeps_little():
    theta, scale = torch.randn(50, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    state, kept = fastfood_state(1, 5000, 50), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fastfood(theta, *state, 5000, scale, base=torch.randn(5000))
    known = {t.data_ptr() for t in state}
    assert sum(t.numel() for t in kept if t.data_ptr() not in known) <= 2 * 50 + 2
    assert out.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(theta=torch.zeros(2, 3)), "expected \\[d\\], \\[d\\], \\[n\\] and \\[n\\]"),
        (dict(numel=65), "2\\^m >= max"),
        (dict(numel=0), "2\\^m >= max"),
        (dict(g=torch.zeros(63), pi_mod=torch.zeros(63, dtype=torch.int16)), "2\\^m >= max"),
        (dict(theta=torch.zeros(70), sign=torch.ones(70, dtype=torch.int8)), "2\\^m >= max"),
        (dict(sign=torch.ones(5)), "expected int8"),
        (dict(pi_mod=torch.zeros(64)), "int16 or int32"),
        (dict(g=torch.zeros(64, dtype=torch.int64)), "int16 or float32"),
        (dict(theta=torch.zeros(5, dtype=torch.int64)), "floating point"),
        (dict(base=torch.zeros(61)), "expected 60 floating point numbers"),
        (dict(base=torch.zeros(60, dtype=torch.int8)), "expected 60 floating point numbers"),
        (dict(scale=torch.ones(1)), "0-d"),
        (dict(sign=torch.ones(5, dtype=torch.int8, device="meta")), "several devices"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(change, message):
    sign, pi_mod, g = fastfood_state(3, 60, 5)
    args = dict(theta=torch.zeros(5), sign=sign, pi_mod=pi_mod, g=g, numel=60, scale=1.0) | change
    with pytest.raises(ValueError, match=message) as error:
        fastfood(**args)
    assert "\n" not in str(error.value)


def test_bad_arguments_of_the_others():
    for x in (torch.zeros(()), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="n from 1 to 2\\^26"):
            fwht(x)
    with pytest.raises(ValueError, match="floating point"):
        fwht(torch.zeros(4, dtype=torch.int32))
    for numel, d in ((0, 1), (1, 0), ((1 << 26) + 1, 1)):
        with pytest.raises(ValueError, match="1 to 2\\^26"):
            fastfood_state(0, numel, d)
    with pytest.raises(ValueError, match="expected int16"):
        fastfood_norm(torch.zeros(4), 4)


# -- the state --------------------------------------------------------------------------------------------------------


def test_the_state_has_these_bits():
    """What a checkpoint of seed and theta stands for, on every machine: this may never change."""
    assert digest(quantiles()) == QUANTILES
    assert digest(*fastfood_state(20_211_107, 3000, 700)) == STATE
    assert digest(*fastfood_state(-1, 70_000, 40_000)) == LONG_STATE


@pytest.mark.parametrize(
    ("seed", "numel", "d"),
    [
        (0, 1, 1),
        (1, 2, 1),
        (2, 2, 2),
        (2**63 + 5, 3, 3),
        (-3, 5, 17),
        (9, 100, 7),
        (2**64 - 1, 3000, 1500),
        (7, 9, 40_000),
    ],
)
def test_the_kernel_makes_the_state_of_plain_torch(seed, numel, d):
    n = padded(max(numel, d))
    signed = seed - 2**64 if seed >= 2**63 else seed
    plain = plain_state(signed, n, d)
    for ours, theirs in zip(fastfood_state(seed, numel, d), plain, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    for ours, theirs in zip(native.fastfood_state(quantiles(), signed, n, d), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("m", range(14))
def test_the_permutation_is_one(m):
    """Of odd and even numbers of bits; modulo k every value comes n / k times."""
    n = 1 << m
    permutation = fastfood_state(m, n, n)[1]
    assert torch.equal(permutation.long().sort().values, torch.arange(n))
    for d in {1, 2, n // 3 + 1, n}:
        if d <= n:
            pi_mod = fastfood_state(m, n, d)[1]
            assert torch.equal(pi_mod, permutation % padded(d))
            assert (torch.bincount(pi_mod.long(), minlength=padded(d)) == n // padded(d)).all()


def test_the_state_is_random():
    """Moments of the gaussians, the rate of signs, and a permutation without an order of its own."""
    sign, permutation, g = fastfood_state(11, 1 << 15, 1 << 15)
    n = len(g)
    value = g.double() * UNIT
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((value**power).mean() - moment) < 4 * (spread / n) ** 0.5
    assert abs(sign.double().mean()) < 4 / n**0.5
    place = permutation.double()
    for lag in (1, 2, 128, 256):  # neighbours, and those that share half of the bits
        a, b = place, place.roll(lag)
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / n**0.5
    assert abs(torch.corrcoef(torch.stack([place, torch.arange(n).double()]))[0, 1]) < 4 / n**0.5
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(fastfood_state(a, 64, 64)[1], fastfood_state(b, 64, 64)[1])


def test_the_norm_is_exact():
    g = fastfood_state(2, 1000, 10)[2]
    total = sum(int(v) ** 2 for v in g)
    assert fastfood_norm(g, 1000) == 4096 / math.sqrt(total * 1000)


# -- the same bits everywhere -----------------------------------------------------------------------------------------


def everything():
    """A digest of results of all kernels: short and long, fp32 and 16-bit, few bins and many."""
    made = torch.Generator().manual_seed(1)
    out = []
    for n in (8, 24, 100, 1000, 4096, 70_000, 1 << 17):
        x = torch.randint(-(2**24), 2**24, (2, n), generator=made) / 4096  # not of torch's own instructions
        out += [fwht(x, 0.3), fwht(x.bfloat16(), 0.3)]
    for numel, d in ((5, 3), (60, 100), (3000, 7), (100_000, 1000), (150_000, 40_000)):
        state = fastfood_state(numel, numel, d)
        theta = torch.randint(-(2**24), 2**24, (d,), generator=made) / 2**20
        base = torch.randint(-(2**24), 2**24, (numel,), generator=made) / 2**20
        norm = fastfood_norm(state[2], numel)
        out += [fastfood(theta, *state, numel, norm, base=base), fastfood(theta, *state, numel, norm)]
        out += [all_ops()["fastfood_backward"].run(base, *state, norm), *state]
    return digest(*out)


def test_the_thread_count_does_not_change_a_bit():
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(everything())
        assert len(found) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", LEVELS)
def test_other_instructions_give_the_same_bits(level):
    assert at_level(level, "import test_hadamard as own; print(own.everything())").strip() == everything()
