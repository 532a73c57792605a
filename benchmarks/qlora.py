"""A fine-tuning step on a quantised model: ours, HF PEFT on bitsandbytes, and both on dense weights.

    python benchmarks/qlora.py [--hidden 2048] [--layers 4] [--tokens 512] [--steps 5] [--turns 3] [--json FILE]

A step is forward, backward and AdamW on the adapters of all linear layers of a Llama-shaped model in bf16, rank 16,
batch of one. The peak memory of a process counts the model too; bitsandbytes is left out where it is not installed.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace

import torch
from sides import Step, main, resident
from torch import nn

import peft_kernels as pk

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base(args: Namespace) -> nn.Module:
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


def step(model: nn.Module, args: Namespace, since: int) -> Step:
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(32000, (1, args.tokens), generator=torch.Generator().manual_seed(1))

    def run() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Step(run, sum(p.numel() for p in trained), since)


def qlora(args: Namespace) -> Step:
    since = resident()
    return step(pk.attach(base(args), pk.QLoRA(rank=16, dropout=0.05)), args, since)


def lora(args: Namespace) -> Step:
    since = resident()
    return step(pk.attach(base(args), pk.LoRA(rank=16, alpha=16, dropout=0.05), "*"), args, since)


def hf_peft(args: Namespace, *, packed: bool = False) -> Step:
    from peft import LoraConfig, get_peft_model

    since = resident()
    model = packed_by_bitsandbytes(base(args)) if packed else base(args)
    config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=list(LINEARS))
    return step(get_peft_model(model, config), args, since)


def hf_peft_packed(args: Namespace) -> Step:
    return hf_peft(args, packed=True)


SIDES = {"QLoRA": qlora, "LoRA": lora}
if importlib.util.find_spec("bitsandbytes"):
    SIDES["HF PEFT, bitsandbytes"] = hf_peft_packed
SIDES["HF PEFT, dense"] = hf_peft

if __name__ == "__main__":
    main(__file__, __doc__, SIDES, hidden=2048, layers=4, tokens=512)
