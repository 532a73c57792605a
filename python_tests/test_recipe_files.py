"""Recipe files say what Python and --set say, and tell the line of what is wrong; the parts of a saved stack."""

import dataclasses
import json
import re

import pytest
import torch
from models import METHODS, calibrated, close, entered, make, perturb
from safetensors.torch import load_file
from texts import bert, run, toy, write

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.life import all_tuners
from peft_kernels.engine.parts import parts_of
from peft_kernels.engine.recipe import Recipe
from peft_kernels.engine.store import from_config, tensors
from peft_kernels.settings import method_from

RECIPE = """\
# Two parts.
parts:
  - method: lora
    targets: [q, v]
    rank: 8
    alpha: 1e1
    dropout: 0
    rank_pattern: {"q": 2}
  - method: ia3
    layers: [0, -1]
    exclude: down
"""
TWO = pk.Union(
    pk.at(("q", "v"), pk.LoRA(rank=8, alpha=10.0, dropout=0.0, rank_pattern={"q": 2})),
    pk.at((), pk.IA3(), exclude=("down",), layers=[0, -1]),
)


def test_a_file_says_the_same_as_python_and_as_set(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(RECIPE)
    members = [part.to_json() for part in TWO.members]
    by_set = method_from("union", [f"members={json.dumps(members)}"])
    (tmp_path / "two.json").write_text(json.dumps({"parts": members}, indent="\t"))
    found = [
        pk.recipe(path),
        pk.recipe(str(path)),
        pk.recipe(path.read_text()),
        pk.recipe(tmp_path / "two.json"),
        by_set,
    ]
    for method in [*found, method_from(str(path), [])]:
        assert method == TWO
        assert method.to_json() == TWO.to_json()


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("method: lora", pk.LoRA()),
        ("lora", pk.LoRA()),
        ("{method: lora, rank: 3}", pk.LoRA(rank=3)),
        ("method: lora\ntargets: q\nlayers: 0", pk.Union(pk.at("q", pk.LoRA(), layers=0))),
        ("parts: [bitfit, {method: houlsby}]", pk.Union(pk.BitFit(), pk.Houlsby())),
        ("method: gated\ninner: lora", pk.Gated(pk.LoRA())),
        ("method: gated\ninner:\n  method: lora\n  rank: 2", pk.Gated(pk.LoRA(rank=2))),
        ("parts:\n- parts: [lora, ia3]\n  layers: [1]", pk.Union(pk.at((), pk.Union(pk.LoRA(), pk.IA3()), layers=1))),
        (
            "method: bylayer\nmembers:\n- {method: lora, layers: [0, 1]}\n- {method: ia3, layers: [-1]}",
            pk.ByLayer({(0, 1): pk.LoRA(), -1: pk.IA3()}),
        ),
    ],
)
def test_forms(text, method):
    assert pk.recipe(text) == method


