"""Linear layers whose weight is a sum of Kronecker products (PHM), as modules of their own and inside adapters.

    y = x W + b     W = sum over i of A_i kron B_i     A [n, n, n]   B [n, in / n, out / n]      x [..., in]
    low-rank        B_i = u_i v_i                      u [n, in / n, r]   v [n, r, out / n]

The low-rank sum is W = P Q with P [in, n n r] = [A_i kron u_i] and Q [n n r, out] = I_n kron v: two thin products,
which take fewer operations than x W as long as n n r (in + out) < in out. Elsewhere W is built once per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

Init = Callable[[Tensor, torch.Generator], object]
Make = Callable[..., nn.Parameter]  # (*shape, init="zeros" or an Init), as Site.param


def normal(std: float) -> Init:
    """N(0, std^2)"""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def _glorot(tensor: Tensor, generator: torch.Generator) -> None:
    """Xavier's uniform distribution with gain sqrt(2), of each matrix of the stack."""
    bound = math.sqrt(2) * math.sqrt(6 / (tensor.shape[-2] + tensor.shape[-1]))
    tensor.uniform_(-bound, bound, generator=generator)


def check_division(what: str, n: int, otherwise: str = "", **sizes: int) -> None:
    """ValueError unless n divides every size; it names the largest number below n that does."""
    if n < 1 or any(size % n for size in sizes.values()):
        fits = max(d for d in range(1, max(n, 1) + 1) if not any(size % d for size in sizes.values()))
        given = " and ".join(f"{name} = {size}" for name, size in sizes.items())
        raise ValueError(f"{what} n = {n} does not divide {given}; choose one that does, such as n = {fits}{otherwise}")


class PHM(nn.Module):
    """A PHM layer whose A is given to each call, so that several layers share one."""

    def __init__(self, in_features: int, out_features: int, n: int, rank: int, bias: bool, make: Make):
        super().__init__()
        check_division(type(self).__name__, n, in_features=in_features, out_features=out_features)
        if rank < 0:
            raise ValueError(f"{type(self).__name__} rank = {rank}; expected at least 1, or 0 for B of full rank")
        self.in_features, self.out_features, self.n, self.rank = in_features, out_features, n, rank
        rows, columns = in_features // n, out_features // n
        if rank:
            self.u = make(n, rows, rank, init=_glorot)
            self.v = make(n, rank, columns, init=_glorot)
        else:
            self.b = make(n, rows, columns, init=_glorot)
        self.bias = make(out_features) if bias else None
        # Operations of the two thin products over those of x W.
        self.thinness = n * n * rank * (1 / in_features + 1 / out_features) if rank else float("inf")

    def weight(self, a: Tensor) -> Tensor:
        """W transposed, as linear layers keep it: [out, in], of a [n, n, n] on the same device."""
        b = self.u @ self.v if self.rank else self.b
        return ops.kron_sum_weight(a.to(b.dtype).transpose(1, 2), b.transpose(1, 2))

    def call(self, x: Tensor, a: Tensor) -> Tensor:
        """x [..., in], a [n, n, n] on x's device -> [..., out] in x's dtype."""
        bias, n = None if self.bias is None else self.bias.to(x.dtype), self.n
        if self.thinness >= 1:
            return F.linear(x, self.weight(a).to(x.dtype), bias)
        # P[(p, e), (q, i, r)] = A_i[p, q] u_i[e, r]
        p = a.permute(1, 2, 0)[:, None, :, :, None] * self.u.transpose(0, 1)[None, :, None]
        q = torch.block_diag(*[self.v.reshape(n * self.rank, -1)] * n)
        return F.linear(x @ p.reshape(self.in_features, n * n * self.rank).to(x.dtype), q.to(x.dtype).T, bias)

    def extra_repr(self) -> str:
        rank = f", rank={self.rank}" if self.rank else ""
        return f"{self.in_features}, {self.out_features}, n={self.n}{rank}, bias={self.bias is not None}"


class PHMLinear(PHM):
    """y = x W + b with W = sum over i of A_i kron B_i, about 1 / n of a linear layer's numbers. arXiv:2102.08597.

    It maps [..., in] to [..., out]. The parameters are a [n, n, n], bias [out] and b [n, in / n, out / n]; of low
    rank, u [n, in / n, rank] and v [n, rank, out / n] take the place of b with B_i = u_i v_i.

    n: how many products; it divides both sizes (ValueError).
    rank: of each B_i; 0 is B itself, as in Zhang et al. 2021. Low rank is Mahabadi et al. 2021, arXiv:2106.04647.
    a: a parameter that several layers share; None makes one, normal with standard deviation `std`.
    std: None is 1 / n, with which W (rank = 0) has the variance of Xavier's initialisation with gain sqrt(2); 1e-4 is
        Compacter's. B, or u and v, are Xavier uniform with gain sqrt(2), the bias is zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int = 4,
        rank: int = 0,
        *,
        a: nn.Parameter | None = None,
        std: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        seed = int(torch.randint(2**62, (), device="cpu"))  # so that torch.manual_seed decides the values
        generator, like = torch.Generator().manual_seed(seed), torch.empty(0, device=device, dtype=dtype)

        def make(*shape: int, init: Init | None = None) -> nn.Parameter:
            value = torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device="cpu")
            if init is not None:
                init(value, generator)
            return nn.Parameter(value.to(like))

        super().__init__(in_features, out_features, n, rank, bias, make)
        if a is not None and a.shape != (n, n, n):
            raise ValueError(f"PHMLinear a is {tuple(a.shape)}; expected {(n, n, n)} for n = {n}")
        self.a = make(n, n, n, init=normal(1 / n if std is None else std)) if a is None else a

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.a)
