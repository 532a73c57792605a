"""Factors of a matrix: truncated SVD, and the nearest sum of Kronecker products."""

from __future__ import annotations

import torch
from torch import Tensor

_SVD = 256  # of a matrix whose smaller side is longer, the eigenvectors of its Gram matrix: 1.5 to 26 times as fast
_EXACT = 2048  # beyond it, few of many directions come from subspace iteration
_SPARE, _ROUNDS = 16, 6  # further directions that it follows, and its passes over the matrix


@torch.no_grad()
def truncated_svd(w: Tensor, rank: int = 0, energy: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """The best low-rank approximation of a matrix, b @ a (Eckart & Young 1936).

    w: [out, in], floating.   rank: at most min(out, in).   energy: instead, the smallest rank that keeps this share,
    in (0, 1], of the squared Frobenius norm; 1 drops rounding alone.
    Returns a [r, in] and b [out, r], in fp32 or wider, each with the square roots of the singular values, largest
    first, and the relative error |w - b a| / |w| (Frobenius).

    Computed in fp64, to about 1e-8 of the norm. The exception: with `rank` below an eighth of a smaller side above
    2048, it is subspace iteration (Halko et al. 2011, arXiv:0909.4061) from fixed random numbers, which is not the
    optimum but near it; the error returned is that of the result.
    ValueError for other ranks and shares, and if a number is not finite.
    """
    if w.dim() != 2 or not w.is_floating_point() or not w.numel():
        raise ValueError(f"w is {w.dtype} {list(w.shape)}; expected a floating matrix [out, in] that is not empty")
    if not torch.isfinite(w).all():
        raise ValueError(f"w {list(w.shape)} has numbers that are not finite; expected a matrix of finite ones")
    side = min(w.shape)
    if not 0 <= rank <= side or not 0 <= energy <= 1 or (rank > 0) == (energy > 0):
        raise ValueError(f"rank = {rank}, energy = {energy}; expected a rank in 1..{side} or an energy in (0, 1]")
    d = w.double()
    tall = d if w.shape[0] <= w.shape[1] else d.T  # [side, longer]
    left, squares = _directions(tall, rank)
    if energy:
        tails = squares.flip(0).cumsum(0).flip(0)  # tails[k]: what rank k leaves out
        rounding = side * torch.finfo(d.dtype).eps * tails[0]
        rank = max(int((tails > (1 - energy) * tails[0] + rounding).sum()), 1)
    left = left[:, :rank]
    right = left.T @ tall
    root = right.norm(dim=1).sqrt()
    left, right = left * root, right / root.where(root > 0, torch.ones_like(root))[:, None]
    if tall is not d:
        left, right = right.T, left.T
    dtype = torch.promote_types(w.dtype, torch.float32)
    a, b = right.to(dtype).contiguous(), left.to(dtype).contiguous()
    norm = d.norm().item()
    return a, b, (d - b.double() @ a.double()).norm().item() / norm if norm else 0.0


@torch.no_grad()
def nearest_kronecker(w: Tensor, shape: tuple[int, int], terms: int = 1) -> tuple[Tensor, Tensor, float]:
    """The sum of `terms` Kronecker products nearest to a matrix, sum_i a_i kron b_i.

    The truncated SVD of the matrix rearranged so that every Kronecker product has rank 1 (Van Loan & Pitsianis 1993).
    w: [out, in], floating.   shape: (a1, a2) of the left factors, divisors of out and in.   terms: at most
    min(a1 a2, b1 b2), where the sum is w itself.
    Returns a [terms, a1, a2] and b [terms, out / a1, in / a2], and the relative error (Frobenius); dtypes and accuracy
    are those of truncated_svd. ValueError for other shapes.
    """
    (a1, a2), matrix = shape, rearranged(w, shape)
    if not 1 <= terms <= min(matrix.shape):
        raise ValueError(
            f"terms = {terms} for factors {a1} x {a2} of a weight {list(w.shape)}; expected 1..{min(matrix.shape)}"
        )
    right, left, error = truncated_svd(matrix, terms)
    return left.T.reshape(terms, a1, a2), right.view(terms, w.shape[0] // a1, w.shape[1] // a2), error


def rearranged(w: Tensor, shape: tuple[int, int]) -> Tensor:
    """w [out, in] as [a1 a2, b1 b2], of which a kron b, with a [a1, a2], is vec(a) vec(b)^T; ValueError as above."""
    (a1, a2), sizes = shape, list(w.shape)
    if w.dim() != 2 or a1 < 1 or a2 < 1 or sizes[0] % a1 or sizes[1] % a2:
        raise ValueError(f"shape = {(a1, a2)} for a weight {sizes}; expected divisors of its two sides")
    b1, b2 = sizes[0] // a1, sizes[1] // a2
    return w.reshape(a1, b1, a2, b2).transpose(1, 2).reshape(a1 * a2, b1 * b2)


def _directions(d: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors of d [m, n], m <= n, as columns, and squared singular values, largest first."""
    m = len(d)
    if m <= _SVD:
        u, s, _ = torch.linalg.svd(d, full_matrices=False)
        return u, s.square()
    basis = None
    if rank and m > _EXACT and 8 * rank < m:
        start = torch.randn(m, rank + _SPARE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        basis = torch.linalg.qr(start.to(d.device)).Q
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(d @ (d.T @ basis)).Q
    core = d if basis is None else basis.T @ d
    squares, vectors = torch.linalg.eigh(core @ core.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    return vectors if basis is None else basis @ vectors, squares
