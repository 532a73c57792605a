"""A bottleneck of whose projections only some numbers exist."""

from __future__ import annotations

from torch import Tensor, nn

from ._bits import Bits
from ._bottleneck import Bottleneck


class Projection(Bits):
    """A weight of which a mask keeps some numbers.

    values is the weight until the mask is chosen and [kept], in ascending order of position, from then on.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.values = weight
        self.keep_all((weight.shape[0], weight.shape[1]), weight.device)

    @property
    def chosen(self) -> bool:
        return self.values.dim() == 1

    def forward(self) -> Tensor:
        return self.dense(self.values)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.values.numel():,} kept"


class SparseBottleneck(Bottleneck):
    """A bottleneck, made of a dense one, that keeps some of its two weights."""

    def __init__(self, plain: Bottleneck):
        nn.Module.__init__(self)
        self.down, self.up = Projection(plain.down_weight), Projection(plain.up_weight)
        self.down_bias, self.up_bias = plain.down_bias, plain.up_bias
        self.activation, self.dropout = plain.activation, plain.dropout

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.down(), self.down_bias, self.up(), self.up_bias

    def flows(self) -> list[Tensor]:
        """SynFlow's scores of the two weights, before they are settled; -1 where the mask has them no more."""
        masks = self.down.mask, self.up.mask
        down, up = (w.values.detach().abs() * mask for w, mask in zip((self.down, self.up), masks, strict=True))
        flows = down * up.sum(0)[:, None], up * down.sum(1)
        return [flow.masked_fill(~mask, -1.0) for flow, mask in zip(flows, masks, strict=True)]

    def extra_repr(self) -> str:
        return self.activation
