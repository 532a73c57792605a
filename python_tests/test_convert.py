"""convert, and loading what it wrote: the result is pk.quantize's, whole or absent; bad input is told in a line."""

import json

import pytest
import torch
from models import make, perturb
from safetensors.torch import load_file, save_file
from texts import refused, run

import peft_kernels as pk
from peft_kernels import hf
from peft_kernels.convert import convert
from peft_kernels.quant import KINDS, footprint

transformers = pytest.importorskip("transformers")


def saved(family, where, dtype=torch.float32, **settings):
    case = make(family, dtype)
    case.model.save_pretrained(where, **settings)
    return case


def logits(case, model):
    with torch.no_grad():
        return case.call(model.eval())


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_a_converted_model_is_the_quantised_one(tmp_path, family, kind):
    case = saved(family, tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "dense" / "README.md").write_text("kept")
    report = convert(tmp_path / "dense", tmp_path / "packed", kind, progress=False)
    found, missing = hf.load_model(str(tmp_path / "packed"))
    expected = pk.quantize(hf.load_model(str(tmp_path / "dense"))[0], kind)
    assert (
        not missing
        and footprint(found) == footprint(expected)
        and report["layers"] == sum(footprint(found).packed.values())
    )
    torch.testing.assert_close(logits(case, found), logits(case, expected), atol=0, rtol=0)
    state, other = found.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    for key, t in state.items():
        assert t.dtype == other[key].dtype and torch.equal(t, other[key]), key
    assert not any(p.is_meta for p in (*found.parameters(), *found.buffers()))
    assert (tmp_path / "packed" / "README.md").read_text() == "kept"
    assert 0 < report["error"] < (0.12 if kind == "nf4" else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_file_and_its_settings(tmp_path, dtype):
    saved("llama", tmp_path / "dense", dtype)
    settings = {"double_quant": False, "blocksize": 32, "skip": ("head", "embed", "*.down_proj")}
    report = convert(tmp_path / "dense", tmp_path / "packed", **settings, progress=False)
    assert report["files"] == sorted(report["files"][:-1]) + ["convert.json"] and "model.safetensors" in report["files"]
    assert [path.rpartition(".")[2] for path in report["dense"]] == ["down_proj", "down_proj", "lm_head"]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["load_in_4bit"] and config["bnb_4bit_quant_type"] == "nf4" and not config["bnb_4bit_use_double_quant"]
    assert config["bnb_4bit_compute_dtype"] == str(dtype).removeprefix("torch.")
    assert config["llm_int8_skip_modules"] == report["dense"]
    model, _ = hf.load_model(str(tmp_path / "packed"))
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.blocksize, layer.double_quant, layer.dtype) == (32, False, dtype)
    assert model.lm_head.weight.dtype == dtype


def test_a_new_head_on_packed_files(tmp_path):
    saved("bert", tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", progress=False)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "packed", num_labels=5)
    model, missing = hf._pretrained(transformers.AutoModelForSequenceClassification, str(tmp_path / "packed"), config)
    assert missing == {"classifier.weight", "classifier.bias"} and model.classifier.weight.shape == (5, 16)
    assert 0 < model.classifier.weight.std() < 0.1 and not model.classifier.bias.any()


def test_an_adapter_finds_its_packed_base_and_merges_into_it_or_dense(capsys, tmp_path):
    case = saved("llama", tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", progress=False)
    model, _ = hf.load_model(str(tmp_path / "packed"))
    perturb(pk.attach(model, pk.QLoRA(rank=2)))
    pk.save(model, tmp_path / "adapter")
    adapted = logits(case, model)
    again, _ = hf.load_base(tmp_path / "adapter")
    torch.testing.assert_close(logits(case, pk.load(again, tmp_path / "adapter")), adapted, atol=0, rtol=0)
    for words, into, packed in ((("--packed",), None, ["nf4"]), ((), "fp32", [])):
        out = tmp_path / f"merged{into}"
        code, _, _ = run(capsys, "merge", "--adapter", tmp_path / "adapter", "--out", out, *words)
        found, _ = hf.load_model(str(out))
        assert code == 0 and list(footprint(found).packed) == packed
        pk.merge(model, into=into)
        torch.testing.assert_close(logits(case, found), logits(case, model), atol=1e-5, rtol=1e-5)
        pk.unmerge(model)
    torch.testing.assert_close(logits(case, found), adapted, atol=1e-5, rtol=1e-5)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(capsys, tmp_path):
    saved("llama", tmp_path / "dense")
    code, text, _ = run(capsys, "convert", tmp_path / "dense", "--to", "nf4", "--out", tmp_path / "a")
    assert code == 0 and "14 layers in nf4; 1 linear layers stay dense: lm_head" in text
    code, text, err = run(capsys, "convert", tmp_path / "dense", "--to", "int8", "--out", tmp_path / "b", "--json")
    assert (code, err) == (0, "")
    assert json.loads(text) == json.loads((tmp_path / "b" / "convert.json").read_text())
    assert "is quantised already" in refused(capsys, tmp_path, "convert", tmp_path / "a", "--to", "nf4", "--out", "c")


# -- bad input --------------------------------------------------------------------------------------------------------


def _truncated(source):
    file = source / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "cut short"


def _absent(source):
    (source / "model-00002-of-00002.safetensors").unlink()
    return "lacks model-00002-of-00002.safetensors"


def _no_index(source):
    (source / "model.safetensors.index.json").write_text("[]")
    return "not an index"


def _no_weights(source):
    for file in source.glob("model*"):
        file.unlink()
    return "neither model.safetensors nor"


def _no_config(source):
    (source / "config.json").unlink()
    return "config.json"


def _changed(source, change):
    for file in source.glob("*.safetensors"):
        held = load_file(file)
        if name := next((name for name in held if name.endswith("up_proj.weight")), None):
            held = change(held, name)
            save_file(held, file)
            return name


def _lost(source):
    name = _changed(source, lambda held, name: {k: t for k, t in held.items() if k != name})
    return f"no file holds {name}"


def _nan(source):
    return f"{_changed(source, lambda held, name: {**held, name: held[name] * torch.nan})} is not finite"


def _other_shape(source):
    return (
        f"{_changed(source, lambda held, name: {**held, name: held[name][:-1].contiguous()})} is torch.float32 (23, 16)"
    )


@pytest.mark.parametrize(
    "spoil",
    [_truncated, _absent, _no_index, _no_weights, _no_config, _lost, _nan, _other_shape],
    ids=lambda f: f.__name__[1:],
)
def test_what_is_broken_is_told_and_nothing_written(tmp_path, spoil):
    saved("llama", tmp_path / "dense", max_shard_size="20KB")
    told = spoil(tmp_path / "dense")
    with pytest.raises((ValueError, FileNotFoundError), match=".") as error:
        convert(tmp_path / "dense", tmp_path / "packed", progress=False)
    assert told in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_force_replaces_an_earlier_result_only(tmp_path):
    saved("llama", tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", progress=False)
    with pytest.raises(FileExistsError):
        convert(tmp_path / "dense", tmp_path / "packed", progress=False)
    with pytest.raises(ValueError, match="convert.json"):
        convert(tmp_path / "dense", tmp_path / "dense", force=True, progress=False)
    assert convert(tmp_path / "dense", tmp_path / "packed", "int8", force=True, progress=False)["kind"] == "int8"


def test_nothing_to_quantise_is_refused(tmp_path):
    saved("llama", tmp_path / "dense")
    with pytest.raises(ValueError, match="nothing to quantise"):
        convert(tmp_path / "dense", tmp_path / "packed", skip=("model", "head"), progress=False)
