"""The tasks of tune: every figure against another way to compute it, text by text and without padding."""

import math

import pytest
import torch
from texts import SPECIAL, bart, bert, gpt2, numbers, t5, toy, tune, write

import peft_kernels as pk
from peft_kernels import hf, report, tasks
from peft_kernels.data import Columns, read_data

for module in ("transformers", "sklearn", "scipy", "sacrebleu", "matplotlib", "tqdm"):
    pytest.importorskip(module)
pytestmark = pytest.mark.usefixtures("undrawn")


def tuned_model(kind, source, out, **settings):
    """(model, tokenizer) with the adapter of a run."""
    model, tokenizer = hf.load_for(kind, str(source), **settings)
    return pk.load(model, out).eval(), tokenizer


def ids_of(tokenizer, text):
    return torch.tensor([tokenizer(text)["input_ids"]])


def test_every_task_is_offered():
    assert set(tasks.tasks()) == {"classify", "regress", "lm", "seq2seq"}


# -- classify ---------------------------------------------------------------------------------------------------------


def test_accuracy_and_f1_of_each_class(capsys, tmp_path):
    source, data = bert(tmp_path / "model"), write(tmp_path / "d.tsv", toy(100))
    summary = tune(capsys, source, data, tmp_path / "out")
    model, tokenizer = tuned_model("SequenceClassification", source, tmp_path / "out", num_labels=2)
    rows = read_data(str(data)).test
    found = [["animal", "food"][model(ids_of(tokenizer, text)).logits.argmax().item()] for text, _ in rows]
    wanted = [label for _, label in rows]
    assert summary["test"]["accuracy"] == sum(a == b for a, b in zip(found, wanted, strict=True)) / len(rows)
    f1 = []
    for label in set(found) | set(wanted):
        hits = sum(a == b == label for a, b in zip(found, wanted, strict=True))
        f1.append(2 * hits / (found.count(label) + wanted.count(label)))
    assert summary["test"]["macro_f1"] == pytest.approx(sum(f1) / len(f1))


