"""Probes: what the frozen features give without tuning, the figure that a tuned model has to beat."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import hf
from .batches import Batches, stacked


def features(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """(L2-normalised mean of the last hidden states [n, width], labels [n])."""
    body = hf.backbone(model)

    def pooled(batch: dict[str, Tensor]) -> Tensor:
        del batch["labels"]
        hidden = body(**batch).last_hidden_state  # [rows, t, d]
        mask = batch["attention_mask"].unsqueeze(-1)  # [rows, t, 1]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    return stacked(model, batches, pooled), torch.tensor([example["labels"] for example in batches.examples])


def linear_probe(train: tuple[Tensor, Tensor], test: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """(classes predicted for the features `test`, facts) by `logistic`."""
    model, facts = logistic(train, seed)
    return torch.from_numpy(model.predict(test.numpy())), facts


def logistic(train: tuple[Tensor, Tensor], seed: int = 0, bias: bool = True) -> tuple[Any, dict[str, Any]]:
    """(a converged logistic regression on (features, classes), facts).

    C is chosen on a tenth of the training rows, never on the test rows.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    x, y = (t.numpy() for t in train)
    order = random.Random(seed).sample(range(len(y)), len(y))
    order.sort(key=y.__getitem__)  # by class: every tenth is then a tenth of each class
    chosen, rest = order[5::10], [i for n, i in enumerate(order) if n % 10 != 5]
    # Each fit starts from the one before, which is several times faster and ends at the same place: the loss is convex.
    best, limit = 1.0, 2000
    model = LogisticRegression(max_iter=limit, tol=1e-6, warm_start=True, fit_intercept=bias)
    with warnings.catch_warnings(), threadpool_limits(1):  # these matrices are too small to share out
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as "converged" instead
        if chosen and len(set(y[rest])) > 1:
            scores = {}
            for c in (0.3, 1.0, 3.0, 10.0, 30.0):
                scores[c] = model.set_params(C=c).fit(x[rest], y[rest]).score(x[chosen], y[chosen])
            best = max(scores, key=scores.__getitem__)
        model.set_params(C=best, warm_start=False).fit(x, y)
    return model, {"C": best, "converged": bool(model.n_iter_.max() < limit)}


def ridge_probe(train: tuple[Tensor, Tensor], test: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """(numbers predicted for the features `test`, facts) by `ridge`."""
    model, facts = ridge(train)
    return torch.from_numpy(model.predict(test.double().numpy())), facts


def ridge(train: tuple[Tensor, Tensor], bias: bool = True) -> tuple[Any, dict[str, Any]]:
    """(a ridge regression on (features, numbers), facts).   alpha is chosen by leaving one training row out."""
    from sklearn.linear_model import RidgeCV
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        alphas = (0.01, 0.1, 1.0, 10.0, 100.0)
        model = RidgeCV(alphas=alphas, fit_intercept=bias).fit(*(t.double().numpy() for t in train))
    return model, {"alpha": float(model.alpha_)}


def solve(model: nn.Module, layer: nn.Linear, batches: Batches, regression: Callable[..., Any]) -> None:
    """Fills the linear layer that makes a model's scores, by a regression on what goes into it: no backward pass.

    regression((features [n, width], labels [n]), bias=whether there is one) -> (a model of scikit-learn's, facts)
    """
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))

    def entering(batch: dict[str, Tensor]) -> Tensor:
        del batch["labels"]
        scores = model(**batch).logits
        x, y = seen.pop()
        if x.dim() == 2:
            return x
        row = (y == scores[:, None]).all(-1).int().argmax(1)  # of each text, the token whose score counts
        return x[torch.arange(len(x), device=x.device), row]

    try:
        x = stacked(model, batches, entering)
    finally:
        handle.remove()
    wanted = torch.tensor([example["labels"] for example in batches.examples])
    found, _ = regression((x, wanted), bias=layer.bias is not None)
    weight = torch.from_numpy(found.coef_).reshape(-1, layer.in_features)
    bias = torch.as_tensor(found.intercept_).reshape(-1)
    if len(weight) < layer.out_features:  # two classes have one score
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
