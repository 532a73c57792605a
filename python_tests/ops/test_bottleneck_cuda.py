"""CUDA kernels of the bottleneck where no sample of the contract leads: both ways forward, tiles, types, layouts."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from laws import OPS, as_good, marks

import peft_kernels as pk
from peft_kernels.ops import _philox
from peft_kernels.ops.bottleneck import ACTIVATIONS

pytestmark = marks("bottleneck", "cuda")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
ALL = (True,) * 8
both_ways = pytest.mark.parametrize("clusters", ("0", "1"))
every_mix = pytest.mark.parametrize(
    ("dtype", "low"), [(f32, f32), (bf16, bf16), (bf16, f32), (f16, f16), (f16, f32)], ids=lambda d: str(d)[6:]
)


def _inputs(rows, k, m, n, dtype=bf16, low=None, act="gelu", p=0.0, ln=True):
    """(residual, x, ln_w, ln_b, wd, bd, wu, bu, gate, act, scale, eps, p, rng)"""
    made = torch.Generator().manual_seed(rows + k + m + n)
    draw = partial(torch.randn, generator=made)
    low = low or dtype
    x, residual, ln_w, ln_b = draw(rows, k) + 1, draw(rows, n), draw(k) + 1, draw(k)
    wd, bd, wu, bu = draw(m, k) * k**-0.5, draw(m), draw(n, m) * m**-0.5, draw(n)
    rows_of = (t.to(dtype) for t in (residual, x))
    weights = (*((t.to(low) for t in (ln_w, ln_b)) if ln else (None, None)), *(t.to(low) for t in (wd, bd, wu, bu)))
    rng = torch.tensor([2**40 + 1, -5]) if p else None
    return *rows_of, *weights, draw(rows), list(ACTIVATIONS).index(act), 0.75, 1e-5 if ln else None, p, rng


def _forth_and_back(residual, x, *rest):
    """Against the law; the gradients asked for alone are those asked for together."""
    _, z, stats = as_good("bottleneck_add", residual, x, *rest)
    g, stats = residual.flip(0), stats if stats.numel() else None
    exists = tuple(t is not None for t in (x, *rest[:7]))
    own = residual.shape == x.shape
    args = g, x, *rest[:7], z.contiguous(), stats, *rest[7:], own
    together = as_good("bottleneck_backward", *args, exists)
    with pk.backend("cuda"):
        for i in (0, 1, 3, 5, 7):
            if exists[i]:
                alone = OPS["bottleneck_backward"].run(*args, tuple(i == j for j in range(8)))
                assert torch.equal(alone[i], together[i])


# Blocks of the cluster without columns, several tiles of rows, more ranks than warps take at once, cut-off tiles.
@both_ways
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1100, 16, 600),
        (17, 264, 40, 72),
        (64, 72, 21, 136),
        (2, 20, 260, 300),
        pytest.param((33, 520, 136, 520), marks=pytest.mark.slow),
    ],
    ids=lambda s: "x".join(map(str, s)),
)
def test_shapes(shape, clusters, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    _forth_and_back(*_inputs(*shape, p=0.25 if shape[0] % 2 else 0.0))


@both_ways
@every_mix
@pytest.mark.parametrize("ln", (False, True), ids=("bare", "normed"))
def test_types(dtype, low, ln, clusters, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    _forth_and_back(*_inputs(9, 144, 12, 144, dtype, low, "silu", 0.125, ln))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act):
    """Far to both sides, too, where their slopes are those of the limits."""
    args = list(_inputs(6, 16, 8, 16, f32, act=act, ln=False))
    args[1] = args[1] * torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 60.0])[:, None]
    _forth_and_back(*args)


@both_ways
def test_a_mean_far_from_zero(clusters, monkeypatch):
    """Squares of the numbers themselves would not leave a deviation of 1 beside a mean of 1000."""
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    residual, x, *rest = _inputs(5, 700, 8, 700, f32)
    _forth_and_back(residual, x + 1000, *rest)
    constant = torch.full_like(x, 3.0)
    with pk.backend("cuda"):
        _, _, stats = OPS["bottleneck_add"].run(residual, constant, *rest)
    torch.testing.assert_close(stats, torch.stack((constant[:, 0], torch.full((5,), 1e-5**-0.5))))


@both_ways
@every_mix
def test_the_bits_of_aligned_tensors(dtype, low, clusters, monkeypatch):
    """Slices of one buffer, weights in either layout, and the residual written into."""
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    args = _inputs(7, 80, 24, 72, dtype, low, p=0.25)

    def moved(t):
        if not isinstance(t, torch.Tensor) or t.dtype == torch.int64:
            return t
        return torch.empty(t.numel() + 9, dtype=t.dtype)[1:-8].view(t.shape).copy_(t)

    turned = (
        t.T.contiguous().T if isinstance(t, torch.Tensor) and t.dim() == 2 and i > 1 else t for i, t in enumerate(args)
    )
    with pk.backend("cuda"):
        first = OPS["bottleneck_add"].run(*args)
        for others in (map(moved, args), turned):
            assert all(map(torch.equal, first, OPS["bottleneck_add"].run(*others)))
        residual = args[0].clone()
        written = OPS["bottleneck_add"].run(residual, *args[1:], inplace=True)
        assert written[0] is residual
        assert all(map(torch.equal, first, written))
        back = args[0], *args[1:9], *first[1:], *args[9:], False
        grads = OPS["bottleneck_backward"].run(*back, ALL)
        assert all(map(torch.equal, grads, OPS["bottleneck_backward"].run(*map(moved, back), ALL)))


@both_ways
def test_what_is_not_finite_stays_in_its_row(clusters, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    for ln in (False, True):
        residual, x, *rest = _inputs(19, 48, 12, 40, ln=ln)
        x[3, 5], x[17, 40] = torch.nan, torch.inf
        with pk.backend("cuda"):
            y, z, stats = OPS["bottleneck_add"].run(residual, x, *rest)
            back = OPS["bottleneck_backward"].run(
                residual, x, *rest[:7], z, stats if ln else None, *rest[7:], False, (True, *(False,) * 7)
            )
        assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [3, 17]
        assert back[0][[i for i in range(19) if i not in (3, 17)]].isfinite().all()


@both_ways
def test_dropped_activations_count_as_zero_whatever_they_are(clusters, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    rows, m = 20, 24
    kept = _philox.keep_mask(torch.tensor([2**40 + 1, -5]), rows, m, 0.5)
    residual, x, *rest = _inputs(rows, m, m, m, f32, act="silu", p=0.5, ln=False)
    rest[2:7] = 16 * torch.eye(m), None, torch.eye(m), None, None
    with pk.backend("cuda"):
        y, z, _ = OPS["bottleneck_add"].run(residual, torch.where(kept, x / 16, 1e38), *rest)
        dx, *_ = OPS["bottleneck_backward"].run(
            residual, x, *rest[:7], z, None, *rest[7:], False, (True, *(False,) * 7)
        )
    assert torch.equal(z.isfinite(), kept)
    x = x.requires_grad_()
    expected = torch.where(kept, 1.5 * F.silu(x), 0)
    torch.testing.assert_close(y, residual + expected)
    torch.testing.assert_close(dx, 16 * torch.autograd.grad(expected, x, residual)[0])


def test_few_rows_and_small_weights_alone():
    with pk.backend("cuda"):
        with pytest.raises(pk.BackendError, match="x has 65 rows; the kernels are for up to 64"):
            OPS["bottleneck_add"].run(*_inputs(65, 8, 2, 8))
        residual, x, *rest = _inputs(2, 2049, 3, 8)
        rest[2], rest[4] = torch.zeros(2048, 2049, dtype=bf16), torch.zeros(8, 2048, dtype=bf16)
        with pytest.raises(pk.BackendError, match="more than 4194304 elements"):
            OPS["bottleneck_add"].run(residual, x, *rest)
        with pytest.raises(pk.BackendError, match=r"torch.float32, y torch.bfloat16"):
            OPS["bottleneck_add"].run(residual, x.float(), *rest)