@pytest.mark.parametrize("key", METHODS)
def test_the_json_of_a_method_is_a_recipe(key):
    method = METHODS[key](**METHODS[key].tiny)
    assert pk.recipe(json.dumps(method.to_json())) == method
    assert not {f.name for f in dataclasses.fields(method)} & {"parts", "method"}
    part = pk.Union(pk.at("*.a", method, layers=1))
    assert pk.recipe(json.dumps({"method": method.to_json(), "targets": "*.a", "layers": 1})) == part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("rank: 8", "rnak: 8"), "5: unknown field 'rnak' of LoRA; it has rank, alpha, "),
        (RECIPE.replace("ia3", "ia4"), "9: unknown method 'ia4'; expected one of "),
        (RECIPE.replace("parts", "part"), "2: unknown key 'part'; expected method with its fields or parts"),
        ("parts: [lora]\nrank: 3", "2: unknown key 'rank'; expected targets, exclude, layers or parts"),
        ("targets: q", "1: no method; expected `method: lora` or `parts:`"),
        (RECIPE.replace("rank: 8", "rank: 0"), "5: LoRA rank = 0; expected at least 1"),
        (RECIPE.replace("rank: 8", "rank: 2.5"), "5: rank = '2.5'; expected int"),
        (RECIPE.replace("rank: 8", 'rank: "8"'), "5: rank = '8'; expected int"),
        (RECIPE.replace("rank: 8", "rank: [8]"), "5: rank = a list; expected int"),
        (RECIPE.replace("rank: 8", "rank: {}"), "5: rank = a mapping; expected int"),
        (RECIPE.replace("rank: 8", "rank:"), "5: rank = ''; expected int"),
        (RECIPE.replace("dropout: 0", "dropout: none"), "7: dropout = 'none'; expected float"),
        (RECIPE.replace("dropout: 0", "rank: 9"), "7: rank is given twice"),
        (RECIPE.replace("[0, -1]", "[0, last]"), "10: layers = a list; expected tuple[int, ...] | None"),
        (RECIPE.replace("[q, v]", "{q: v}"), "4: targets = a mapping; expected tuple[str, ...]"),
        ("method: gated", "1: Gated needs the field inner"),
        ("method: gated\ninner:\n  method: lora\n  targets: q", "4: targets of the method inside inner; give them"),
        ("method: gated\ninner: {parts: [lora, ia3]}", "2: Gated got "),
        ("method: [lora, ia3]", "1: a list as a method"),
        ("- lora\n- ia3", "1: a list; several methods are `parts:`"),
        ("parts: lora", "1: parts; expected a list of methods"),
        ("parts: []", "1: parts; expected a list of methods"),
        ("? [lora]\n: 3", "1: a key that is no word"),
        ("parts:\n- &a lora\n- *a", "3: an alias (*a); write out what it stands for"),
        ("parts:\n  - lora\n - ia3", "3: "),
        ("method: lora\n\tscale: 2", "2: found character"),
        ("method: lora\n---\nmethod: ia3", "2: but found another document"),
        ("method: lora\nrank: \x07", "2: special characters are not allowed"),
        ("# nothing", "1: an empty recipe"),
        ("", "1: an empty recipe"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text, message, tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f":{message}")) as caught:
        pk.recipe(path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^recipe:\d+: "):
        pk.recipe(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[q, v]", "[q, vv]", "two.yaml:4: target 'vv' matches nothing in BertForSequenceClassification"),
        ("[q, v]", "[q, gate]", "two.yaml:4: role 'gate' does not exist in family bert"),
        ("[0, -1]", "[0, 7]", "two.yaml:9: layers .7. do not exist among the targets"),
        ("exclude: down", "exclude: [k, v, down]", "two.yaml:10: exclude leaves none of the targets"),
        ('"q"', '"zz"', "two.yaml:4: LoRA pattern 'zz' matches none of the targets"),
    ],
)
def test_what_a_model_lacks_is_told_with_its_line(old, new, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("    alpha: 1e1\n", "")
    (tmp_path / "two.yaml").write_text(text.replace(old, new))
    model = make("bert").model
    with pytest.raises(ValueError, match=f"^{message}"):
        pk.attach(model, pk.recipe("two.yaml"))
    pk.attach(model, pk.LoRA())  # nothing was changed


def test_a_missing_file():
    with pytest.raises(FileNotFoundError):
        pk.recipe("nowhere.yaml")


def test_tune_and_explain_take_a_recipe(capsys, tmp_path):
    path, model = tmp_path / "two.yaml", str(bert(tmp_path / "model"))
    path.write_text(RECIPE)
    code, out, _ = run(capsys, "explain", model, "--method", str(path), "--json")
    assert code == 0
    assert [part["method"] for part in json.loads(out)["adapter"]] == ["union"]
    lines = run(capsys, "explain", model, "--method", str(path))[1].splitlines()
    assert lines[0].startswith("lora on q v: rank=8, ")
    assert lines[1].startswith("ia3 on k v down without down in layers 0 -1: ")
    words = ("--data", str(write(tmp_path / "rows.tsv", toy())), "--epochs", "1", "--out", str(tmp_path / "out"))
    code, _, err = run(capsys, "tune", "--model", model, "--method", str(path), *words)
    assert code == 0, err
    (part, _) = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["parts"]
    assert part["method"] == TWO.to_json()
    path.write_text(RECIPE.replace("alpha", "alhpa"))
    code, _, err = run(capsys, "tune", "--model", model, "--method", str(path), *words)
    assert code == 2
    assert err.startswith(f"peft-kernels: {path}:6: unknown field 'alhpa' of LoRA") and err.count("\n") == 1


def test_set_changes_a_field_of_a_recipe(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("method: lora\nrank: 4\ndropout: 0.5")
    assert method_from(str(path), ["rank=2"]) == pk.LoRA(rank=2, dropout=0.5)
    path.write_text("parts: [lora]")
    with pytest.raises(ValueError, match="union has no field 'rank'; it has members"):
        method_from(str(path), ["rank=2"])


# -- the parts of a saved stack ---------------------------------------------------------------------------------------
STACK = pk.Union(pk.LoRA(rank=2), pk.Houlsby(reduction_factor=2), pk.at("*", pk.BitFit()))


def saved(family, tmp_path, recipe=STACK, **kwargs):
    case = make(family, torch.float64)
    pk.attach(case.model, recipe, name="whole", **kwargs)
    perturb(case.model, "whole")
    return case, pk.save(case.model, tmp_path / "stack", "whole") / "whole"


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "mlp"])
@pytest.mark.parametrize(("part", "numbers"), [("lora", {0}), ("houlsby", {1, 2}), ("bitfit", {3}), (0, {0})])
def test_a_part_of_a_saved_stack_is_loaded_alone(family, part, numbers, tmp_path):
    """Its outputs are those of the stack whose other parts are as they were before training."""
    targets = {"targets": ("first", "second")} if family == "mlp" else {}
    case, place = saved(family, tmp_path, **targets)
    new = make(family, torch.float64)
    pk.attach(new.model, STACK, **targets)
    for tuner, start in zip(all_tuners(case.model, "whole"), all_tuners(new.model, "default"), strict=True):
        if tuner.part is not None and tuner.part not in numbers:
            tuner.load_state_dict(start.state_dict())
    alone = make(family, torch.float64)
    base = alone.call(alone.model)
    pk.load(alone.model, place, part=part)
    assert pk.active(alone.model) == ["whole"]
    out = alone.call(alone.model)
    close(out, case.call(case.model), torch.float64)
    assert not torch.allclose(out, base)
    again = make(family, torch.float64)  # what was loaded is an adapter like any other
    pk.load(again.model, pk.save(alone.model, tmp_path / "alone") / "whole")
    assert torch.equal(again.call(again.model), out)


