"""Batches of encoded texts of similar length: shuffled for training, in order of length for scoring."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import hf
from .data import Row

IGNORED = -100  # the label of a position that counts in no loss


class Batches:
    """What fit iterates over. The order depends on the seed and the epoch alone.

    rows: as they were read.   examples: the same encoded, each a dict with input_ids, perhaps more that the tokenizer
    made, and labels: a number, or a list of token numbers.
    """

    def __init__(self, rows: Sequence[Row], examples: list[dict[str, Any]], tokenizer: Any, batch_size: int, seed: int):
        self.rows, self.examples = rows, examples
        self.lengths = [len(example["input_ids"]) for example in examples]
        self.tokenizer, self.batch_size, self.seed, self.epoch = hf.quiet_padding(tokenizer), batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.collate, self.shuffled())

    def shuffled(self) -> list[list[int]]:
        """Sorting inside 16 batches at a time saves most of the padding and keeps the order random enough."""
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = rng.sample(range(len(self.examples)), len(self.examples))
        span, length = 16 * self.batch_size, self.lengths.__getitem__
        order = [i for k in range(0, len(order), span) for i in sorted(order[k : k + span], key=length)]
        batches = self._sliced(order)
        rng.shuffle(batches)
        return batches

    def sorted(self) -> list[list[int]]:
        return self._sliced(sorted(range(len(self.examples)), key=self.lengths.__getitem__))

    def collate(self, members: list[int]) -> dict[str, Tensor]:
        examples = [self.examples[i] for i in members]
        inputs = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
        labels = [example["labels"] for example in examples]
        if isinstance(labels[0], list):
            width = max(map(len, labels))
            labels = [ids + [IGNORED] * (width - len(ids)) for ids in labels]
        return {**self.tokenizer.pad(inputs, return_tensors="pt"), "labels": torch.tensor(labels)}

    def _sliced(self, order: list[int]) -> list[list[int]]:
        return [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]


@torch.inference_mode()
def each(model: nn.Module, batches: Batches, compute: Callable[[dict[str, Tensor]], Iterable]) -> list[Any]:
    """compute(batch) -> one value per row, with the model in eval mode: the values in the order of the data."""
    model.eval()
    device = device_of(model)
    values: list[Any] = [None] * len(batches.examples)
    for members in batches.sorted():
        batch = {key: value.to(device) for key, value in batches.collate(members).items()}
        for i, value in zip(members, compute(batch), strict=True):
            values[i] = value
    return values


def stacked(model: nn.Module, batches: Batches, compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """The same where compute(batch) is a tensor [rows, width]: [n, width], fp32 on the CPU."""
    return torch.stack(each(model, batches, lambda batch: compute(batch).float().cpu()))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
