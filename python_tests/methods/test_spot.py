"""SPoT: what a prompt begins with, and which saved prompts are similar to it."""

import json
import math
import shutil

import pytest
import torch
from models import make, perturb
from prompts import rows, write
from torch.nn.functional import cosine_similarity

import peft_kernels as pk
from peft_kernels.cli import main
from peft_kernels.engine.attach import tuners


def begun(family="bert", **fields):
    """The first rows of a prompt of length 3, or of the one that is given."""
    model = pk.attach(make(family).model, pk.SPoT(**{"length": 3, **fields}))
    return own(model)


def own(model):
    (found,) = [t.rows.detach() for _, t in tuners(model, "default") if isinstance(t, pk.SPoT.tuner)]
    return found


@pytest.fixture
def sources(tmp_path):
    return [write(tmp_path / str(i), rows(i)) for i in range(3)]


# -- what it begins with ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_it_begins_as_its_source(family, tmp_path):
    source = write(tmp_path / "source", rows(0), family=family)
    assert torch.equal(begun(family, source=source), rows(0))


@pytest.mark.parametrize("method", ["spot", "ptuning"])
def test_any_method_that_leaves_rows_is_a_source(method, tmp_path):
    model = pk.attach(make("bert").model, pk.methods()[method](length=3), train=("head",))
    perturb(model)
    if method == "ptuning":
        with pytest.raises(ValueError, match="holds no prompts.*eject"):
            begun(source=str(pk.save(model, tmp_path / "encoder")))
        pk.eject(model)
    where = pk.save(model, tmp_path / "source")
    (kept,) = [p for name, p in model.named_parameters() if name.endswith(".rows")]
    assert torch.equal(begun(source=str(where)), kept)


def test_another_model_class_is_a_source_too(tmp_path):
    """The prompt of a whole classifier for the bare encoder."""
    source = write(tmp_path / "source", rows(0))
    assert torch.equal(own(pk.attach(make("bert").model.bert, pk.SPoT(length=3, source=source))), rows(0))


def test_a_longer_source_is_cut_and_a_shorter_one_filled_up(tmp_path):
    source = write(tmp_path / "source", rows(0))
    assert torch.equal(begun(source=source, length=2), rows(0)[:2])
    longer = begun(source=source, length=5)
    assert torch.equal(longer[:3], rows(0))
    assert torch.equal(longer[3:], begun(length=5)[3:])


def test_a_mixture_is_the_weighted_mean_row_by_row(sources, tmp_path):
    torch.testing.assert_close(begun(source=sources), (rows(0) + rows(1) + rows(2)) / 3)
    mixed = begun(source=sources, weights=(1.0, 2.0, 5.0))
    torch.testing.assert_close(mixed, (rows(0) + 2 * rows(1) + 5 * rows(2)) / 8)
    short = write(tmp_path / "short", rows(7, length=1))
    mixed = begun(source=[short, sources[0]], weights=(1.0, 3.0))
    torch.testing.assert_close(mixed, torch.cat([(rows(7, length=1) + 3 * rows(0)[:1]) / 4, rows(0)[1:]]))


def test_the_nearest_of_several_sources(sources, tmp_path):
    near = write(tmp_path / "near", rows(1) + 0.3 * rows(2))
    assert torch.equal(begun(source=sources, nearest=near), rows(1))
    (first, a), (second, b), _ = pk.similar_prompts(near, sources)
    assert (first, second) == (sources[1], sources[2])
    torch.testing.assert_close(begun(source=sources, nearest=near, top=2), (a * rows(1) + b * rows(2)) / (a + b))
    far = write(tmp_path / "far", -rows(1))
    assert torch.equal(begun(source=[sources[1]], nearest=far), rows(1))  # what there is


def test_without_a_source_it_is_prompt_tuning():
    case = make("bert")
    pk.attach(case.model, pk.PromptTuning(length=3))
    other = pk.attach(make("bert").model, pk.SPoT(length=3))
    assert torch.equal(case.call(other), case.call(case.model))


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_saved_adapter_does_not_need_its_sources(sources, tmp_path):
    case = make("bert")
    pk.attach(case.model, pk.SPoT(length=3, source=sources, nearest=sources[1]))
    perturb(case.model)
    expected = case.call(case.model)
    where = pk.save(case.model, tmp_path / "adapter")
    for source in sources:
        shutil.rmtree(source)
    again = make("bert")
    pk.load(again.model, where, trainable=True)
    assert torch.equal(case.call(again.model), expected)
    (part,) = json.loads((where / "adapter_config.json").read_text())["parts"]
    assert part["method"]["source"] == sources  # where it began can still be read
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        pk.attach(make("bert").model, pk.SPoT(length=3, source=sources))


