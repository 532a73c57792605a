"""The tasks of `peft-kernels tune`: how each loads its model, encodes its rows, and measures what came out."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import hf
from .batches import IGNORED, Batches, each, stacked
from .data import Data, Row
from .engine.attach import state_of, tuners
from .methods.full import Head
from .probe import features, linear_probe, logistic, ridge, ridge_probe, solve


@dataclass(frozen=True)
class Metric:
    """A figure of a task."""

    name: str  # in the log and the summary
    label: str  # in tables and pictures
    form: str  # how a value is written
    higher: bool = True  # is better

    def show(self, value: float) -> str:
        return f"{value:{self.form}}"

    def gain(self, before: float, after: float) -> str:
        return f"{100 * (after - before):+.1f} points" if "%" in self.form else f"{after - before:+{self.form}}"


_registry: dict[str, type[Task]] = {}


def tasks() -> dict[str, type[Task]]:
    """`--task` word -> task class."""
    return dict(_registry)


class Task(ABC):
    """One task on one data set. Rows are (text, label); scores are the numbers [n, width] that a merge has to keep."""

    key: ClassVar[str]
    kind: ClassVar[str]  # of model, as hf.load_for names it
    metrics: ClassVar[tuple[Metric, ...]]  # the first is the main one: of the table, the picture and a sweep
    loss: ClassVar[str]  # what the training loss is
    score: ClassVar[str]  # what the first column of the scores is
    rival: ClassVar[str] = "before tuning"  # the baseline's name
    needs: ClassVar[tuple[str, ...]] = ()  # modules of the cli extra
    labelled: ClassVar[bool] = True
    by_label: ClassVar[bool] = False  # texts are held out by label
    type_ids: ClassVar[bool | None] = None  # whether the tokenizer adds token types; None: its own choice

    def __init_subclass__(cls, *, key: str | None = None):
        if key is not None:
            cls.key = key
            _registry[key] = cls

    def __init__(self, data: Data):
        for side, rows in (("test", data.test), ("validation", data.validation)):
            if rows:
                self.check(f"{data.path} ({side} rows)", rows)

    @staticmethod
    def parse(text: str) -> Any:
        """A label as written -> as a row keeps it; ValueError says what is wrong with it."""
        return text

    def check(self, path: str, rows: list[Row]) -> None:  # noqa: B027  # most tasks take any rows
        """ValueError if figures of these rows would mean nothing."""

    def settings(self) -> dict[str, Any]:
        """Of the model's config."""
        return {}

    def load(self, source: str, dropout: float | None) -> tuple[nn.Module, Any]:
        """(model, tokenizer)"""
        return hf.load_for(self.kind, source, dropout, **self.settings())

    def check_teacher(self, teacher: Any) -> None:  # noqa: B027  # a model of the kind will do
        """ValueError if what the teacher predicts is not what the task asks for."""

    def trained(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the modules that are trained whole unless the user says otherwise."""
        return ()

    def encode(self, tokenizer: Any, rows: list[Row], max_length: int) -> list[dict[str, Any]]:
        """One example per row, as Batches takes them."""
        texts = [text for text, _ in rows]
        encoded = tokenizer(texts, truncation=True, max_length=max_length, return_token_type_ids=self.type_ids)
        labels = self.labels(tokenizer, rows, encoded["input_ids"], max_length)
        return [{**{key: encoded[key][i] for key in encoded}, "labels": labels[i]} for i in range(len(rows))]

    @abstractmethod
    def labels(self, tokenizer: Any, rows: list[Row], ids: list[list[int]], max_length: int) -> list[Any]:
        """Of each row, as Batches takes them.   ids: the tokens of its text."""

    @abstractmethod
    def scores(self, model: nn.Module, batches: Batches) -> Tensor:
        """[n, width] fp32 on the CPU, in the order of the rows."""

    @abstractmethod
    def figures(self, model: nn.Module, batches: Batches, scores: Tensor) -> dict[str, float]:
        """Every metric by name, and "loss": the mean that training lowers."""

    def evaluate(self, model: nn.Module, batches: Batches) -> tuple[dict[str, float], Tensor]:
        """(figures, scores)"""
        scores = self.scores(model, batches)
        return self.figures(model, batches, scores), scores

    def baseline(self, model: nn.Module, train: Batches, test: Batches, seed: int) -> dict[str, Any]:
        """The metrics without tuning, and facts about how they were found."""
        return self.evaluate(model, test)[0]

    def decided(self, scores: Tensor) -> Tensor | None:
        """What is predicted for each text [n], where that is one of several choices."""
        return None

    def solve(self, model: nn.Module, train: Batches, seed: int) -> None:  # noqa: B027  # most tasks have no new head
        """Fits what an adapter trains whole by other means than gradients."""


class _Headed(Task):
    """A new head on the features of the whole text, which a probe can use without tuning."""

    kind = "SequenceClassification"

    @abstractmethod
    def predicted(self, scores: Tensor) -> Tensor:
        """[n]"""

    @abstractmethod
    def agreement(self, predicted: Tensor, wanted: Tensor) -> dict[str, float]:
        """The metrics of two tensors [n]."""

    @abstractmethod
    def mean_loss(self, scores: Tensor, wanted: Tensor) -> Tensor: ...

    @abstractmethod
    def probe(self, train: tuple[Tensor, Tensor], test: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]: ...

    @abstractmethod
    def regression(self, train: tuple[Tensor, Tensor], seed: int, bias: bool) -> tuple[Any, dict[str, Any]]: ...

    def solve(self, model, train, seed):
        whole = (t for n in state_of(model).active for _, t in tuners(model, n) if isinstance(t.cfg, Head))
        linears = [m for t in whole for m in t.modules() if isinstance(m, nn.Linear)]
        scores = [m for m in linears if m.out_features == model.config.num_labels]
        if scores:
            solve(model, scores[-1], train, functools.partial(self.regression, seed=seed))

    def trained(self, model):
        return hf.head(model)

    def scores(self, model, batches):
        return stacked(model, batches, lambda batch: _without_labels(model, batch))

    def figures(self, model, batches, scores):
        wanted = torch.tensor([example["labels"] for example in batches.examples])
        return {
            **self.agreement(self.predicted(scores), wanted),
            "loss": self.mean_loss(scores, wanted).item(),
        }

    def baseline(self, model, train, test, seed):
        known, (held_out, wanted) = features(model, train), features(model, test)
        predicted, facts = self.probe(known, held_out, seed)
        return {**self.agreement(predicted, wanted), **facts}


class Classify(_Headed, key="classify"):
    """One class per text."""

    metrics = (Metric("accuracy", "accuracy", ".1%"), Metric("macro_f1", "macro F1", ".1%"))
    loss, score, rival = "cross-entropy", "logit", "linear probe"
    needs = ("sklearn",)
    by_label = True

    def __init__(self, data: Data):
        self.classes = sorted({label for _, label in data.train})
        super().__init__(data)
        if len(self.classes) < 2:
            raise ValueError(f"{data.path}: the training rows hold the one class {self.classes[0]!r}; expected several")
        self.number = {name: i for i, name in enumerate(self.classes)}

    def check(self, path, rows):
        if unseen := {label for _, label in rows} - set(self.classes):
            raise ValueError(f"{path}: class {min(unseen)!r} has no training rows; expected the classes learned")

    def settings(self):
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": self.number,
            "problem_type": "single_label_classification",
        }

    def check_teacher(self, teacher):
        theirs = [name for _, name in sorted((int(i), name) for i, name in teacher.config.id2label.items())]
        unnamed = [f"LABEL_{i}" for i in range(len(self.classes))]  # transformers' words for classes without names
        if theirs not in (self.classes, unnamed):
            raise ValueError(f"it knows the classes {_some(theirs)}; expected {_some(self.classes)}")

    def labels(self, tokenizer, rows, ids, max_length):
        return [self.number[label] for _, label in rows]

    def predicted(self, scores):
        return scores.argmax(-1)

    def decided(self, scores):
        return self.predicted(scores)

    def agreement(self, predicted, wanted):
        from sklearn.metrics import f1_score

        f1 = f1_score(wanted.numpy(), predicted.numpy(), average="macro", zero_division=0)
        return {"accuracy": (predicted == wanted).double().mean().item(), "macro_f1": float(f1)}

    def mean_loss(self, scores, wanted):
        return nn.functional.cross_entropy(scores, wanted)

    def probe(self, train, test, seed):
        return linear_probe(train, test, seed)

    def regression(self, train, seed, bias):
        return logistic(train, seed, bias)


class Regress(_Headed, key="regress"):
    """One number per text."""

    metrics = (Metric("pearson", "Pearson", ".3f"), Metric("spearman", "Spearman", ".3f"))
    loss, score, rival = "squared error", "prediction", "ridge probe"
    needs = ("sklearn", "scipy")

    def __init__(self, data: Data):
        self.check(f"{data.path} (training rows)", data.train)
        super().__init__(data)

    @staticmethod
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"label {text!r} is no finite number, which --task regress needs")
        return value

    def check(self, path, rows):
        if len({label for _, label in rows}) < 2:
            raise ValueError(f"{path}: every label is {rows[0][1]:g}; a correlation needs at least two values")

    def settings(self):
        return {"num_labels": 1, "problem_type": "regression"}

    def labels(self, tokenizer, rows, ids, max_length):
        return [label for _, label in rows]

    def check_teacher(self, teacher):
        raise ValueError("distillation compares probabilities, of classes or tokens; --task regress has none")

    def predicted(self, scores):
        return scores[:, 0]

    def agreement(self, predicted, wanted):
        from scipy.stats import pearsonr, spearmanr

        if len(predicted.unique()) < 2:  # no correlation is defined
            return {"pearson": 0.0, "spearman": 0.0}
        pair = predicted.double().numpy(), wanted.double().numpy()
        return {"pearson": float(pearsonr(*pair).statistic), "spearman": float(spearmanr(*pair).statistic)}

    def mean_loss(self, scores, wanted):
        return nn.functional.mse_loss(scores[:, 0], wanted)

    def probe(self, train, test, seed):
        return ridge_probe(train, test)

    def regression(self, train, seed, bias):
        return ridge(train, bias)


class LanguageModel(Task, key="lm"):
    """The next token of a text."""

    kind = "CausalLM"
    metrics = (Metric("perplexity", "perplexity", ".2f", higher=False),)
    loss, score = "cross-entropy of a token", "summed loss"
    labelled, type_ids = False, False

    def load(self, source, dropout):
        model, tokenizer = super().load(source, dropout)
        # In a causal model the gradient of the first token's scores stops at that token, to the bit.
        ids = torch.zeros(1, 2, dtype=torch.long)
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()  # [1, 2, d]
        (gradient,) = torch.autograd.grad(model(inputs_embeds=inputs).logits[0, 0].float().square().sum(), inputs)
        if gradient[0, 1].any():
            raise ValueError(f"{source} sees the tokens that it should predict; --task lm needs a causal model")
        return model, tokenizer

    def labels(self, tokenizer, rows, ids, max_length):
        if short := [text for (text, _), tokens in zip(rows, ids, strict=True) if len(tokens) < 2]:
            raise ValueError(f"text {short[0]!r} is one token; --task lm predicts the tokens after the first")
        return ids

    def scores(self, model, batches):
        def compute(batch: dict[str, Tensor]) -> Tensor:
            wanted = batch["labels"][:, 1:]
            return token_losses(model(**batch).logits[:, :-1], wanted)  # labels say where a prompt may stand

        return stacked(model, batches, compute)

    def figures(self, model, batches, scores):
        loss = token_mean(scores)
        return {"perplexity": torch.tensor(loss).double().exp().item(), "loss": loss}


class Seq2Seq(Task, key="seq2seq"):
    """A text written for a text."""

    kind = "Seq2SeqLM"
    metrics = (Metric("chrf", "chrF", ".1f"), Metric("exact_match", "exact match", ".1%"))
    loss, score = "cross-entropy of a token", "summed loss"
    needs = ("sacrebleu",)
    type_ids = False

    def labels(self, tokenizer, rows, ids, max_length):
        return tokenizer(text_target=[label for _, label in rows], truncation=True, max_length=max_length)["input_ids"]

    def scores(self, model, batches):
        return stacked(model, batches, lambda batch: token_losses(model(**batch).logits, batch["labels"]))

    def figures(self, model, batches, scores):
        from sacrebleu.metrics import CHRF

        written, wanted = self.written(model, batches), [label.strip() for _, label in batches.rows]
        same = sum(a == b for a, b in zip(written, wanted, strict=True))
        return {
            "chrf": CHRF().corpus_score(written, [wanted]).score,
            "exact_match": same / len(wanted),
            "loss": token_mean(scores),
        }

    def written(self, model: nn.Module, batches: Batches) -> list[str]:
        """The model's text for each row: greedy, at most as many tokens as the longest target has."""
        longest = max(len(example["labels"]) for example in batches.examples)

        def compute(batch: dict[str, Tensor]) -> list[str]:
            del batch["labels"]
            ids = model.generate(**batch, max_new_tokens=longest, do_sample=False, num_beams=1)  # type: ignore[operator]
            return batches.tokenizer.batch_decode(ids, skip_special_tokens=True)

        with hf.quiet():
            return [text.strip() for text in each(model, batches, compute)]


def _some(classes: list[str]) -> str:
    """The first of them, and how many there are."""
    return ", ".join(classes[:4]) + (f", ... ({len(classes)})" if len(classes) > 4 else "")


def _without_labels(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's scores for a batch, without the loss that labels would make it compute."""
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def token_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """[rows, t, vocabulary], [rows, t] -> [rows, 2]: summed loss, tokens counted. By rows, to save an fp32 copy."""
    rows = []
    for scores, ids in zip(logits, wanted, strict=True):
        loss = nn.functional.cross_entropy(scores.float(), ids, ignore_index=IGNORED, reduction="sum")
        rows.append(torch.stack((loss, (ids != IGNORED).sum())))
    return torch.stack(rows)


def token_mean(scores: Tensor) -> float:
    """The mean over all tokens of all texts."""
    loss, tokens = scores.double().sum(0).tolist()
    return loss / tokens
