"""What the tests of AdapterBank share."""

import copy

import torch
from models import close, make, targets_of

import peft_kernels as pk
from peft_kernels.engine.attach import state_of, tuners

RANKS = {"a": 2, "b": 5, "c": 3, "d": 1, "e": 7, "f": 4, "g": 6, "h": 2}
BOTH = ("first", "second")  # of the MLP


def lora(name, **changes):
    return pk.LoRA(rank=RANKS[name], alpha=2.5 * RANKS[name], **changes)


def trained(family, names="ab", targets=None, dtype=torch.float32, seed=0, methods=None):
    """(the family's case, a model with these adapters attached, None and each name -> what it alone computes)."""
    case, other = make(family, dtype), make(family, dtype)
    for inputs in (case.inputs, other.inputs):
        inputs.update({key: value[:2] for key, value in inputs.items()})
    targets = targets or targets_of("lora", family)
    for i, name in enumerate(names):
        method = (methods or {}).get(name, lora(name))
        pk.attach(other.model, method, targets, name=name, seed=seed + i)
        with torch.no_grad():
            for _, tuner in tuners(other.model, name):
                made = torch.Generator().manual_seed(seed + i)
                for p in tuner.parameters():
                    p.add_(torch.randn(p.shape, generator=made).to(p) * 0.2)
    single = {}
    for name in (None, *names):
        pk.set_active(other.model, [] if name is None else [name])
        single[name] = run(other)
    return case, other.model, single


def run(case, model=None, names=None):
    with torch.no_grad():
        if names is None:
            return case.call(case.model if model is None else model)
        with pk.route(case.model, names):
            return case.call(case.model if model is None else model)


def check(case, single, *routes, model=None):
    for names in routes:
        out = run(case, model, names)
        for i, name in enumerate(names):
            if name is None and model is None:
                assert torch.equal(out[i], single[None][i])
            close(out[i], single[name][i])


def only(model, name):
    """A copy of the model with this adapter alone."""
    model = copy.deepcopy(model)
    for other in set(state_of(model).adapters) - {name}:
        pk.detach(model, other)
    return model


def banked(family, names="ab", *, targets=None, slots=4, max_rank=8, dtype=torch.float32, **kwargs):
    """The same with all these adapters in a bank of the first model."""
    case, source, single = trained(family, names, targets, dtype)
    bank = pk.AdapterBank(case.model, slots, max_rank, targets or targets_of("lora", family) or ("q", "v"), **kwargs)
    for name in names:
        bank.load(name, source)
    return case, bank, single
