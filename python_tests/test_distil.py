"""Distillation: its losses, and teachers in a training."""

import math

import pytest
import torch
from models import make

from peft_kernels.engine.losses import counted, distillation, symmetric_kl

FLAT, TILTED = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])

# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, expected", [(1.0, 0.130812), (2.0, 0.145363)])
def test_distillation_value(temperature, expected):
    assert distillation(FLAT, TILTED, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_symmetric_value():
    assert symmetric_kl(FLAT, TILTED).item() == pytest.approx(0.1373265, abs=1e-6)
    assert torch.equal(symmetric_kl(TILTED, FLAT), symmetric_kl(FLAT, TILTED))
    p = torch.tensor([0.25, 0.75])
    assert symmetric_kl(FLAT, TILTED).item() == pytest.approx(((0.5 - p) * (0.5 / p).log()).sum().item() / 2, abs=1e-6)


@pytest.mark.parametrize("loss", [lambda s, t, m=None: distillation(s, t, 3.0, m), symmetric_kl])
def test_rows_and_masks(loss):
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    rows = torch.stack([loss(a, b) for a, b in zip(s.flatten(0, 1), t.flatten(0, 1), strict=True)]).view(2, 3)
    torch.testing.assert_close(loss(s, t), rows.mean())
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    torch.testing.assert_close(loss(s, t, mask), rows[mask.bool()].mean())
    s[0, 1], t[1, 0] = math.nan, math.inf  # of rows that do not count
    s.requires_grad_()
    found = loss(s, t, mask)
    found.backward()
    torch.testing.assert_close(found, rows[mask.bool()].mean())
    assert s.grad.isfinite().all() and not s.grad[~mask.bool()].any()


@pytest.mark.parametrize("loss", [distillation, symmetric_kl])
def test_no_rows_are_no_loss(loss):
    s = torch.randn(2, 3, requires_grad=True)
    found = loss(s, torch.randn(2, 3), mask=torch.zeros(2, dtype=torch.bool))
    found.backward()
    assert found.item() == 0 and not s.grad.any()


def test_gradients():
    torch.manual_seed(0)
    s, t = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    distillation(s, t, 2.0).backward()
    torch.testing.assert_close(s.grad, 2 * ((s / 2).softmax(-1) - (t / 2).softmax(-1)).detach() / 4)
    assert t.grad is None
    s.grad = None
    symmetric_kl(s, t).backward()
    apart = (s.softmax(-1) - t.softmax(-1)).detach() / 8
    torch.testing.assert_close(s.grad, apart)
    torch.testing.assert_close(t.grad, -apart)


@pytest.mark.parametrize("loss", [lambda s, t: distillation(s, t, 3.0), symmetric_kl])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_fp32(loss, dtype):
    torch.manual_seed(0)
    s, t = torch.randn(64, 100, dtype=dtype), torch.randn(64, 100, dtype=dtype)
    assert loss(s, t).dtype == torch.float32
    torch.testing.assert_close(loss(s, t), loss(s.float(), t.float()), rtol=1e-6, atol=0)


def test_classes_ruled_out_count_nothing():
    """Logits of -inf, as generation masks give them, in both."""
    s = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    found = distillation(s, torch.tensor([[0.0, math.log(3), -math.inf]]), 1.0)
    found.backward()
    assert found.item() == pytest.approx(0.130812, abs=1e-6) and s.grad.isfinite().all()


def test_losses_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"logits \(1, 2\) and \(1, 3\); expected the same shape"):
        distillation(FLAT, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"mask \(2,\) for logits \(1, 2\); expected \(1,\)"):
        symmetric_kl(FLAT, TILTED, torch.ones(2))
    with pytest.raises(ValueError, match="temperature = 0"):
        distillation(FLAT, TILTED, 0.0)


# -- which rows count -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "bert", "tokens"])
def test_the_rows_that_count_are_those_of_the_models_own_loss(name):
    model = tagger() if name == "tokens" else make(name).model
    ids, labels = torch.randint(3, 50, (3, 4)), torch.tensor([[-100, 1, 2, -100], [-100, -100, 0, 2], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "labels": labels[:, 1] if name == "bert" else labels}
    outputs = model(**batch)
    outputs.logits.retain_grad()
    outputs.loss.backward()
    assert torch.equal(counted(model, batch, outputs.logits), outputs.logits.grad.any(-1))


def tagger():
    from transformers import BertConfig, BertForTokenClassification

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return BertForTokenClassification(BertConfig(vocab_size=50, **sizes, num_labels=3)).eval()


def test_rows_without_labels_count_by_the_attention_mask():
    padded = {"attention_mask": torch.tensor([[1, 1, 1, 0]]), "input_ids": torch.ones(1, 4)}
    assert counted(make("gpt2").model, padded, torch.zeros(1, 4, 9)).tolist() == [[True, True, True, False]]
    bert = make("bert").model
    assert counted(bert, padded, torch.zeros(1, 3)) is None
    assert counted(bert, {"labels": torch.randn(1, 3)}, torch.zeros(1, 3)) is None, "numbers, not classes"
    assert counted(make("mlp").model, (torch.zeros(2, 12), torch.tensor([1, -100])), torch.zeros(2, 3)).sum() == 1
