"""What an AdapterBank loads, from a model, from files of ours and of Hugging Face PEFT, and what it refuses."""

import json

import pytest
import torch
from banked import banked, check, run, trained
from models import make
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

# -- what is loaded ---------------------------------------------------------------------------------------------------


def test_directories_written_by_save(tmp_path):
    case, source, single = trained("gpt2", "abc")
    pk.save(source, tmp_path / "each", "a")
    pk.save(source, tmp_path / "all")
    bank = pk.AdapterBank(case.model, max_rank=8)
    bank.load("a", tmp_path / "each")
    bank.load("b", tmp_path / "all")  # the one that is called so there
    bank.load("last", str(tmp_path / "all" / "c"))
    check(case, single | {"last": single["c"]}, ["a", "b"], ["last", "a"])
    bank.evict("a")
    values = {f"{path}.{k}": v for path, tuner in tuners(source, "c") for k, v in tuner.state_dict().items()}
    bank.load("a", values, json.loads((tmp_path / "all" / "c" / "adapter_config.json").read_text()))
    check(case, single | {"a": single["c"]}, ["a", "b"])


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        ("gpt2", ("q", "v"), dict(target_modules=["c_attn"], r=7, use_rslora=True)),
        (
            "llama",
            ("q", "v", "down"),
            dict(
                target_modules=["q_proj", "v_proj", "down_proj"],
                rank_pattern={"layers.0.self_attn.q_proj": 3, r"layers\.1\..*": 5},
                alpha_pattern={"v_proj": 9},
                lora_dropout=0.1,
            ),
        ),
        ("bert", ("q", "k"), dict(target_modules=["query"], init_lora_weights=False)),
        ("t5", ("q", "v", "o"), dict(target_modules=["q", "o"])),
    ],
)
def test_directories_written_by_hugging_face_peft(family, targets, settings, tmp_path):
    case, other = make(family), make(family)
    model = get_peft_model(other.model, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    bank = pk.AdapterBank(case.model, 2, 8, targets)
    bank.load("theirs", tmp_path)
    single = {None: run(case), "theirs": run(other, model)}
    check(case, single, ["theirs", None], ["theirs", "theirs"])
    bank.load("again", get_peft_model_state_dict(model), model.peft_config["default"].to_dict())
    check(case, single | {"again": single["theirs"]}, [None, "again"])


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(bank, message, *args, error=ValueError, **kwargs):
    names, free = bank.names, bank.free
    with pytest.raises(error, match=message) as caught:
        bank.load("new", *args, **kwargs)
    assert "\n" not in str(caught.value)
    assert (bank.names, bank.free) == (names, free)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    case, bank, single = banked("bert")
    for method, targets, train, message in (
        (pk.DoRA(rank=2), None, (), "has dora at .*query .linear.; a bank takes LoRA of linears; attach it"),
        (pk.LoRA(rank=2), ("embed",), (), r"has lora at .*embeddings.* \(embedding\)"),
        (pk.LoRA(rank=2), None, ("head",), "has head at classifier"),
        (
            pk.LoRA(rank=2),
            ("q", "up", "o"),
            (),
            r"tunes 4 layers that the bank's targets \('q', 'v'\) leave out.*'\*\.dense'",
        ),
        (pk.LoRA(rank=9), None, (), "has rank 9 at .*, the bank room for 8; make it with more max_rank"),
    ):
        other = make("bert").model
        pk.attach(other, method, targets, train=train, name="x")
        refused(bank, message, other)
    small = make("bert")
    small.model.bert.encoder.layer[0].attention.self.query = torch.nn.Linear(12, 16)
    pk.attach(small.model, pk.LoRA(rank=2))
    refused(
        bank, r"a \(2, 12\) .* at bert.encoder.layer.0.attention.self.query; expected numbers \[r, 16\]", small.model
    )
    llama = trained("llama", "a")[1]
    pk.save(llama, tmp_path / "llama", "a")
    refused(bank, "does not fit this model: it lacks bert", tmp_path / "llama" / "a")
    refused(bank, "load 'new': the model has the adapters a, b; expected", trained("bert")[1])
    refused(bank, "has no adapter", make("bert").model)
    refused(bank, "holds no adapter", tmp_path / "nowhere", error=FileNotFoundError)
    refused(bank, "need `config`", {})
    refused(bank, "not a complete adapter configuration", {}, {})
    refused(bank, "not a complete adapter configuration", {}, {"parts": [], "seed": 0, "name": "x"})
    refused(bank, "got a int; expected a directory, a model or tensors", 3)
    check(case, single, ["a", "b"])


def test_peft_adapters_that_do_not_fit_are_refused(tmp_path):
    case, bank, _ = banked("llama")
    plain = dict(r=2, target_modules=["q_proj"], lora_alpha=2)
    for number, (settings, message) in enumerate(
        (
            (dict(use_dora=True), "is LORA of PEFT with use_dora; a bank takes plain LORA"),
            (dict(lora_bias=True), "with lora_bias"),
            (dict(modules_to_save=["lm_head"]), "with modules_to_save"),
            (dict(bias="all"), "with bias='all'"),
            (dict(target_modules=["embed_tokens"]), "embed_tokens.*no LoRA of a linear layer"),
            (dict(target_modules=["k_proj"]), r"tunes 2 layers .*'\*\.k_proj'"),
            (dict(r=9), "has rank 9"),
        )
    ):
        model = get_peft_model(make("llama").model, LoraConfig(**{**plain, **settings}))
        model.save_pretrained(tmp_path / str(number))
        refused(bank, message, tmp_path / str(number))
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2)}
    bank.load("new", pair, good)
    bank.evict("new")
    refused(bank, "init_lora_weights='pissa_niter_4'", pair, {**good, "init_lora_weights": "pissa_niter_4"})
    refused(bank, "is IA3 of PEFT", pair, {**good, "peft_type": "IA3"})
    refused(bank, "has 2 ranks at .*, where its config says 3", pair, {**good, "r": 3})
    refused(bank, "rank or alpha None", pair, {**good, "lora_alpha": None})
    refused(bank, "no regular expression", pair, {**good, "rank_pattern": {"(": 2}})
    refused(bank, "lora_A of .* alone", {f"{path}.lora_A.weight": torch.ones(2, 16)}, good)
    refused(
        bank, "which the model has not", {k.replace("model.layers.0", "layers.7"): v for k, v in pair.items()}, good
    )
    refused(bank, "holds no LoRA", {}, good)
    refused(bank, "torch.int8", {k: v.to(torch.int8) for k, v in pair.items()}, good)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text(json.dumps(good))
    torch.save(pair, tmp_path / "pickled" / "adapter_model.bin")
    refused(bank, "pickled files are not read", tmp_path / "pickled", error=FileNotFoundError)


