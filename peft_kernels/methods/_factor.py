"""Factors of a weight: what KronA starts from and SVD trains."""

from ..engine.factor import nearest_kronecker, truncated_svd

__all__ = ["nearest_kronecker", "truncated_svd"]
