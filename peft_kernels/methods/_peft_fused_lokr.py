"""LoKr layers of Hugging Face PEFT on our kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ._peft_fused import Fused, plain, wide


class FusedLoKr(Fused):
    def fused(self, x: Tensor, **kwargs: Any) -> Tensor | None:
        module, names = self.module, self.running()
        if kwargs or not names or module.training and any(map(self.dropped, names)):
            return None
        pairs = [(self.left(name), self.right(name), module.scaling[name]) for name in names]
        if not all(wide(left, x) and left.dtype == right.dtype for left, right, _ in pairs):
            return None
        y = module.base_layer(x)
        for number, (left, right, scale) in enumerate(pairs):
            if number or plain(module.base_layer):  # nobody else holds y
                y = ops.kron_linear_(y, x, left.T, right.T, scale=scale)
            else:
                y = ops.kron_linear(x, left.T, right.T, acc=y, scale=scale)
        return y.to(x.dtype)

    def running(self) -> list[str]:
        return [name for name in self.module.active_adapters if name in self.module._available_adapters]

    def dropped(self, name: str) -> bool:
        return bool(self.module.rank_dropout[name] or self.module.module_dropout[name])

    def unfit(self) -> str:
        name = next(filter(self.dropped, self.running()), None)
        return "" if name is None else f"{name!r} has rank_dropout or module_dropout, and is fused in eval mode alone"

    def left(self, name: str) -> Tensor:
        module = self.module
        return module.lokr_w1[name] if name in module.lokr_w1 else _times(module.lokr_w1_a, module.lokr_w1_b, name)

    def right(self, name: str) -> Tensor:
        module = self.module
        return module.lokr_w2[name] if name in module.lokr_w2 else _times(module.lokr_w2_a, module.lokr_w2_b, name)


def _times(a: Any, b: Any, name: str) -> Tensor:
    return (a[name] @ b[name]).to(a[name].dtype)  # autocast makes less
