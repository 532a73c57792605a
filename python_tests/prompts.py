"""Saved prompts, and a decoder of prompts, of the tiny BERT: what SPoT and IPT begin with."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from models import make

import peft_kernels as pk


@functools.cache
def place():
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def write(directory, rows, method="prompt", family="bert"):
    """The adapter of a method that keeps rows [length, width], saved with these; the directory."""
    model = make(family).model
    pk.attach(model, pk.methods()[method](length=len(rows)))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(".rows")).copy_(rows)
    pk.save(model, directory)
    return str(directory)


def rows(number, length=3):
    return torch.randn(length, 16, generator=torch.Generator().manual_seed(number))


@functools.cache
def prompt(number):
    """The directory of a prompt that differs from those of other numbers; that of 9 is near that of 0."""
    return write(place() / str(number), rows(number) if number != 9 else rows(0) + 0.5 * rows(1))


@functools.cache
def decoder():
    """The directory of a decoder for IPT's `tiny`."""
    model = make("bert").model
    batch = {"input_ids": torch.arange(14).reshape(2, 7), "labels": torch.arange(2)}
    out = place() / "decoder"
    pk.IPT.autoencode(model, {prompt(0): [batch], prompt(1): [batch]}, out, k=4, inner=5, progress=False)
    return str(out)