@pytest.mark.parametrize("key", [key for key in METHODS if METHODS[key].roles])
def test_any_method_can_be_loaded_out_of_a_stack(key, tmp_path):
    """Above (IA)^3 and below it, with the tensors that it has in the stack."""
    method = METHODS[key](**METHODS[key].tiny)
    for n, members in enumerate(((method, pk.IA3()), (pk.IA3(), method))):
        case = make("bert")
        try:
            pk.attach(case.model, pk.Union(*members), seed=3)
        except ValueError:  # it leaves no room for another method
            continue
        perturb(entered(calibrated(case)).model)
        fresh = pk.load(make("bert").model, pk.save(case.model, tmp_path / str(n)), part=n)
        alone = [t for t in all_tuners(fresh, "default") if t.part is not None]
        own = {t.part + n for t in alone}  # (IA)^3 is one part
        whole = [t for t in all_tuners(case.model, "default") if t.part in own]
        assert len(whole) == len(alone) > 0
        for one, other in zip(whole, alone, strict=True):
            values = other.state_dict()
            assert one.state_dict().keys() == values.keys()
            assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("key", [key for key in METHODS if issubclass(METHODS[key], Recipe)])
def test_each_part_of_a_recipe_can_be_loaded_alone(key, tmp_path):
    """All parts together are the whole: its tensors, each once."""
    _, place = saved("bert", tmp_path, METHODS[key](**METHODS[key].tiny))
    whole = load_file(place / "adapter_model.safetensors")
    parts = parts_of(from_config(json.loads((place / "adapter_config.json").read_text()), "")[0])
    assert len(parts) > 1
    found = []
    for n in range(len(parts)):
        model = pk.load(make("bert", torch.float64).model, place, part=n)
        found += tensors(model, "whole").values()
    assert len(found) == len(whole)
    assert sum(t.sum().double() for t in found) == pytest.approx(float(sum(t.sum().double() for t in whole.values())))


def test_parts_of_recipes_in_recipes_and_trained_heads(tmp_path):
    recipe = pk.Union(
        pk.at("q", pk.LoRA(rank=2)), pk.Union(pk.IA3(), pk.at("v", pk.LoRA(rank=3)), pk.at("*", pk.LoRA()))
    )
    case, place = saved("bert", tmp_path, recipe, train=("head", "*.pooler.dense"))

    def loaded(part):
        model = pk.load(make("bert", torch.float64).model, place, part=part)
        return {f"{path}.{name}" for path, t in tuners(model, "whole") for name, _ in t.named_parameters()}

    assert loaded(0) == {f"bert.encoder.layer.{i}.attention.self.query.{ab}" for i in (0, 1) for ab in "ab"}
    assert loaded(2) == {f"bert.encoder.layer.{i}.attention.self.value.{ab}" for i in (0, 1) for ab in "ab"}
    assert not any("pooler" in name for name in loaded(3))  # which was trained whole
    assert len(loaded("ia3")) == 6
    assert loaded("head") == loaded(4)
    assert {name.split(".")[0] for name in loaded("head")} == {"bert", "classifier"}
    with pytest.raises(
        ValueError, match="part = 'lora' is 3 parts; give a number: 0 lora, 1 ia3, 2 lora, 3 lora, 4 head"
    ):
        loaded("lora")
    for part in ("prefix", 5, -1):
        with pytest.raises(ValueError, match=f"part = {part!r} is no part of it; choose one: 0 lora, 1 ia3"):
            loaded(part)


def test_a_part_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    _, place = saved("bert", tmp_path)
    other = make("gpt2")
    before = other.call(other.model)
    with pytest.raises(ValueError, match="the adapter does not fit this model, which lacks the place of "):
        pk.load(other.model, place, part="lora")
    assert torch.equal(other.call(other.model), before)
    with pytest.raises(ValueError, match="has no adapter"):
        pk.active(other.model)