def test_errors_name_the_directory_and_leave_the_model(sources, tmp_path):
    model = make("bert").model
    pk.attach(model, pk.LoRA())
    lora = pk.save(model, tmp_path / "lora")
    pk.detach(model)
    wide = write(tmp_path / "wide", torch.zeros(3, 16))
    with pytest.raises(ValueError, match="lora holds no prompts"):
        pk.attach(model, pk.SPoT(length=3, source=str(lora)))
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    other = make("bert").model
    pk.attach(other, pk.PromptTuning(length=3))
    (key,) = [name for name, _ in other.named_parameters() if name.endswith(".rows")]
    place, _, last = key.rpartition(".")
    setattr(other.get_submodule(place), last, torch.nn.Parameter(torch.zeros(3, 8)))
    pk.save(other, narrow, force=True)
    with pytest.raises(ValueError, match="8 features, the model takes 16"):
        pk.attach(model, pk.SPoT(length=3, source=(wide, str(narrow))))
    with pytest.raises(ValueError, match="narrow has a prompt of 8 features and .*wide one of 16"):
        pk.similar_prompts(wide, [narrow])
    assert type(model) is type(make("bert").model)
    for fields, message in (
        ({"source": sources, "weights": (1.0,)}, "for 3 sources; expected a positive one for each"),
        ({"source": sources[:1], "weights": (0.0,)}, "expected a positive one for each"),
        ({"nearest": wide}, "expected sources"),
        ({"source": sources, "top": 0}, "at least 1"),
        ({"source": sources[:1], "weights": (1.0,), "nearest": wide}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.SPoT(**fields)


# -- similarity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["average", "per-token"])
def test_similar_prompts(how, tmp_path):
    """Against the definitions, for prompts of several lengths, the most similar one first."""
    mine = rows(0, length=4)
    others = {0: rows(1), 1: mine[:2] + 0.1, 2: -mine, 3: rows(5, length=6)}
    places = [write(tmp_path / str(i), value) for i, value in others.items()]
    found = pk.similar_prompts(write(tmp_path / "mine", mine), places, how)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    assert {place for place, _ in found} == set(places)
    for place, similarity in found:
        other = others[places.index(place)]
        if how == "average":
            truth = cosine_similarity(mine.mean(0), other.mean(0), dim=0)
        else:
            truth = torch.stack([cosine_similarity(a, b, dim=0) for a in mine for b in other]).mean()
        assert math.isclose(similarity, truth, abs_tol=1e-6)
    assert found[0][0] == places[1]
    if how == "average":
        assert math.isclose(found[-1][1], -1)


def test_similar_prompts_checks_its_arguments(sources):
    with pytest.raises(ValueError, match="expected 'average' or 'per-token'"):
        pk.similar_prompts(sources[0], sources, "cosine")
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        pk.similar_prompts(sources[0], ["nowhere"])


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_tune_from_sources(model_dir, tmp_path):
    """A prompt of one task, then one of another that begins with it; both are chosen by name alone."""
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "".join(f"word{i % 7} text{i}\t{'ab'[i % 2]}\n" for i in range(20)))
    common = ["tune", "--model", str(model_dir), "--data", str(data), "--set", "length=4", "--json"]
    for name in "ab":
        assert main([*common, "--method", "prompt", "--seed", str(ord(name)), "--out", str(tmp_path / name)]) == 0
    sources = f"source={tmp_path / 'a'},{tmp_path / 'b'}"
    spot = [*common, "--method", "spot", "--set", sources, "--set", f"nearest={tmp_path / 'b'}"]
    assert main([*spot, "--lr", "1e-9", "--out", str(tmp_path / "spot")]) == 0
    (best, similarity), *_ = pk.similar_prompts(tmp_path / "spot", [tmp_path / "a", tmp_path / "b"])
    assert best == tmp_path / "b"
    assert similarity > 0.999
