"""The commands beside tune, and how words become the fields of a method."""

import json
import re
import subprocess
import sys

import pytest
import torch
from models import METHODS, UNMERGEABLE, calibrated, make
from texts import bert, run

import peft_kernels as pk
from peft_kernels import overview, settings
from peft_kernels.engine.life import timeline
from peft_kernels.engine.method import FAMILIES

pytest.importorskip("transformers")


def test_info(capsys):
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["torch"] == torch.__version__
    assert facts["ops"].keys() == pk.ops.all_ops().keys()
    assert all(backends["reference"] == "" for backends in facts["ops"].values())
    assert "reference" in run(capsys, "info")[1]


def test_methods(capsys):
    code, out, _ = run(capsys, "methods", "--json")
    assert code == 0 and [m["key"] for m in json.loads(out)] == list(pk.methods())
    lines = run(capsys, "methods")[1].splitlines()
    assert lines[0].split()[:4] == ["method", "family", "kernel", "merges"] and "trainable" not in lines[0]
    found = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert found == {key: cls.family for key, cls in pk.methods().items()}
    assert list(found.values()) == sorted(found.values(), key=FAMILIES.index)


def test_methods_of_a_key_show_their_fields(capsys):
    code, text, _ = run(capsys, "methods", "lora", "gated")
    assert code == 0 and len(text.split("\n\n")[0].splitlines()) == 3
    assert re.search(r"--set rank=8 +int +rows of A", text)
    assert re.search(r"--set inner=\.\.\. +Method +the gated one", text)
    (lora,) = json.loads(run(capsys, "methods", "lora", "--json")[1])
    assert (lora["paper"], lora["kernel"], lora["mergeable"]) == ("2106.09685", ["lora"], True)
    assert lora["fields"][0]["default"] == 8 and lora["fields"][0]["comment"]
    code, _, err = run(capsys, "methods", "lorra")
    assert code == 2 and "unknown method 'lorra'" in err and err.count("\n") == 1


@pytest.mark.parametrize("key", METHODS)
def test_what_merges_is_known_without_a_model(key):
    found = overview.mergeable(METHODS[key])
    assert found is None if key in ("union", "bylayer") else found == (key not in UNMERGEABLE)


def test_every_paper_is_told():
    rows = {row["key"]: row for row in overview.overview()}
    without = {key for key, row in rows.items() if not row["paper"]}
    assert without <= {"full", "head", "toplayers", "union", "bylayer"}
    assert rows["svd"]["paper"] == "Eckart & Young 1936, Psychometrika"
    for row in rows.values():
        assert row["what"] and "\n" not in row["what"] and row["summary"].startswith(row["what"])


def test_methods_counts_each_on_a_model(capsys, tmp_path):
    """By the config alone; as many as an adapter on the model itself has, attached and after its phases."""
    model = bert(tmp_path / "model")
    (model / "model.safetensors").unlink()
    rows = {row["key"]: row for row in json.loads(run(capsys, "methods", "--model", model, "--json")[1])}
    assert list(rows) == list(pk.methods())
    for row in rows.values():
        assert row["why"] or row["trainable"] > 0 and row["total"] > 0, row
    assert rows["lora"]["trainable"] == rows["lora"]["stored"] == 2 * 2 * 8 * (32 + 32)
    assert rows["head"]["why"] == "target 'head' matches nothing in BertModel" and rows["head"]["trainable"] is None
    assert rows["gated"]["why"] == "needs inner"
    text = run(capsys, "methods", "--model", model)[1]
    assert re.search(r"\nlora .* yes +2,048 +4,096 +32 +2,048 ", text)
    assert re.search(r"\nhead .* - +- +- +- .*not on this model: target 'head' matches nothing", text)


@pytest.mark.parametrize("key", ["adamix", "diffpruning", "far", "fishmask", "lets", "ltsft", "random", "structured"])
def test_counts_without_values_are_those_of_a_training(key):
    case = make("bert")
    found, _ = overview.on_copy(case.model, METHODS[key]())
    pk.attach(case.model, METHODS[key]())
    trainable = 0
    for entry in timeline(case.model, ["default"], 100):
        entry.enter(case.model)
        if entry.phase.steps:
            trainable = max(trainable, pk.counts(calibrated(case).model).trainable)
    true = pk.counts(case.model)
    assert found.pop("rank") >= true.rank  # a bound, which is lower where what is kept lies in few rows
    assert found == {**{name: getattr(true, name) for name in found}, "trainable": trainable}


def test_methods_shows_what_a_comparison_measured(capsys, tmp_path):
    log, figures = (
        tmp_path / "comparison.json",
        dict(zip(overview.AXES, (3e5, 12e7, 12.3, 0.83, 1.07, 1.0), strict=True)),
    )
    rows = [{"method": "lora", **figures}, {"method": "said", "failed": "exit code 3"}, {"method": "class_mean"}]
    log.write_text(json.dumps({"rows": rows}))
    found = {row["key"]: row for row in json.loads(run(capsys, "methods", "--log", log, "--json")[1])}
    assert found["lora"]["measured"] == figures and found["ia3"]["measured"] is None
    assert found["said"]["measured"] == {"failed": "exit code 3"} and list(found) == list(pk.methods())
    text = run(capsys, "methods", "lora", "said", "--log", log)[1]
    assert re.search(r"\nlora .* yes +300\.0 kB +120\.0 MB +12\.3 +83\.0% +1\.07 +1\.00 ", text)
    assert re.search(r"\nsaid .*failed: exit code 3", text)
    log.write_text("[]")
    code, _, err = run(capsys, "methods", "--log", log)
    assert code == 2 and "is no log of a comparison; expected comparison.json" in err
    assert run(capsys, "methods", "lora", "--rank")[0] == 2


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "3", 3),
        (float, "1e-3", 1e-3),
        (bool, "true", True),
        (bool, "0", False),
        (str, "relu", "relu"),
        (int | None, "none", None),
        (int | None, "3", 3),
        (str | float, "0.5", 0.5),
        (tuple[str, ...], "q,v", ("q", "v")),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (dict[str, int], '{"q": 4}', {"q": 4}),
    ],
)
def test_field_values_follow_their_type(hint, text, value):
    got = settings.parse(hint, text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("hint", "text"), [(int, "2.5"), (bool, "perhaps"), (int | None, "x"), (dict[str, int], "[1]")]
)
def test_field_values_of_another_type_are_refused(hint, text):
    with pytest.raises((ValueError, TypeError)):
        settings.parse(hint, text)


def test_import_stays_light():
    """What only the command line needs is not imported with the package."""
    heavy = "{'transformers', 'sklearn', 'matplotlib', 'sacrebleu', 'yaml'}"
    code = f"import sys, peft_kernels; print({heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout.strip(), ran.stderr) == ("set()", "")
