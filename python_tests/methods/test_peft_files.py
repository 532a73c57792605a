"""LoRA, DoRA and (IA)^3 in the files of HF PEFT: read, written, and read again by PEFT without a warning."""

import json

import pytest
import torch
from models import close, make, perturb
from safetensors.torch import load_file, save_file
from theirs import adapted, read_by_peft
from torch import nn

import peft_kernels as pk

peft = pytest.importorskip("peft")


def outputs(case, model):
    with torch.no_grad():
        return case.call(model.eval())


LORA = [
    ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}),
    ("llama", {"target_modules": "all-linear", "r": 2, "use_rslora": True, "lora_dropout": 0.1}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 2, "use_dora": True}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"o_proj": 3, r"1\.self_attn\.q_proj": 5},
            "alpha_pattern": {r"0\.self_attn.q_proj": 2},
        },
    ),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3}),
    ("gpt2", {"target_modules": ["c_attn"], "r": 3, "use_dora": True}),
    ("gpt2", {"target_modules": ["wte", "c_fc"], "r": 3}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    ("t5", {"target_modules": ["q", "v", "wo"], "r": 2}),
    ("bert", {"target_modules": ["query", "dense"], "r": 2, "modules_to_save": ["classifier"]}),
    ("roberta", {"target_modules": ["query"], "r": 2, "task_type": "SEQ_CLS"}),
    ("vit", {"target_modules": ["projection", "fc1"], "r": 2}),  # a convolution
    ("bert", {"target_modules": ["value"], "r": 2, "init_lora_weights": "gaussian", "layers_to_transform": [1]}),
]


@pytest.mark.parametrize(("family", "settings"), LORA, ids=range(len(LORA)))
def test_lora_of_peft_is_read_and_written_back(tmp_path, family, settings):
    case = make(family)
    theirs = adapted(make(family).model, peft.LoraConfig(**settings))
    theirs.save_pretrained(tmp_path / "theirs")
    model = pk.hf.load(case.model, tmp_path / "theirs", trainable=True)
    wanted = outputs(case, theirs)
    assert not torch.allclose(wanted, outputs(case, make(family).model))
    close(outputs(case, model), wanted)
    assert pk.counts(model).trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)

    pk.hf.save(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("theirs", "ours"))
    before = {key: value for key, value in before.items() if ".base_layer." not in key}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    close(outputs(case, read_by_peft(make(family).model, tmp_path / "ours")), wanted)
    read, written = (peft.PeftConfig.from_pretrained(tmp_path / where).to_dict() for where in ("theirs", "ours"))
    for key in ("lora_dropout", "use_rslora", "use_dora", "bias"):
        assert read[key] == written[key]
    pk.save(model, tmp_path / "native")
    close(outputs(case, pk.load(make(family).model, tmp_path / "native")), wanted)


