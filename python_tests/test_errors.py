"""Bad input: one line that says what was given, what was expected and the fix, and nothing changed or half-written."""

import json

import pytest
import torch
from models import MLP, assert_same, attached, close, make, perturb, snapshot

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

BAD_ATTACH = {
    "not_a_model": (lambda m: pk.attach("x", pk.LoRA()), "expected a torch.nn.Module"),
    "class_not_instance": (lambda m: pk.attach(m, pk.LoRA), r"such as pk.LoRA\(rank=8\)"),
    "rank_zero": (lambda m: pk.attach(m, pk.LoRA(rank=0)), "at least 1"),
    "rank_too_large": (lambda m: pk.attach(m, pk.LoRA(rank=17)), "takes at most 16"),
    "dropout": (lambda m: pk.LoRA(dropout=2), "probability"),
    "unknown_role": (lambda m: pk.attach(m, pk.LoRA(), ("gate",)), "family bert; it has q k v"),
    "glob_without_match": (lambda m: pk.attach(m, pk.LoRA(), ("*.qkv",)), "matches nothing"),
    "nothing_to_tune": (lambda m: pk.attach(m, pk.LoRA(), ("norm",)), "cannot tune"),
    "name": (lambda m: pk.attach(m, pk.LoRA(), name="a.b"), "letters, digits"),
    "layer": (lambda m: pk.attach(m, pk.LoRA(), layers=[5]), r"layers \[5\] do not exist"),
    "unknown_adapter": (lambda m: pk.counts(pk.attach(m, pk.LoRA()), "x"), "no adapter 'x'"),
    "not_attached": (lambda m: pk.counts(m), "has no adapter"),
    "twice": (lambda m: pk.attach(pk.attach(m, pk.LoRA()), pk.LoRA()), "attached already"),
    "hidden": (lambda m: pk.attach(pk.attach(m, pk.LoRA()), pk.FullTuning(), name="x"), "would hide"),
    "hidden_behind_a_gate": (
        lambda m: pk.attach(pk.attach(m, pk.LoRA()), pk.Gated(pk.TopLayers(n=1)), name="x"),
        "would hide",
    ),
    "span_trained_whole": (lambda m: pk.attach(m, pk.LayerType(types=("ffn",))), "no module there"),
    "inside": (lambda m: pk.attach(pk.attach(m, pk.FullTuning()), pk.LoRA(), name="x"), "never run"),
    "dtype_of_input": (lambda m: pk.attach(m, pk.LoRA(), targets=(3,)), "expected a role"),
    "into": (lambda m: pk.merge(pk.attach(m, pk.LoRA()), into="nf4"), "into=None"),
}


@pytest.mark.parametrize("case", BAD_ATTACH)
def test_bad_attach(case):
    call, message = BAD_ATTACH[case]
    with pytest.raises(ValueError, match=message) as error:
        call(make("bert").model)
    assert "\n" not in str(error.value)


def test_a_family_outside_the_table_asks_for_globs():
    with pytest.raises(ValueError, match="give globs"):
        pk.attach(MLP(), pk.LoRA(rank=2))


def test_a_failed_attach_leaves_the_model_as_it_was():
    case = make("bert")
    classes = [type(m) for m in case.model.modules()]
    with pytest.raises(ValueError, match="takes at most"):
        pk.attach(case.model, pk.LoRA(rank=16, rank_pattern={"v": 99}))
    assert classes == [type(m) for m in case.model.modules()]
    assert all(p.requires_grad for p in case.model.parameters())


def _broken(where, change):
    weights, config = where / "adapter_model.safetensors", where / "adapter_config.json"
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-20])
    elif change == "pickle":
        torch.save({"a": torch.zeros(1)}, weights)
    elif change == "no_weights":
        weights.unlink()
    elif change == "not_json":
        config.write_text("{")
    elif change == "foreign":
        config.write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    elif change == "unknown_method":
        config.write_text(config.read_text().replace('"lora"', '"lorax"'))
    elif change == "unknown_field":
        config.write_text(config.read_text().replace('"alpha"', '"beta"'))
    elif change == "incomplete":
        config.write_text(json.dumps({"format": "peft_kernels"}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("truncated", ValueError, "truncated or not a safetensors"),
        ("pickle", ValueError, "truncated or not a safetensors"),
        ("no_weights", FileNotFoundError, "pickled files are not read"),
        ("not_json", ValueError, "is not JSON"),
        ("foreign", ValueError, "Hugging Face PEFT"),
        ("unknown_method", ValueError, "unknown method 'lorax'"),
        ("unknown_field", ValueError, "has no field"),
        ("incomplete", ValueError, "not a complete"),
    ],
)
def test_broken_files(tmp_path, change, error, message):
    where = pk.save(attached("lora", "bert").model, tmp_path / "a")
    _broken(where, change)
    model = make("bert").model
    with pytest.raises(error, match=message):
        pk.load(model, where)
    assert "peft" not in dict(model.named_modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_another_model_is_refused(tmp_path):
    where = pk.save(attached("lora", "bert").model, tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit"):
        pk.load(make("llama").model, where)
    with pytest.raises(ValueError, match="globs"):
        pk.load(MLP(), where)
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        pk.load(make("bert").model, tmp_path)


def test_save_keeps_what_is_there(tmp_path):
    model = attached("lora", "bert").model
    where = pk.save(model, tmp_path / "a")
    before = (where / "adapter_model.safetensors").read_bytes()
    perturb(model)
    with pytest.raises(FileExistsError, match="force=True"):
        pk.save(model, where)
    assert (where / "adapter_model.safetensors").read_bytes() == before
    pk.save(model, where, force=True)
    assert (where / "adapter_model.safetensors").read_bytes() != before
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model"):
        pk.save(model, tmp_path)


def test_merge_is_all_or_nothing():
    case = attached("lora", "bert")
    perturb(case.model)
    before = snapshot(case.model)
    list(tuners(case.model, "default"))[-1][1].b.data.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="not be finite"):
        pk.merge(case.model)
    assert_same(case.model, before)


def test_merged_models_refuse_what_would_go_wrong(tmp_path):
    case = attached("lora", "bert")
    perturb(case.model)
    adapted = case.call(case.model)
    pk.merge(case.model, stash=False)
    for call in (
        lambda: pk.unmerge(case.model),
        lambda: pk.attach(case.model, pk.IA3(), name="x"),
        lambda: pk.set_active(case.model, []),
        lambda: pk.fit(case.model, [{}]),
    ):
        with pytest.raises(RuntimeError, match="merge"):
            call()
    pk.detach(case.model)  # stash=False, detach: a plain merged model
    close(case.call(case.model), adapted)
    assert type(case.model.bert.encoder.layer[0].attention.self.query) is torch.nn.Linear
