"""A sparse change of a weight: trained numbers at fixed positions, in CSR, the weight itself untouched.

    y = x (W + D)^T + bias        D [out, in] is vals at the positions of the mask, zero elsewhere

The gradient of vals is taken at those positions alone (`pk.ops.sddmm`): no dense gradient of W exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..engine.method import Changes, Method, Tuner
from ..engine.site import Base, Site

_INT32 = 2**31  # positions below it fit


class SparseTuner(Tuner):
    """Trains `vals` at the positions that `set_mask` gives it; until then it is the identity.

    The file holds positions and vals. A flat position is one integer a number, where CSR adds one a row; crow and col,
    which the kernels read, follow from it and are made again when a file is read.
    """

    fresh = True
    positions: Tensor | None  # [nnz], flat in [out, in], ascending
    crow: Tensor | None  # [out + 1]
    col: Tensor | None  # [nnz]

    def __init__(self, cfg: Method, site: Site):
        super().__init__(cfg, site)
        self.shape = (site.n_out, site.n_in)
        self.vals = site.param(0)  # [nnz]
        self.register_buffer("positions", None)
        self.register_buffer("crow", None, persistent=False)
        self.register_buffer("col", None, persistent=False)

    # -- the mask -----------------------------------------------------------------------------------------------------

    def set_mask(self, positions: Tensor) -> None:
        """Chooses what is trained, from zero on.

        positions: int, flat in the weight [out, in], ascending, none twice; any device. ValueError if they are not, and
        nothing has changed then.
        """
        self._place(checked(positions, self.shape))
        self.vals = nn.Parameter(self.vals.new_zeros(len(positions)), self.vals.requires_grad)

    def clear_mask(self) -> None:
        """The identity again."""
        self.positions = self.crow = self.col = None
        self.vals = nn.Parameter(self.vals.new_zeros(0), self.vals.requires_grad)

    def _place(self, positions: Tensor) -> None:
        rows, columns = self.shape
        device = self.vals.device
        index = torch.int32 if rows * columns <= _INT32 else torch.int64
        narrow = torch.int32 if max(positions.numel(), columns) < _INT32 else torch.int64
        positions = positions.to(device, torch.int64)
        starts = torch.arange(rows + 1, device=device) * columns
        self.crow = torch.searchsorted(positions, starts).to(narrow)
        self.col = (positions % columns).to(narrow)
        self.positions = positions.to(index)

    def ready(self) -> str:
        if self.positions is not None:
            return ""
        name = type(self.cfg).__name__
        return f"{self.site_name}: {name} has no mask yet; call pk.calibrate(model, batches) first"

    def reshape(self, values: dict[str, Tensor]) -> None:
        positions, vals = values.get("positions"), values.get("vals")
        if positions is None or vals is None:
            return
        positions = checked(positions, self.shape)
        if vals.shape != positions.shape:
            raise ValueError(
                f"vals is {tuple(vals.shape)} for positions {tuple(positions.shape)}; expected one for each"
            )
        if self.vals.shape != vals.shape:
            self.vals = nn.Parameter(self.vals.new_zeros(len(vals)), self.vals.requires_grad)
        self._place(positions)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.reshape({key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- the function -------------------------------------------------------------------------------------------------

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.positions is None:
            return weight, bias
        dtype = torch.promote_types(weight.dtype, self.vals.dtype)
        flat = weight.to(dtype).reshape(-1).index_add(0, self.positions, self.vals.to(dtype))
        return flat.view(self.shape), bias

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.crow is None or self.col is None:
            y = base(x)
            return y if base.fresh else y.clone()
        if base.innermost:
            weight, bias = base.effective()
            return ops.sparse_linear(x, weight, self.vals, self.crow, self.col, bias=bias)
        add = ops.sparse_add_ if base.fresh else ops.sparse_add
        return add(base(x), x, self.vals, self.crow, self.col)

    def touched(self) -> Tensor | None:
        return self.vals.new_empty(0, dtype=torch.int64) if self.positions is None else self.positions.long()

    def changes(self) -> Changes:
        if self.crow is None or self.col is None:
            return Changes()
        nnz = len(self.col)
        if self.col.is_meta:
            return Changes(weight=nnz, rank=min(nnz, *self.shape))
        rows, columns = int(self.crow.diff().count_nonzero()), len(self.col.unique())
        return Changes(weight=nnz, rank=min(rows, columns))  # D is zero outside of these


def checked(positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """`positions`; ValueError unless they are whole numbers in [0, out * in), each larger than the one before."""
    if positions.dim() != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions is {positions.dtype} {tuple(positions.shape)}; expected integers [nnz]")
    if positions.is_meta or not len(positions):
        return positions
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= shape[0] * shape[1]:
        raise ValueError(
            f"positions go from {low} to {high}; expected 0 to {shape[0] * shape[1] - 1} of a {shape} weight"
        )
    if bool((positions[1:] <= positions[:-1]).any()):
        raise ValueError("positions do not ascend, or one comes twice; expected each larger than the one before")
    return positions