def test_macro_f1_by_hand(tmp_path):
    task = tasks.Classify(read_data(str(write(tmp_path / "d.tsv", toy(40)))))
    figures = task.agreement(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
    assert figures == {"accuracy": 0.75, "macro_f1": pytest.approx((4 / 5 + 2 / 3) / 2)}


# -- regress ----------------------------------------------------------------------------------------------------------


def test_regression_correlates(capsys, tmp_path):
    source, data = bert(tmp_path / "model"), write(tmp_path / "d.tsv", numbers(120))
    words = ("--task", "regress", "--epochs", 8, "--lr", 1e-2, "--model-dropout", 0)
    summary = tune(capsys, source, data, tmp_path / "out", *words)
    model, tokenizer = tuned_model("SequenceClassification", source, tmp_path / "out", num_labels=1)
    rows = read_data(str(data), parse=float, by_label=False).test
    found = torch.tensor([model(ids_of(tokenizer, text)).logits.item() for text, _ in rows], dtype=torch.double)
    wanted = torch.tensor([label for _, label in rows], dtype=torch.double)

    def ranks(x):  # of equals: their mean
        return (x > x[:, None]).double().sum(0) + ((x == x[:, None]).double().sum(0) - 1) / 2

    test = summary["test"]
    assert test["pearson"] == pytest.approx(torch.corrcoef(torch.stack((found, wanted)))[0, 1].item(), abs=1e-5)
    assert test["spearman"] == pytest.approx(
        torch.corrcoef(torch.stack((ranks(found), ranks(wanted))))[0, 1].item(), abs=1e-5
    )
    assert test["loss"] == pytest.approx((found - wanted).square().mean().item(), rel=1e-4)
    assert test["pearson"] > 0.8 and summary["baseline"]["pearson"] > 0.5
    table = report.table(summary)
    assert "Pearson, ridge probe" in table and "Spearman, tuned" in table and "alpha = " in table


def test_one_prediction_for_all_texts_correlates_with_nothing(tmp_path):
    task = tasks.Regress(read_data(str(write(tmp_path / "d.tsv", numbers(40))), parse=float, by_label=False))
    assert task.agreement(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("text", ["animal", "nan", "inf", ""])
def test_labels_that_are_no_numbers(text):
    with pytest.raises(ValueError, match="no finite number"):
        tasks.Regress.parse(text)


# -- lm ---------------------------------------------------------------------------------------------------------------


def nll(model, tokenizer, text):
    """(summed, tokens) of one text alone, in double precision."""
    ids = ids_of(tokenizer, text)
    scores = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return -sum(scores[i, token].item() for i, token in enumerate(ids[0, 1:])), ids.shape[1] - 1


def perplexity(model, tokenizer, texts):
    losses, counts = zip(*(nll(model, tokenizer, text) for text in texts), strict=True)
    return math.exp(sum(losses) / sum(counts))


@pytest.mark.parametrize("special", [{}, SPECIAL], ids=["padded with the end token", "padding token"])
def test_perplexity_is_per_token(capsys, tmp_path, special):
    source = gpt2(tmp_path / "model", **special)
    data, more = write(tmp_path / "d.tsv", toy(100)), write(tmp_path / "more.tsv", toy(15, seed=7))
    words = ("--task", "lm", "--eval-data", f"more={more}", "--lr", 1e-2)
    summary = tune(capsys, source, data, tmp_path / "out", *words)
    columns = Columns(label=None)
    held_out = [text for text, _ in read_data(str(data), columns, by_label=False).test]
    other = [text for text, _ in toy(15, seed=7)]
    model, tokenizer = hf.load_for("CausalLM", str(source))
    model.eval()
    assert summary["baseline"]["perplexity"] == pytest.approx(perplexity(model, tokenizer, held_out), rel=1e-4)
    before, after = (summary["eval_data"]["more"][when]["perplexity"] for when in ("before", "after"))
    assert before == pytest.approx(perplexity(model, tokenizer, other), rel=1e-4)
    pk.load(model, tmp_path / "out")
    assert summary["test"]["perplexity"] == pytest.approx(perplexity(model, tokenizer, held_out), rel=1e-4)
    assert after == pytest.approx(perplexity(model, tokenizer, other), rel=1e-4)
    assert summary["test"]["perplexity"] < summary["baseline"]["perplexity"]
    assert summary["settings"]["train"] == [] and summary["merge"]["merged"]
    assert "perplexity, before tuning" in report.table(summary)


def test_token_losses_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3.0)]], [[0.0, 0.0], [5.0, 5.0]]])
    wanted = torch.tensor([[0, 1], [1, -100]])
    expected = torch.tensor([[math.log(2) + math.log(4 / 3), 2.0], [math.log(2), 1.0]])
    found = tasks.token_losses(logits, wanted)
    torch.testing.assert_close(found, expected)
    assert tasks.token_mean(found) == pytest.approx((2 * math.log(2) + math.log(4 / 3)) / 3)


# -- seq2seq ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [t5, bart])
def test_written_texts_are_compared_with_the_targets(capsys, tmp_path, make):
    from sacrebleu import corpus_chrf

    source, data = make(tmp_path / "model"), write(tmp_path / "d.tsv", toy(60))
    words = ("--task", "seq2seq", "--method", "full", "--epochs", 6, "--lr", 1e-2)
    summary = tune(capsys, source, data, tmp_path / "out", *words)
    model, tokenizer = tuned_model("Seq2SeqLM", source, tmp_path / "out")
    rows = read_data(str(data), by_label=False).test
    written, loss, count = [], 0.0, 0
    for text, label in rows:
        ids, target = ids_of(tokenizer, text), ids_of(tokenizer, label)
        made = model.generate(ids, max_new_tokens=target.shape[1], do_sample=False)
        written.append(tokenizer.decode(made[0], skip_special_tokens=True).strip())
        loss += model(input_ids=ids, labels=target).loss.item() * target.shape[1]
        count += target.shape[1]
    wanted = [label for _, label in rows]
    test = summary["test"]
    assert test["exact_match"] == sum(a == b for a, b in zip(written, wanted, strict=True)) / len(rows)
    assert test["chrf"] == pytest.approx(corpus_chrf(written, [wanted]).score)
    assert test["loss"] == pytest.approx(loss / count, rel=1e-4)
    assert test["loss"] < summary["baseline"]["loss"] and test["chrf"] > summary["baseline"]["chrf"]
    table = report.table(summary)
    assert "chrF, before tuning" in table and "exact match, tuned" in table and "largest summed loss" in table
