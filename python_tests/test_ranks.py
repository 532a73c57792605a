"""`peft-kernels methods --rank`: the rank of each method's change, measured."""

import json

import pytest
import torch

import peft_kernels as pk
from peft_kernels import cli
from peft_kernels.ranks import _measured, ranks

SIZE = 24


@pytest.fixture(scope="module")
def found():
    return ranks(SIZE)


def test_every_method_has_a_row(found):
    assert list(dict.fromkeys(row["method"] for row in found)) == list(pk.methods())
    for row in found:
        assert (row["numbers"] is None) == (row["rank"] is None) == (row["rank_per_number"] is None) == bool(row["why"])
        assert "\n" not in row["why"]


def test_no_rank_is_above_its_bound(found):
    measured = [row for row in found if row["rank"]]
    assert len(measured) > len(pk.methods()) // 3
    for row in measured:
        assert 0 < row["rank"] <= row["bound"], row["method"]
        assert row["rank_per_number"] == row["rank"] / row["numbers"]


def test_what_the_methods_have(found):
    rows = {(row["method"], *row["settings"].values()): row for row in found}
    for key, expected in {
        ("lora", 1): (2 * SIZE, 1),
        ("lora",): (16 * SIZE, 8),
        ("dora",): (17 * SIZE, SIZE),
        ("ia3",): (SIZE, SIZE),
        ("full",): (SIZE**2, SIZE),
        ("svd", SIZE // 4): (SIZE**2 // 2, SIZE // 4),
        ("bitfit",): (None, None),
        ("gated",): (None, None),
        ("krona_res",): (None, None),
    }.items():
        assert (rows[key]["numbers"], rows[key]["rank"]) == expected, key


@pytest.mark.parametrize(("method", "settings", "rank"), [(pk.KronA, {}, 576), (pk.LoRA, {"rank": 1}, 1)])
def test_the_figures_of_the_survey(method, settings, rank):
    found = _measured(method, settings, 768)
    assert (found["numbers"], found["rank"], found["bound"]) == (1536, rank, rank)


def test_the_command(capsys, found, monkeypatch):
    state = torch.get_rng_state()
    assert cli.main(["methods", "--rank", str(SIZE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found and torch.equal(torch.get_rng_state(), state)
    assert cli.main(["methods", "--rank", "2"]) == 2
    assert "expected at least 8" in capsys.readouterr().err
    monkeypatch.setattr("peft_kernels.ranks.ranks", lambda size: found if size == 768 else None)
    assert cli.main(["methods", "--rank"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(found) and lines[0].split()[:3] == ["method", "numbers", "rank"]
    words = {tuple(line.split()[:2]): line.split()[2:] for line in lines}
    assert words["lora", "rank=1"] == ["48", "1", "0.021"] and words["gated", "-"] == ["-", "-", "needs", "inner"]
