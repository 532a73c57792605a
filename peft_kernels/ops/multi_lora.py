"""LoRA of many adapters in one batch, each row with its own. Chen et al. 2023, arXiv:2310.18547 (Punica).

    y_i = x_i W^T + bias + s_l (drop(x_i) A_l^T) Bt_l        l = ids[i]; where that is no adapter, nothing is added

The adapters lie back to back in a bank, a row for each rank, so that ranks mix without padding: adapter l has the rows
r_indptr[l] to r_indptr[l + 1] of a_flat [R, K] and bt_flat [R, N], B transposed. With g = dL/dy, over the rows of l:

    dt_i = s_l g_i Bt_l^T    dA_l = sum dt_i^T drop(x_i)    dBt_l = sum s_l t_i^T g_i    dx_i = g_i W + drop'(dt_i A_l)

dtypes and dropout are those of `lora_linear`. Nothing but x is kept: the backward computes t = drop(x) A^T again, whose
size would follow from numbers on the device. A NaN or Inf stays with its row and the adapter of that row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _philox
from ._op import Cost, Gradient, Op, Sample
from ._tensors import as_rows
from .lora import _wanted
from .lora_bank import FACTORS, Bank, checked

# -- references -------------------------------------------------------------------------------------------------------


def _pairs(r_indptr: Tensor, scaling: Tensor, ids: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """(bool [M, R]: whose rows' adapter a rank belongs to, scaling of each rank [R])."""
    owner = torch.searchsorted(r_indptr, torch.arange(ranks, dtype=r_indptr.dtype, device=ids.device), right=True) - 1
    return ids[:, None] == owner, scaling[owner]


def _product(left: Tensor, right: Tensor, owned: Tensor) -> Tensor:
    """left @ right over the owned pairs, outside of which left is 0 and right may be anything, NaN too."""
    finite = right.isfinite()
    poisoned = owned.to(left.dtype) @ (~finite).to(left.dtype) > 0
    return (left @ torch.where(finite, right, 0)).masked_fill(poisoned, torch.nan)


def _add_reference(y, x, a, bt, r_indptr, scaling, ids, plan, r_max, p, rng):
    dtype = torch.promote_types(x.dtype, a.dtype)
    owned, scales = _pairs(r_indptr, scaling, ids, len(a))
    t = F.linear(_philox.dropout(as_rows(x), p, rng).to(dtype), a.to(dtype))
    t = torch.where(owned, t * scales.to(dtype), 0)
    added = (as_rows(y) + _product(t, bt.to(dtype), owned)).to(y.dtype)
    return torch.where(owned.any(1, keepdim=True), added, as_rows(y)).view(y.shape)  # y + 0 would lose the sign of -0


def _linear_reference(x, w, bias, a, bt, r_indptr, scaling, ids, plan, r_max, p, rng):
    return _add_reference(F.linear(x, w, bias), x, a, bt, r_indptr, scaling, ids, plan, r_max, p, rng)


def _add_backward_reference(g, x, a, bt, r_indptr, scaling, ids, plan, r_max, p, rng, needs):
    dtype = torch.promote_types(g.dtype, a.dtype)
    owned, scales = _pairs(r_indptr, scaling, ids, len(a))
    dropped, g2, scales = _philox.dropout(as_rows(x), p, rng).to(dtype), as_rows(g).to(dtype), scales.to(dtype)
    dt = torch.where(owned, F.linear(g2, bt.to(dtype)) * scales, 0)  # [M, R]
    dx, da, dbt = x.new_empty(0), a.new_empty(0), bt.new_empty(0)
    if needs[0]:
        dx = _philox.dropout(_product(dt, a.to(dtype), owned), p, rng).view(x.shape).to(x.dtype)
    if needs[1]:
        da = _product(dt.T, dropped, owned.T).to(a.dtype)
    if needs[2]:
        t = torch.where(owned, F.linear(dropped, a.to(dtype)) * scales, 0)
        dbt = _product(t.T, g2, owned.T).to(bt.dtype)
    return dx, da, dbt


def _linear_backward_reference(g, x, w, a, bt, r_indptr, scaling, ids, plan, r_max, p, rng, needs):
    dx, da, dbt = _add_backward_reference(g, x, a, bt, r_indptr, scaling, ids, plan, r_max, p, rng, needs)
    return (g @ w + dx if needs[0] else dx), da, dbt


# -- test inputs and costs --------------------------------------------------------------------------------------------

# id: leading dims, K, N, ranks of the adapters, the ids that are drawn for the rows, p
_SHAPES = {
    "one_row": ((1,), 16, 8, (4,), (0,), 0.0),
    "odd": ((3, 5), 17, 13, (3, 2), (-1, 0, 1), 0.0),
    "mixed_ranks_dropout": ((33,), 100, 51, (0, 1, 3, 8, 24), (-1, 0, 1, 2, 3, 4), 0.25),
    "empty_adapters": ((9,), 24, 20, (2, 3, 4, 5, 6), (1, 3), 0.0),
    "no_adapters": ((4,), 8, 6, (), (-1,), 0.0),
    "all_base": ((2, 3), 8, 6, (2, 3), (-1,), 0.5),
    "no_rows": ((0,), 12, 10, (2, 1), (0,), 0.1),
    "decode": ((10,), 40, 24, (4,) * 12, tuple(range(12)), 0.0),
    "long_groups": ((110,), 60, 40, (5, 66, 2), (-1, 0, 1), 0.1),
    "transposed": ((6, 4), 20, 12, (4, 1), (0, 1), 0.0),
    "mixed": ((5, 3), 40, 24, (8, 0, 3), (-1, 0, 1, 2), 0.25),
}


def _layouts(dtype: torch.dtype, device: str) -> Iterator[tuple[str, dict, tuple]]:
    """(id, tensors by name, the arguments that are named in _BANK) over shapes, strides and mixed dtypes."""
    for name, (lead, k, n, ranks, drawn, p) in _SHAPES.items():
        low = torch.promote_types(dtype, torch.float32) if name == "mixed" else dtype
        made = torch.Generator().manual_seed(len(name))
        shapes = ((*lead, k), (n, k), (n,), (sum(ranks), k), (sum(ranks), n), (*lead, n))
        x, w, bias, a, bt, y = (torch.randn(s, generator=made, dtype=torch.float64).to(device, dtype) for s in shapes)
        w, a, bt = w * k**-0.5, (a * k**-0.5).to(low), bt.to(low)
        if name == "transposed":
            x, a, bt, y = x.transpose(0, 1), a.T.contiguous().T, bt.T.contiguous().T, y.transpose(0, 1)
        whole = torch.int64 if name == "odd" else torch.int32
        r_indptr = torch.tensor((0, *ranks), device=device).cumsum(0).to(whole)
        scaling = torch.linspace(-0.5, 2.0, len(ranks), device=device)
        ids = torch.tensor(drawn)[torch.randint(len(drawn), (math.prod(lead),), generator=made)].to(device, whole)
        rng = torch.tensor([2**40 + 7, -3], device=device) if p else None
        tensors = dict(x=x, w=w, bias=None if name == "odd" else bias, y=y, g=y)
        plan = lora_plan(ids, r_indptr, 16) if name in ("mixed", "long_groups") else None
        yield name, tensors, (a, bt, r_indptr, scaling, ids, plan, max(ranks, default=0), p, rng)


def _samples(*names: str, differentiable: tuple[int, ...] = (), wanted: tuple = ((),)) -> Callable:
    """Samples of an op whose arguments are these tensors, the bank, and for a backward which gradients are wanted."""

    def samples(dtype: torch.dtype, device: str) -> Iterator[Sample]:
        for name, tensors, bank in _layouts(dtype, device):
            for needs in wanted:
                args = (*(tensors[n] for n in names), *bank, *((needs,) if needs else ()))
                yield Sample(name + "".join(str(int(n)) for n in needs), args, differentiable)

    return samples


_WANTED = ((True, True, True), (False, True, False), (True, False, True))


def _cost(bank: tuple, passes: int, moved: tuple, w: Tensor | None = None) -> Cost:
    """`passes` products with each factor; of the bank, the adapters that have rows move, once forward and backward."""
    a, bt, r_indptr, _, ids = bank[:5]
    ranks, width = r_indptr.diff(), (a.numel() + bt.numel()) // max(len(bt), 1)  # k + n, or more where y has slices
    served = ids[(ids >= 0) & (ids < len(ranks))].long()
    pairs, used = int(ranks[served].sum()), int(ranks[served.unique()].sum())
    flops = 2 * pairs * width * passes + (0 if w is None else 2 * len(ids) * w.numel())
    held = sum(t.numel() * t.element_size() for t in (*moved, w, r_indptr, ids) if t is not None)
    return Cost(flops, held + used * width * a.element_size())


_BANK = f"{FACTORS}, float p, Tensor? rng"

_add_backward = Op(
    "multi_lora_add_backward",
    f"(Tensor g, Tensor x, {_BANK}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    family="lora",
    reference=_add_backward_reference,
    samples=_samples("g", "x", wanted=_WANTED),
    cost=lambda g, x, *bank: _cost(bank, 3, (g, g, x, x, x)),
)

_linear_backward = Op(
    "multi_lora_linear_backward",
    f"(Tensor g, Tensor x, Tensor w, {_BANK}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    family="lora",
    reference=_linear_backward_reference,
    samples=_samples("g", "x", "w", wanted=_WANTED[1:]),  # all of them: the gradient law of the op
    cost=lambda g, x, w, *bank: _cost(bank, 3, (g, g, x, x, x), w),
)


def _frozen(needs: tuple) -> None:
    if any(needs):
        raise RuntimeError("multi_lora_linear: w, bias and scaling are frozen; differentiate in x, a_flat and bt_flat")


def _add_gradient(tensors, constants, grads, needs):
    _frozen(needs[5:6])
    if not any(needs[1:4]):
        return grads[0], *(None,) * 10
    out = _add_backward(grads[0], *tensors[:-1], *constants, tensors[-1], needs[1:4])
    return grads[0], *_wanted(out, needs[1:4]), *(None,) * 7


def _linear_gradient(tensors, constants, grads, needs):
    _frozen((*needs[1:3], needs[6]))
    wanted = (needs[0], *needs[3:5])
    out = _linear_backward(grads[0], *tensors[:-1], *constants, tensors[-1], wanted)
    dx, da, dbt = _wanted(out, wanted)
    return dx, None, None, da, dbt, *(None,) * 7


_add = Op(
    "multi_lora_add",
    f"(Tensor y, Tensor x, {_BANK}) -> Tensor",
    family="lora",
    reference=_add_reference,
    samples=_samples("y", "x", differentiable=(0, 1, 2, 3)),
    cost=lambda y, x, *bank: _cost(bank, 1, (y, y, x)),
    gradient=Gradient(lambda args, out: ((*args[1:8], args[10]), args[8:10]), _add_gradient),
    autocast=(0, 1),
)

_linear = Op(
    "multi_lora_linear",
    f"(Tensor x, Tensor w, Tensor? bias, {_BANK}) -> Tensor",
    family="lora",
    reference=_linear_reference,
    samples=_samples("x", "w", "bias", differentiable=(0, 3, 4)),
    cost=lambda x, w, bias, *bank: _cost(bank, 1, (x, bias, F.linear(x.to("meta"), w.to("meta"))), w),
    gradient=Gradient(lambda args, out: ((*args[:2], *args[3:9], args[11]), args[9:11]), _linear_gradient),
    autocast=(0, 1, 2),
)

# -- the public calls -------------------------------------------------------------------------------------------------


def lora_plan(ids: Tensor, r_indptr: Tensor, block_m: int = 64) -> Tensor:
    """The rows of a batch in tiles of one adapter each, as GPU kernels take them; one plan serves all layers of a step.

    ids int [M]   r_indptr int [L + 1]. int32 [T, 1 + block_m] on the device of ids, T = ceil(M / block_m) + min(L, M):
    column 0 is the adapter of the tile, L where it is unused, and rises; the others are its rows in rising order, -1
    where there are none. Adapters of rank 0 and rows without an adapter get no tiles. Made without waiting for the
    device, of sizes that follow from shapes alone. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    from ..kernels.lora.plan import plan

    for name, t in (("ids", ids), ("r_indptr", r_indptr)):
        if t.dim() != 1 or t.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"lora_plan: {name} is {t.dtype} {tuple(t.shape)}; expected int32 or int64 of one dimension"
            )
    if block_m < 1 or not len(r_indptr) or ids.device != r_indptr.device:
        raise ValueError(
            f"lora_plan: block_m is {block_m}, r_indptr {tuple(r_indptr.shape)} on {r_indptr.device}, ids on "
            f"{ids.device}; expected at least 1, [L + 1] and one device"
        )
    return plan(ids, r_indptr, block_m)


def multi_lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a_flat: Bank,
    bt_flat: Bank,
    r_indptr: Tensor,
    scaling: Tensor,
    ids: Tensor,
    *,
    p: float | None = None,
    rng: Tensor | None = None,
    plan: Tensor | None = None,
    r_max: int | None = None,
) -> Tensor:
    """x w^T + bias + scaling[l] * (drop(x) A_l^T) Bt_l for every row, with l = ids[row].

    x [..., in], whose rows are numbered in order   w [out, in]   bias [out] or None
    a_flat [R, in], bt_flat [R, out]: the bank, or lists of a [r, in] and b [out, r], which are put together
        differentiably at every call; dtypes equal, and x's dtype or wider.
    r_indptr int [L + 1]: the bank's rows of adapter l are r_indptr[l] to r_indptr[l + 1], none where they are equal
    scaling float [L]   ids int [rows], or one for each index of x's leading dim; a number that is no adapter's, such as
        -1, leaves the row bit-identical to F.linear, and so does rank 0.
    p, rng: as in `lora_linear`, one p for all.   plan: of lora_plan for the same ids, one for each row; GPU kernels
        make one at every call that brings none, the CPU sorts rows by itself.
    r_max: an upper bound of the rank of one adapter, the width of a GPU's workspace; without it that of the listed
        factors, or all R ranks of the bank.
    Differentiable in x and the bank; trainable w or bias are served by F.linear and multi_lora's sum. Never waits for
    the device. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    args = checked("multi_lora_linear", x, len(w), a_flat, bt_flat, r_indptr, scaling, ids, p, rng, plan, r_max)
    if w.shape[1:] != x.shape[-1:]:
        raise ValueError(f"multi_lora_linear: w is {tuple(w.shape)}; expected [out, {x.shape[-1]}] from x")
    if torch.is_grad_enabled() and (w.requires_grad or (bias is not None and bias.requires_grad)):
        return _add.call_(F.linear(x, w, bias), x, *args)
    return _linear(x, w, bias, *args)


def multi_lora_add(
    y: Tensor,
    x: Tensor,
    a_flat: Bank,
    bt_flat: Bank,
    r_indptr: Tensor,
    scaling: Tensor,
    ids: Tensor,
    *,
    p: float | None = None,
    rng: Tensor | None = None,
    plan: Tensor | None = None,
    r_max: int | None = None,
) -> Tensor:
    """y + scaling[l] * (drop(x) A_l^T) Bt_l for every row, a new tensor; arguments as in `multi_lora_linear`.

    y [..., out], any floating dtype and kept; differentiable in it too.
    """
    return _add(y, x, *_add_args("multi_lora_add", y, x, a_flat, bt_flat, r_indptr, scaling, ids, p, rng, plan, r_max))


def _add_args(op, y, x, *rest) -> tuple:
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{op}: y is {tuple(y.shape)} and x {tuple(x.shape)}; their leading dims must be the same")
    return checked(op, x, y.shape[-1], *rest)
