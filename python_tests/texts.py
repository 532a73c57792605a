"""What the tests of the command line share: tiny random text models, toy data, running and interrupting a command."""

import json
import random

import torch
from safetensors.torch import load_file

from peft_kernels import cli
from peft_kernels.batches import Batches

ANIMALS, FOODS = ["cat", "dog", "cow", "hen", "ant", "bee"], ["pie", "jam", "rye", "tea", "soup", "rice"]
FILLER = ["the", "one", "big", "old"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ANIMALS, *FOODS, *FILLER, "animal", "food"]
SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
WRITTEN = {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "curves.png", "summary.json"}


def save_tokenizer(directory, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(directory)


# The initial values are wider than usual: random features that a few steps can put to use.


def bert(directory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    save_tokenizer(directory, **SPECIAL)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(vocab_size=len(WORDS), **sizes, max_position_embeddings=32, initializer_range=0.1)
    BertModel(config).save_pretrained(directory)
    return directory


def gpt2(directory, **special):
    """Without a padding token unless it is given."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    save_tokenizer(directory, eos_token="[SEP]", **special)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=32)
    config = GPT2Config(vocab_size=len(WORDS), **sizes, bos_token_id=2, eos_token_id=3, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def t5(directory):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    save_tokenizer(directory, eos_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]")
    sizes = dict(d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16, vocab_size=len(WORDS))
    config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3, dropout_rate=0.0)
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return directory


def bart(directory):
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    save_tokenizer(directory, eos_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]")
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes = dict(d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, **layers)
    tokens = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3)
    config = BartConfig(vocab_size=len(WORDS), **sizes, **tokens, init_std=0.2)
    BartForConditionalGeneration(config).save_pretrained(directory)
    return directory


def toy(n=160, seed=0):
    """Unique texts with one animal or one food among filler words, and which of the two."""
    rng = random.Random(seed)
    rows = {}
    while len(rows) < n:
        label = rng.choice(["animal", "food"])
        words = [rng.choice(FILLER) for _ in range(rng.randint(2, 6))]
        words.insert(rng.randint(0, len(words)), rng.choice(ANIMALS if label == "animal" else FOODS))
        rows[" ".join(words)] = label
    return list(rows.items())


def numbers(n=160, seed=0):
    """The same texts, and how much is big or old in them."""
    return [(text, str(text.count("big") + 0.5 * text.count("old"))) for text, _ in toy(n, seed)]


def write(path, rows):
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


def run(capsys, *words):
    """(exit code, stdout, stderr) of one command."""
    capsys.readouterr()
    try:
        code = cli.main([str(w) for w in words])
    except SystemExit as stop:  # argparse
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def tune(capsys, model, data, out, *more):
    """The summary of a run that works."""
    options = ("--method", "lora", "--epochs", 2, "--batch-size", 16, "--json")
    code, text, err = run(capsys, "tune", "--model", model, "--data", data, "--out", out, *options, *more)
    assert code == 0, err
    return json.loads(text)


def refused(capsys, tmp_path, *words):
    """The one line of a refusal that left nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("peft-kernels"), err
    assert sorted(tmp_path.rglob("*")) == before
    return err


def interrupted(capsys, *words):
    """The one line of an interrupted command."""
    code, out, err = run(capsys, *words)
    assert (code, out) == (130, ""), err
    assert err.count("\n") == 1, err
    return err


def stop_at(monkeypatch, n):
    """A Ctrl-C in place of the n-th training batch from now on, once."""
    whole, count = Batches.__iter__, iter(range(1, n + 1))

    def broken(self):
        for batch in whole(self):
            if next(count) == n:
                monkeypatch.setattr(Batches, "__iter__", whole)
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Batches, "__iter__", broken)


def values(directory):
    return load_file(directory / "adapter_model.safetensors")


def same(a, b):
    """Whether two saved adapters are bit-equal."""
    a, b = values(a), values(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