IA3 = [
    ("llama", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ("t5", {"target_modules": ["k", "v", "wi"], "feedforward_modules": []}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    ("bert", {"target_modules": r".*(key|value|dense)", "feedforward_modules": r".*output\.dense"}),
    ("bert", {"target_modules": ["value"], "feedforward_modules": [], "modules_to_save": ["classifier"]}),
]


@pytest.mark.parametrize(("family", "settings"), IA3, ids=range(len(IA3)))
def test_ia3_of_peft_is_read_and_written_back(tmp_path, family, settings):
    case = make(family)
    theirs = adapted(make(family).model, peft.IA3Config(**settings))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = outputs(case, theirs)
    model = pk.hf.load(case.model, tmp_path / "theirs")
    close(outputs(case, model), wanted)
    pk.hf.save(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    close(outputs(case, read_by_peft(make(family).model, tmp_path / "ours")), wanted)


WRITTEN = [
    ("llama", pk.LoRA(rank=2, rank_pattern={"v": 3}, alpha_pattern={"q": 5.0}), None),
    ("llama", pk.Union(pk.LoRA(rank=2), pk.at("down", pk.LoRA(rank=4, alpha=3.0))), None),
    ("gpt2", pk.LoRA(rank=2), None),  # q and v of one layer
    ("gpt2", pk.LoRA(rank=2, alpha_pattern={"q": 3.0}, rank_pattern={"v": 3}, rslora=True), ("q", "v", "down")),
    ("gpt_neox", pk.LoRA(rank=2), None),  # rows by head
    ("gpt2", pk.IA3(), None),
    ("gpt_neox", pk.IA3(), None),
    ("gpt2", pk.DoRA(rank=2), ("down",)),
    ("bert", pk.IA3(), None),
    ("t5", pk.LoRA(rank=2), ("q", "cross.v")),
]


@pytest.mark.parametrize(("family", "method", "targets"), WRITTEN, ids=range(len(WRITTEN)))
def test_what_is_written_is_read_by_peft(tmp_path, family, method, targets):
    case = make(family)
    pk.attach(case.model, method, targets, train=("head",) if family == "bert" else ())
    perturb(case.model)
    pk.hf.save(case.model, tmp_path)
    close(outputs(case, read_by_peft(make(family).model, tmp_path)), outputs(case, case.model))
    close(outputs(case, pk.hf.load(make(family).model, tmp_path)), outputs(case, case.model))


def test_a_path_that_ends_others(tmp_path):
    """PEFT takes a name for every path that ends in it: "0" is also "1.0"."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 4)))

    x = torch.randn(3, 4)
    for method in (pk.LoRA(rank=2), pk.IA3(feedforward=("@0",)), pk.IA3(feedforward=())):
        ours = pk.attach(model(), method, ("@0",))
        perturb(ours)
        pk.hf.save(ours, tmp_path, force=True)
        close(peft.PeftModel.from_pretrained(model(), tmp_path)(x), ours(x))


@pytest.mark.parametrize(
    ("method", "targets", "told"),
    [
        (pk.DoRA(rank=2), None, "PEFT has DoRA of whole ones"),
        (pk.Union(pk.LoRA(rank=2), pk.IA3()), None, "these files of PEFT take LoRA alone"),
        (pk.Union(pk.LoRA(rank=2), pk.at("down", pk.LoRA(rank=2, dropout=0.5))), None, "has LoRA of 2 settings"),
        (pk.Union(pk.LoRA(rank=2), pk.LoRA(rank=3)), "down", "has lora at"),
        (pk.BitFit(), None, "PEFT's files take"),
    ],
)
def test_what_these_files_cannot_hold_is_told_and_nothing_written(tmp_path, method, targets, told):
    model = pk.attach(make("gpt2").model, method, targets)
    with pytest.raises(ValueError, match="PEFT") as error:
        pk.hf.save(model, tmp_path / "out")
    assert told in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bias": "all"}, "is LORA of PEFT with bias='all', which LoRA here has not"),
        ({"lora_bias": True}, "with lora_bias"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights='pissa'"),
        ({"r": 3}, "does not fit this model"),
        ({"use_dora": True}, "lacks"),
    ],
)
def test_what_cannot_be_read_is_told_and_the_model_untouched(tmp_path, fields, told):
    pk.hf.save(pk.attach(make("llama").model, pk.LoRA(rank=2)), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    model = make("llama").model
    with pytest.raises(ValueError, match=".") as error:
        pk.hf.load(model, tmp_path)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not any("peft" in name for name, _ in model.named_modules())


def test_an_embedding_that_was_trained_beside_is_told(tmp_path):
    """PEFT saves the embedding that it adapts; if that is not the model's, the adapter was another model's."""
    adapted(make("llama").model, peft.LoraConfig(target_modules=["embed_tokens"], r=2)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = load_file(file)
    (key,) = (key for key in values if ".base_layer." in key)
    values[key] += 1
    save_file(values, file)
    with pytest.raises(ValueError, match="base_layer.weight, which is neither LoRA nor of modules_to_save"):
        pk.hf.load(make("llama").model, tmp_path)
