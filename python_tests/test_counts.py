"""The numbers of published models, counted on the meta device."""

import torch
from models import attached

import peft_kernels as pk
from peft_kernels.engine.site import base_modules


def meta(make_model):
    with torch.device("meta"):
        return make_model()


def gpt3():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_embd=12288, n_layer=96, n_head=96))


def test_counts_of_the_gpt3_table():
    """Table 5 and 6 of the LoRA paper."""
    model = meta(gpt3)
    for ranks, expected in (
        ({"q": 2, "v": 2}, 9_437_184),
        ({"v": 2}, 4_718_592),
        ({"q": 1, "v": 1}, 4_718_592),
        ({"q": 8, "v": 8}, 37_748_736),
        ({"q": 64, "k": 64, "v": 64, "o": 64}, 603_979_776),
    ):
        pk.attach(model, pk.LoRA(rank=1, rank_pattern=ranks), tuple(ranks))
        counts = pk.counts(model)
        assert counts.trainable == counts.stored == expected
        assert counts.changed == len(ranks) * 96 * 12288**2
        assert counts.rank == 96 * sum(ranks.values())
        pk.detach(model)


def test_counts_of_one_layer():
    model = torch.nn.Sequential(torch.nn.Linear(64, 512, bias=False))
    pk.attach(model, pk.LoRA(rank=8), ("0",))
    counts = pk.counts(model)
    assert (counts.trainable, counts.changed, counts.rank, counts.total) == (4608, 512 * 64, 8, 512 * 64)
    assert counts.bytes == 4608 * 4
    assert "14.0625 %" in str(counts)


def test_counts_of_published_models():
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    bert = meta(lambda: BertModel(BertConfig()))
    pk.attach(bert, pk.BitFit())
    assert pk.counts(bert).trainable == pk.counts(bert).changed == 102_912
    t0 = T5Config(
        d_model=2048,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        d_kv=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    t0 = meta(lambda: T5ForConditionalGeneration(t0))
    pk.attach(t0, pk.IA3())
    assert pk.counts(t0).trainable == 540_672
    pk.detach(t0)
    pk.attach(t0, pk.FullTuning())
    assert pk.counts(t0).trainable == pk.counts(t0).total == sum(p.numel() for p in set(t0.parameters())) // 2


def test_base_modules_leave_tuners_out():
    case = attached("lora", "bert")
    assert not any("peft" in path for path, _ in base_modules(case.model))
