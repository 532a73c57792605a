"""The commands beside tune, and how words become the fields of a method."""

import json
import subprocess
import sys

import pytest
import torch
from texts import run

import peft_kernels as pk
from peft_kernels import cli

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
    text = run(capsys, "methods")[1]
    assert all(key in text for key in pk.methods()) and "rank=8" in text


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
    got = cli.parse(hint, text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("hint", "text"), [(int, "2.5"), (bool, "perhaps"), (int | None, "x"), (dict[str, int], "[1]")]
)
def test_field_values_of_another_type_are_refused(hint, text):
    with pytest.raises((ValueError, TypeError)):
        cli.parse(hint, text)


def test_import_stays_light():
    """What only the command line needs is not imported with the package."""
    heavy = "{'transformers', 'sklearn', 'matplotlib', 'sacrebleu', 'yaml'}"
    code = f"import sys, peft_kernels; print({heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout.strip(), ran.stderr) == ("set()", "")