def test_bad_names_and_values():
    case, bank, _ = banked("bert")
    source = trained("bert", "a")[1]
    pk.attach(case.model, pk.LoRA(rank=2), name="own")
    for name, message in (
        ("own", "is attached to the model"),
        ("bank", "is attached"),
        ("x y", "expected letters"),
        (3, "3"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.load(name, source)
    for call, message in (
        (lambda: pk.attach(case.model, pk.LoRA(), name="a"), "'a' is in the model's bank"),
        (lambda: pk.rename(case.model, "own", "a"), "'a' is in the model's bank"),
        (lambda: pk.rename(case.model, "bank", "other"), "keeps its name"),
        (lambda: bank.evict("z"), "no adapter 'z' in the bank; it holds a, b"),
        (lambda: pk.AdapterBank(case.model), "has a bank already"),
        (lambda: pk.AdapterBank("bert"), "got a str"),
        (lambda: pk.AdapterBank(make("bert").model, 0), "slots = 0"),
        (lambda: pk.AdapterBank(make("bert").model, max_rank=1.5), "max_rank = 1.5"),
        (lambda: pk.AdapterBank(make("bert").model, dtype=torch.int8), "floating point"),
        (lambda: pk.AdapterBank(make("bert").model, targets=("norm",)), "no linear layer among"),
        (lambda: pk.AdapterBank(make("bert").model.to("meta")), "meta device"),
        (lambda: pk.AdapterBank.of(make("bert").model), "has no bank"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for names, message in (
        (["a", "z"], "no adapter 'z'; attached are bank, own; the bank holds a, b"),
        (["bank", "a"], "'bank' is the bank itself; expected a name in it: a, b"),
    ):
        with pytest.raises(ValueError, match=message), pk.route(case.model, names):
            pass
    assert bank.running == 0
    with pk.route(case.model, ["a", "b", None]), pytest.raises(ValueError, match="3 names, but"), torch.no_grad():
        case.call(case.model)
    linear = case.model.bert.encoder.layer[0].attention.self.query
    with pk.route(case.model, ["a", "b"]), pytest.raises(ValueError, match="needs a tensor with batch rows"):
        linear(torch.ones(16))


def test_checkpointing_is_refused():
    case, _, _ = banked("bert")
    case.model.train()
    case.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": pk.checkpoint_context})
    with pk.route(case.model, ["a", "b"]), pytest.raises(RuntimeError, match="no gradients"):
        case.call(case.model)
