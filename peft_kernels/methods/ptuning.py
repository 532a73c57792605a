"""P-tuning: a prompt that a small network makes of trained embeddings E, one for each of its tokens.

    lstm    P = W1 relu(W0 LSTM(E) + b0) + b1              E [l, d], LSTM(E) [l, 2 m], W0 [2 m, 2 m], W1 [d, 2 m]
    mlp     P = W2 relu(W1 relu(W0 E + b0) + b1) + b2      W0 [m, d], W1 [m, m], W2 [d, m]

The LSTM reads the tokens in both directions, so they depend on one another. The parametrisation, and the names of the
tensors, are those of PromptEncoder in Hugging Face PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..engine.site import Site
from ._phm import normal
from ._prompt import Prompt, PromptTuner

_TINY = {"length": 3, "hidden": 4}


@dataclass(frozen=True)
class PTuning(Prompt, roles=("backbone",), lr=1e-3, tiny=_TINY, kinds=("module",), family="additive"):
    """A prompt made by an LSTM or an MLP. Liu et al. 2021, arXiv:2103.10385.

    Once trained, the network has done its work: `pk.eject(model)` leaves the rows that it makes. Outputs in eval mode
    stay bit-equal, but under autocast, where the network ran in 16 bits.
    """

    length: int = 20  # tokens of the prompt
    encoder: str = "lstm"  # the authors'; or "mlp"; "none": the rows alone, as pk.eject leaves them
    hidden: int = 0  # m; 0: as wide as an embedding, of the lstm both directions together
    layers: int = 2  # of the lstm
    dropout: float = 0.0  # between the layers of the lstm

    def __post_init__(self):
        super().__post_init__()
        if self.encoder not in ("lstm", "mlp", "none"):
            raise ValueError(f"PTuning encoder = {self.encoder!r}; expected 'lstm', 'mlp' or 'none'")
        if self.length < 1 or self.hidden < 0 or self.layers < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"PTuning length = {self.length}, hidden = {self.hidden}, layers = {self.layers}, dropout = "
                f"{self.dropout}; expected at least 1, 0 and 1, and a probability below 1"
            )

    def ejected(self) -> PTuning:
        return replace(self, encoder="none")


class LSTM(nn.Module):
    """A bidirectional LSTM of [l, d] -> [l, 2 m]; nn.LSTM's tensors, without what stops torch.compile."""

    def __init__(self, site: Site, n_in: int, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.hidden, self.layers, self.dropout = hidden, layers, dropout
        bound = 1 / math.sqrt(hidden)
        for layer in range(layers):
            for end in ("", "_reverse"):
                shapes = {
                    "weight_ih": (4 * hidden, n_in if not layer else 2 * hidden),
                    "weight_hh": (4 * hidden, hidden),
                }
                for name, shape in {**shapes, "bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)}.items():
                    p = site.param(*shape, init=lambda t, generator: t.uniform_(-bound, bound, generator=generator))
                    self.register_parameter(f"{name}_l{layer}{end}", p)

    def forward(self, x: Tensor) -> Tensor:
        settings = (True, self.layers, self.dropout, self.training, True, True)  # bias, .., bidirectional, batch first
        # With and without grad mode torch rounds differently.
        with torch.inference_mode(False), torch.enable_grad():
            start = x.new_zeros(2 * self.layers, 1, self.hidden)
            y = torch.lstm(x[None], (start, start), list(self.parameters()), *settings)[0][0]
        return y if torch.is_grad_enabled() else y.detach()


class PTuningTuner(PromptTuner, method=PTuning):
    """The encoder, with the names of PEFT; ejected, the rows alone."""

    lstm_head: LSTM | None
    mlp_head: nn.Sequential
    rows: nn.Parameter

    def __init__(self, cfg: PTuning, site: Site):
        super().__init__(cfg, site)
        if cfg.encoder == "none":
            self.rows = site.param(cfg.length, self.width, init=normal(1.0))
            return
        both = cfg.encoder == "lstm"
        d, m = self.width, cfg.hidden or (-(-self.width // 2) if both else self.width)
        self.embedding = nn.Embedding(cfg.length, d, device="meta")
        self.embedding.weight = site.param(cfg.length, d, init=normal(1.0))
        self.lstm_head = LSTM(site, d, m, cfg.layers, cfg.dropout) if both else None
        widths = (2 * m, 2 * m, d) if both else (d, m, m, d)
        made = [_linear(site, *pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
        self.mlp_head = nn.Sequential(*(part for one in made[:-1] for part in (one, nn.ReLU())), made[-1])

    def prompt(self) -> Tensor:
        if "rows" in self._parameters:
            return self.rows
        x = self.embedding.weight
        return self.mlp_head(x if self.lstm_head is None else self.lstm_head(x))

    def ejected(self) -> dict[str, Tensor]:
        if "rows" in self._parameters:
            return {}
        training = self.training
        rows = self.eval().prompt()
        self.train(training)
        return {"rows": rows}


def _linear(site: Site, n_in: int, n_out: int) -> nn.Linear:
    """A trainable linear layer, weight and bias uniform within 1/sqrt(n_in)."""
    made, bound = nn.Linear(n_in, n_out, device="meta"), 1 / math.sqrt(n_in)
    made.weight = site.param(n_out, n_in, init="kaiming")
    made.bias = site.param(n_out, init=lambda t, generator: t.uniform_(-bound, bound, generator=generator))
    return made
