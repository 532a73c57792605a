"""A training step of a sparse mask on a stack of wide linear layers: ours, HF PEFT's SHiRA and dense weights.

    python benchmarks/sparse.py [--width 4096] [--layers 4] [--tokens 512] [--density 0.005] [--steps 5] [--turns 3]

A step is forward, backward and AdamW in fp32. "dense, masked" trains whole weights and masks their gradients. The peak
memory of a process counts from when model, masks and optimizer stand, without the weights: what training adds.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from sides import Step, main, resident
from torch import nn

import peft_kernels as pk


def base(args: Namespace) -> nn.Module:
    """The model, once everything is loaded that a first training step loads: a hundred megabytes of modules."""
    tiny = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(tiny.parameters(), fused=True)
    tiny(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(args.width, args.width, bias=False) for _ in range(args.layers)))


def positions(args: Namespace, layer: int) -> torch.Tensor:
    """int64 [nnz], ascending: the same random mask on every side."""
    made = torch.Generator().manual_seed(layer)
    size = args.width**2
    return torch.randint(size, (round(args.density * size),), generator=made).unique()


def step(model: nn.Module, args: Namespace, since: int, masks: list[torch.Tensor] | None = None) -> Step:
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    x = torch.randn(args.tokens, args.width, generator=torch.Generator().manual_seed(1))

    def run() -> float:
        loss = model(x).square().mean()
        loss.backward()
        for p, mask in zip(trained, masks or (), strict=bool(masks)):
            p.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Step(run, sum(p.numel() for p in trained), since)


def ours(args: Namespace) -> Step:
    model = base(args)
    since = resident()
    pk.attach(model, pk.RandomMask(keep_ratio=args.density), "*")
    for i, layer in enumerate(model):
        layer.peft.tuners["default"].set_mask(positions(args, i))
    return step(model, args, since)


def dense(args: Namespace) -> Step:
    model = base(args)
    since = resident()
    masks = []
    for i, layer in enumerate(model):
        masks.append(torch.zeros_like(layer.weight))
        masks[-1].view(-1)[positions(args, i)] = 1
    return step(model, args, since, masks)


def shira(args: Namespace) -> Step:
    from peft import ShiraConfig, get_peft_model
    from peft.tuners.shira import ShiraLayer

    model = base(args)
    since = resident()
    model = get_peft_model(model, ShiraConfig(r=1, target_modules=r"\d+", init_weights=True))
    layers = [m for m in model.modules() if isinstance(m, ShiraLayer)]
    for i, layer in enumerate(layers):  # its masks have rank * (in + out) entries; ours have the density asked for
        places = positions(args, i)
        layer.shira_weight["default"] = nn.Parameter(torch.zeros(len(places)))
        layer.shira_indices["default"] = torch.stack([places // args.width, places % args.width]).int()
    return step(model, args, since)


SIDES = {"RandomMask": ours, "HF PEFT, SHiRA": shira, "dense, masked": dense}

if __name__ == "__main__":
    main(__file__, __doc__, SIDES, width=4096, layers=4, tokens=512, density=0.005)
