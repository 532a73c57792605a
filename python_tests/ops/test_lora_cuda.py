"""LoRA's CUDA kernels where no sample of a contract leads: parts of sums, wide ranks, types, layouts, NaN."""

import pytest
import torch
from laws import OPS, as_good, marks

import peft_kernels as pk

pytestmark = marks("lora_add", "cuda")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def _one(m, k, n, r, x=bf16, y=None, a=None):
    made = torch.Generator().manual_seed(m + k + n + r)
    draw = lambda *shape: torch.randn(*shape, generator=made)  # noqa: E731
    return draw(m, n).to(y or x), draw(m, k).to(x), (draw(r, k) * k**-0.5).to(a or x), draw(n, r).to(a or x)


def _both_ways(y, x, a, b, p=0.0):
    rng = torch.tensor([-5, 2**33 + 1]) if p else None
    _, t = as_good("lora_add", y, x, a, b, 0.75, p, rng)
    t = t.contiguous()
    as_good("lora_add_backward", y, x, a, b, t, 0.75, p, rng, (True, True, True))
    as_good("lora_add_backward", y, x, a, b, t, 0.75, p, rng, (False, True, False))


@pytest.mark.parametrize("clusters", ("0", "1"))
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1100, 600, 16),
        (17, 264, 72, 40),
        (65, 96, 136, 20),
        (2, 4, 300, 260),
        pytest.param((600, 64, 80, 8), marks=pytest.mark.slow),
        pytest.param((130, 520, 64, 68), marks=pytest.mark.slow),
    ],
    ids=lambda s: "x".join(map(str, s)),
)
def test_shapes(shape, clusters, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    _both_ways(*_one(*shape), p=0.25 if shape[0] % 2 else 0.0)


@pytest.mark.parametrize("clusters", ("0", "1"))
@pytest.mark.parametrize(
    "types",
    [(f32, f32, f32), (bf16, bf16, f32), (f16, f16, f16), (f16, f16, f32), (bf16, f32, bf16), (f16, bf16, f16),
     (f32, f32, bf16), (bf16, bf16, f16)],
    ids=lambda types: "-".join(str(t)[6:] for t in types),
)  # fmt: skip
def test_types(types, clusters, monkeypatch):
    """Of x, of y, and of a and b: each pair of neighbours meets in some product."""
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    for m in (9, 70):
        _both_ways(*_one(m, 144, 88, 12, *types), p=0.125)


@pytest.mark.parametrize("offset", (1, 4))
def test_misaligned_views(offset):
    """Slices of one buffer, so that no row starts where a vector may."""

    def moved(t):
        held = torch.empty(t.numel() + 8, dtype=t.dtype)
        return held[offset : offset + t.numel()].view(t.shape).copy_(t)

    for m in (5, 70):
        aligned = _one(m, 64, 72, 8)
        _both_ways(*map(moved, aligned))
        with pk.backend("cuda"):
            outs, others = (OPS["lora_add"].run(*map(f, aligned), 1.0, 0.0, None) for f in (torch.clone, moved))
        assert all(torch.equal(p, q) for p, q in zip(outs, others, strict=True))


def _bank(m, k, n, ranks, x, a, seed=0):
    made = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=made)  # noqa: E731
    r_indptr = torch.tensor((0, *ranks)).cumsum(0)
    ids = torch.randint(-1, len(ranks) + 1, (m,), generator=made)
    bank = (draw(sum(ranks), k) * k**-0.5).to(a), draw(sum(ranks), n).to(a), r_indptr
    return draw(m, n).to(x), draw(m, k).to(x), *bank, torch.linspace(-1, 2, len(ranks)), ids


@pytest.mark.parametrize("clusters", ("0", "1"))
@pytest.mark.parametrize("block_m", (None, 7, 16, *(pytest.param(n, marks=pytest.mark.slow) for n in (33, 128))))
@pytest.mark.parametrize(
    ("m", "k", "n", "ranks"),
    [(40, 1100, 72, (16, 0, 5, 70)), (300, 64, 136, (8, 20)), (600, 40, 48, (4,) * 3)],
    ids=("long_rows", "ragged", "many_rows"),
)
def test_plans(m, k, n, ranks, block_m, clusters, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    y, x, *bank = _bank(m, k, n, ranks, bf16, f32 if block_m == 16 else bf16)
    plan = block_m and pk.ops.lora_plan(bank[4], bank[2], block_m)
    rest = plan, max(ranks), 0.25, torch.tensor([3, 4])
    (out,) = as_good("multi_lora_add", y, x, *bank, *rest)
    idle = (bank[4] < 0) | (bank[4] >= len(ranks))
    assert torch.equal(out[idle].view(torch.int16), y[idle].view(torch.int16))
    as_good("multi_lora_add_backward", y, x, *bank, *rest, (True, True, True))


@pytest.mark.parametrize("clusters", ("0", "1"))
def test_nan_stays_in_its_row_and_adapter(clusters, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_EMULATED_CLUSTERS", clusters)
    for m, dtype in ((12, bf16), (90, f32)):
        y, x, a, bt, r_indptr, scaling, ids = _bank(m, 48, 40, (3, 8, 5), dtype, dtype)
        ids = torch.arange(m) % 3
        x[4], a[0] = torch.nan, torch.inf  # a row of adapter 1, a rank of adapter 0
        bank = a, bt, r_indptr, scaling, ids, None, 8, 0.0, None
        with pk.backend("cuda"):
            out = OPS["multi_lora_add"].run(y, x, *bank)
            dx, da, dbt = OPS["multi_lora_add_backward"].run(y, x, *bank, (True, True, True))
        touched = (ids == 0) | (torch.arange(m) == 4)
        assert not out[touched].isfinite().all(1).any() and out[~touched].isfinite().all()
        assert dx[ids != 0].isfinite().all() and not dx[ids == 0].isfinite().all(1).any()
        assert da[:3].isfinite().all() and not da[3:11].isfinite().any() and da[11:].isfinite().all()
        assert not dbt[0].isfinite().any() and dbt[1:3].isfinite().all() and dbt[11:].isfinite().all()


def test_dropped_elements_count_as_zero_whatever_they_are():
    y, x, a, b = _one(20, 64, 48, 8)
    rng = torch.tensor([1, 2])
    kept = pk.ops._philox.keep_mask(rng, 20, 64, 0.5)
    poisoned = torch.where(kept, x, torch.nan)
    with pk.backend("cuda"):
        clean, t = OPS["lora_add"].run(y, x, a, b, 1.0, 0.5, rng)
        out, also = OPS["lora_add"].run(y, poisoned, a, b, 1.0, 0.5, rng)
        grads = [OPS["lora_add_backward"].run(y, u, a, b, t, 1.0, 0.5, rng, (True,) * 3) for u in (x, poisoned)]
    assert torch.equal(out, clean) and torch.equal(t, also)
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))
