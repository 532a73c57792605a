"""Factors of a matrix: truncated SVD and nearest Kronecker products."""

import math

import pytest
import torch

import peft_kernels as pk


def _random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_golden():
    a, b, error = pk.truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
    assert torch.allclose(b @ a, torch.diag(torch.tensor([3.0, 2.0, 0.0])), atol=1e-6)
    assert math.isclose(error * math.sqrt(14), 1.0, rel_tol=1e-7)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 4), (300, 280), (280, 400)], ids=str)
def test_truncated_svd_is_the_best(shape):
    w, rank = _random(*shape), max(min(shape) // 3, 1)
    a, b, error = pk.truncated_svd(w, rank)
    s = torch.linalg.svdvals(w.double())
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank) and a.dtype == b.dtype == torch.float32
    assert math.isclose(error, (s[rank:].norm() / s.norm()).item(), rel_tol=1e-6, abs_tol=1e-7)
    assert math.isclose(error, ((w - b @ a).norm() / w.norm()).item(), rel_tol=1e-3, abs_tol=1e-6)
    assert torch.allclose(a.norm(dim=1), s[:rank].sqrt().float(), rtol=1e-5)
    assert torch.allclose(b.norm(dim=0), s[:rank].sqrt().float(), rtol=1e-5)
    assert pk.truncated_svd(w, min(shape))[2] < 1e-6


@pytest.mark.parametrize("shape", [(40, 30), (300, 290)], ids=str)
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_energy_is_kept_by_the_smallest_rank(shape, energy):
    w = _random(shape[0], 20) @ _random(20, shape[1], seed=1)
    a, _, error = pk.truncated_svd(w, energy=energy)
    s = torch.linalg.svdvals(w.double()).square()
    kept = s.cumsum(0) / s.sum()
    assert kept[len(a) - 1] >= energy - 1e-6
    assert len(a) == 20 if energy == 1 else kept[len(a) - 2] < energy
    assert error**2 <= 1 - energy + 1e-6


def test_dtypes_and_zeros():
    w = _random(6, 4, dtype=torch.float64)
    a, b, error = pk.truncated_svd(w, 4)
    assert a.dtype == torch.float64 and error < 1e-14 and torch.allclose(b @ a, w)
    a, b, _ = pk.truncated_svd(w.bfloat16(), 2)
    assert a.dtype == b.dtype == torch.float32
    for got in (pk.truncated_svd(torch.zeros(3, 5), 2), pk.truncated_svd(torch.zeros(3, 5), energy=0.5)):
        assert not got[0].any() and not got[1].any() and got[2] == 0


def test_a_large_matrix_comes_near_the_best(monkeypatch):
    monkeypatch.setattr("peft_kernels.engine.factor._EXACT", 300)
    w = _random(400, 320) @ torch.diag(torch.arange(1, 321) ** -0.5)
    a, b, error = pk.truncated_svd(w, 20)
    s = torch.linalg.svdvals(w.double())
    best = (s[20:].norm() / s.norm()).item()
    assert best <= error < 1.001 * best
    assert torch.equal(pk.truncated_svd(w, 20)[0], a)
    assert math.isclose(((w - b @ a).norm() / w.norm()).item(), error, rel_tol=1e-4)


@pytest.mark.parametrize(("size", "shape"), [((6, 8), (2, 4)), ((6, 8), (6, 1)), ((12, 10), (1, 1)), ((9, 4), (3, 2))])
def test_nearest_kronecker(size, shape):
    w = _random(*size)
    limit = min(math.prod(shape), w.numel() // math.prod(shape))
    errors = []
    for terms in range(1, limit + 1):
        a, b, error = pk.nearest_kronecker(w, shape, terms)
        assert a.shape == (terms, *shape) and b.shape == (terms, size[0] // shape[0], size[1] // shape[1])
        near = sum(torch.kron(p, q) for p, q in zip(a, b, strict=True))
        assert math.isclose(((w - near).norm() / w.norm()).item(), error, rel_tol=1e-4, abs_tol=1e-6)
        errors.append(error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6


def test_nearest_kronecker_finds_a_product():
    p, q = _random(3, 2), _random(4, 5, seed=1)
    a, b, error = pk.nearest_kronecker(torch.kron(p, q), (3, 2))
    assert error < 1e-6 and torch.allclose(torch.kron(a[0], b[0]), torch.kron(p, q), atol=1e-5)
    column_major = torch.kron(p, q).T.contiguous().T
    assert pk.nearest_kronecker(column_major, (3, 2))[2] < 1e-6


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda w: pk.truncated_svd(w), "expected a rank in 1..4 or an energy"),
        (lambda w: pk.truncated_svd(w, 2, 0.5), "expected a rank in 1..4 or an energy"),
        (lambda w: pk.truncated_svd(w, 5), "expected a rank in 1..4"),
        (lambda w: pk.truncated_svd(w, energy=1.5), "energy = 1.5"),
        (lambda w: pk.truncated_svd(w / 0, 1), "not finite"),
        (lambda w: pk.truncated_svd(w.int(), 1), "expected a floating matrix"),
        (lambda w: pk.nearest_kronecker(w, (4, 2)), "expected divisors"),
        (lambda w: pk.nearest_kronecker(w, (3, 2), 5), "expected 1..4"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call(_random(6, 4))
    assert "\n" not in str(error.value)
