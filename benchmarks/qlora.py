"""A fine-tuning step on a quantised model: ours, HF PEFT on bitsandbytes, and both on dense weights.

    python benchmarks/qlora.py [--hidden 2048] [--layers 4] [--tokens 512] [--steps 5] [--turns 3] [--json FILE]

Every side is a process of its own, so that its peak memory is its own, and they take turns. A step is forward, backward
and AdamW on the adapters of all linear layers of a Llama-shaped model in bf16, rank 16, batch of one. The peak
memory of a process counts from before the model is made; bitsandbytes is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn

import peft_kernels as pk

SIDES = ("QLoRA", "LoRA", "HF PEFT, bitsandbytes", "HF PEFT, dense")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base(args: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 43 // 16, "num_hidden_layers": args.layers}
    config = LlamaConfig(**sizes, num_attention_heads=args.hidden // 128, vocab_size=32000, use_cache=False)
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def packed_by_bitsandbytes(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in LINEARS:
            new = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                False,
                torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
            )
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new.to("cpu"))
    return model


def made(side: str, args: argparse.Namespace) -> nn.Module:
    model = base(args)
    if side == "QLoRA":
        return pk.attach(model, pk.QLoRA(rank=16, dropout=0.05))
    if side == "LoRA":
        return pk.attach(model, pk.LoRA(rank=16, alpha=16, dropout=0.05), "*")
    from peft import LoraConfig, get_peft_model

    if side == "HF PEFT, bitsandbytes":
        model = packed_by_bitsandbytes(model)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=list(LINEARS)))


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = made(side, args).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(32000, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    wall, cpu, losses = [], [], []
    for _ in range(args.steps + 1):  # the first one warms up
        began = time.perf_counter(), time.process_time()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
        losses.append(loss.item())
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {
        "side": side,
        "wall": statistics.median(wall[1:]),
        "cpu": statistics.median(cpu[1:]),
        "peak_bytes": peak,
        "trainable": sum(p.numel() for p in trained),
        "losses": losses,
        "hidden": args.hidden,
        "layers": args.layers,
        "tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("hidden", 2048), ("layers", 4), ("tokens", 512), ("steps", 5), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", metavar="FILE", help="also write a line for each process")
    parser.add_argument("--side", choices=SIDES, help="one side in this process, as a line of JSON")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    sides = [s for s in SIDES if "bitsandbytes" not in s or importlib.util.find_spec("bitsandbytes")]
    rows: list[dict[str, Any]] = []
    for _ in range(args.turns):
        for side in sides:
            words = [sys.executable, __file__, "--side", side]
            for name in ("hidden", "layers", "tokens", "steps"):
                words += [f"--{name}", str(getattr(args, name))]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(line(rows[-1], rows), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print("\nmedians over the turns, over QLoRA's")
    for side in sides:
        print(line({key: median(rows, side, key) for key in ("wall", "cpu", "peak_bytes")} | {"side": side}, rows))


def median(rows: list[dict[str, Any]], side: str, key: str) -> float:
    return statistics.median(row[key] for row in rows if row["side"] == side)


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    wall, cpu, peak = (median(rows, SIDES[0], key) for key in ("wall", "cpu", "peak_bytes"))
    return (
        f"{row['side']:<22} step {row['wall']:6.2f} s ({row['wall'] / wall:.2f})  cpu {row['cpu']:6.2f} s "
        f"({row['cpu'] / cpu:.2f})  peak {row['peak_bytes'] / 1e9:.2f} GB ({row['peak_bytes'] / peak:.2f})"
    )


if __name__ == "__main__":
    main()
