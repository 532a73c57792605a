"""LoKr against HF PEFT's layers with the same numbers and the same draws, and its files read and written."""

import copy
import json
import math

import pytest
import torch
from models import close, make, perturb
from safetensors.torch import load_file, save_file
from theirs import moved
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

peft = pytest.importorskip("peft")
lokr = pytest.importorskip("peft.tuners.lokr.layer")

NAMES = {"rank": "r"}  # ours -> PEFT's; the others are the same


def plain(kind, dtype=torch.float64):
    """(model of one layer, an input)"""
    torch.manual_seed(0)
    layer, shape = {
        "linear": (lambda: nn.Linear(40, 24), (3, 5, 40)),
        "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 5, 5)),
        "conv2d 1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 5)),
        "conv1d": (lambda: nn.Conv1d(16, 24, 3, stride=2), (2, 16, 9)),
    }[kind]
    return nn.Sequential(layer()).to(dtype), torch.randn(shape, dtype=dtype)


def config(targets, **fields):
    fields.pop("zero", None)
    return peft.LoKrConfig(target_modules=targets, **{NAMES.get(key, key): value for key, value in fields.items()})


def both(kind, dtype=torch.float64, **fields):
    """(our model, HF PEFT's, an input) with the same numbers, in training mode."""
    (ours, x), (theirs, _) = plain(kind, dtype), plain(kind, dtype)
    perturb(pk.attach(ours, pk.LoKr(**fields), ("0",)))
    theirs = peft.inject_adapter_in_model(config(["0"], **fields), theirs)
    for name, p in tuner_of(ours).named_parameters():
        held = getattr(theirs[0], f"lokr_{name}")["default"]
        assert held.shape == p.shape, name
        getattr(theirs[0], f"lokr_{name}")["default"] = nn.Parameter(p.detach().clone())
    assert len(list(tuner_of(ours).parameters())) == sum(p.requires_grad for p in theirs.parameters())
    return ours.train(), theirs.train(), x


def tuner_of(model):
    return next(tuner for _, tuner in tuners(model, "default"))


def run(model, x, params):
    """The output and the gradients of the parameters and of x."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    return y, *torch.autograd.grad((y.double() * weight).sum(), [x, *params])


def same(ours, theirs, x, dtype=torch.float64):
    own = dict(tuner_of(ours).named_parameters())
    other = [getattr(theirs[0], f"lokr_{name}")["default"] for name in own]
    for a, b in zip(run(ours, x, own.values()), run(theirs, x, other), strict=True):
        close(a, b, dtype)


FORMS = {
    "default": {},
    "low": {"rank": 2, "alpha": 3.0},
    "both low": {"rank": 1, "decompose_both": True},
    "full": {"rank": 64},
    "a divisor": {"rank": 2, "decompose_factor": 2},
    "a bound": {"rank": 1, "decompose_factor": 7},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d 1x1"])
def test_outputs_and_gradients_are_those_of_peft(kind, form):
    same(*both(kind, **FORMS[form]))


@pytest.mark.parametrize(("kind", "rank"), [("conv2d", 1), ("conv2d 1x1", 1), ("conv1d", 2)])
def test_the_tucker_form_is_that_of_peft(kind, rank):
    ours, theirs, x = both(kind, rank=rank, use_effective_conv2d=True)
    assert (tuner_of(ours).t2 is None) == (kind == "conv2d 1x1")
    same(ours, theirs, x)


def test_a_1d_convolution_of_low_rank_is_that_of_peft():
    same(*both("conv1d", rank=1))


def test_gradients_in_fp32():
    same(*both("linear", torch.float32, rank=2), torch.float32)


def test_beside_a_16_bit_weight_the_numbers_are_fp32():
    ours, _, x = both("linear", torch.bfloat16, rank=2)
    exact = copy.deepcopy(ours).double()
    assert all(p.dtype == torch.float32 for p in tuner_of(ours).parameters())
    found = [run(m, inputs, list(tuner_of(m).parameters())) for m, inputs in ((ours, x), (exact, x.double()))]
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


@pytest.mark.parametrize("fields", [{}, {"rank_dropout_scale": True}], ids=["", "scaled"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_draws_of_training_are_those_of_peft(kind, fields):
    """First whether the product is left out, then which features are."""
    ours, theirs, x = both(kind, rank=2, rank_dropout=0.5, module_dropout=0.3, **fields)
    base, different = plain(kind)[0](x), set()
    for seed in range(8):
        torch.manual_seed(seed)
        y = ours(x)
        torch.manual_seed(seed)
        close(y, theirs(x), torch.float64)
        different.add(int((y != base).flatten(2).any(2).any(0).sum()) if kind == "conv2d" else int((y != base).sum()))
    assert 0 in different and len(different) > 2
    ours.eval(), theirs.eval()
    same(ours, theirs, x)


def test_where_every_feature_is_dropped_the_change_is_zero():
    """PEFT divides by the share that is kept, which is none."""
    ours, _, x = both("linear", rank=2, rank_dropout=1.0, rank_dropout_scale=True)
    assert torch.equal(ours(x), plain("linear")[0](x))


def test_the_divisors_are_those_of_peft():
    for factor in (-1, 1, 2, 3, 4, 6, 7, 8, 16, 100):
        method = pk.LoKr(decompose_factor=factor)
        for n in range(1, 300):
            assert method.divided(n) == lokr.factorization(n, factor), (n, factor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_rank_is_that_of_the_change(kind, form):
    model, _, _ = both(kind, **FORMS[form])
    weight = model[0].weight.detach().flatten(1)
    change = tuner_of(model).fold(torch.zeros_like(weight), None)[0]
    assert torch.linalg.matrix_rank(change) == pk.counts(model).rank
    assert pk.counts(model).changed == weight.numel()


def test_counts_of_bert_base():
    """768 = 24 * 32: w1 24 x 24, and w2 32 x 32 of rank 8."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    pk.attach(model, pk.LoKr())
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 24 * (24 * 24 + 2 * 8 * 32) == 26_112
    assert (counts.changed, counts.rank) == (24 * 768**2, 24 * 24 * 8)


def test_either_factor_may_start_at_zero():
    for zero, fields in ((z, f) for z in ("w1", "w2") for f in FORMS.values()):
        ours, _ = plain("linear")
        tuner = tuner_of(pk.attach(ours, pk.LoKr(zero=zero, **fields), ("0",)))
        zeros = {name for name, p in tuner.named_parameters() if not p.any()}
        assert {name.partition("_")[0] for name in zeros} == {zero} and len(zeros) == 1
        other = tuner.right() if zero == "w1" else tuner.left()
        drawn = peft.inject_adapter_in_model(config(["0"], **fields), plain("linear")[0])[0]
        theirs = drawn.lokr_w2["default"] if zero == "w1" and "default" in drawn.lokr_w2 else None
        if theirs is not None:  # the same bound of the draw
            assert other.abs().max() <= 1 / math.sqrt(theirs.shape[1])
            assert 0.5 < other.std() / theirs.std() < 2


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank": 0}, "rank = 0; expected at least 1"),
        ({"rank_pattern": {"q": 0}}, "q = 0; expected at least 1"),
        ({"rank_dropout": 1.5}, "rank_dropout = 1.5; expected a probability"),
        ({"module_dropout": -0.1}, "module_dropout = -0.1; expected a probability"),
        ({"decompose_factor": 0}, "decompose_factor = 0; expected at least 1, or -1"),
        ({"zero": "w3"}, "zero = 'w3'; expected one of w1, w2"),
    ],
)
def test_bad_values_are_refused(fields, told):
    with pytest.raises(ValueError, match="LoKr") as error:
        pk.LoKr(**fields)
    assert told in str(error.value)


def test_a_pattern_without_a_target_is_refused():
    with pytest.raises(ValueError, match="matches none of the targets"):
        pk.attach(make("bert").model, pk.LoKr(rank_pattern={"down": 2}))


# -- files ------------------------------------------------------------------------------------------------------------


def outputs(case, model):
    with torch.no_grad():
        return case.call(model.eval())


SETTINGS = [
    ("llama", ["q_proj", "v_proj"], {"r": 1, "alpha": 3}),
    ("llama", "all-linear", {"r": 2, "decompose_both": True, "decompose_factor": 2}),
    ("llama", r".*layers\.1\.mlp\..*_proj", {"r": 64, "rank_dropout": 0.5, "module_dropout": 0.1}),
    (
        "llama",
        ["q_proj", "o_proj"],
        {"r": 1, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {r"0\.self_attn.q_proj": 2}},
    ),
    ("bert", ["query", "dense"], {"r": 1, "modules_to_save": ["classifier"], "init_weights": "lycoris"}),
    ("roberta", ["query"], {"r": 1, "task_type": "SEQ_CLS"}),  # which saves its head, of two linears
    ("vit", ["projection", "fc1"], {"r": 1, "use_effective_conv2d": True}),
]


@pytest.mark.parametrize(("family", "targets", "settings"), SETTINGS, ids=range(len(SETTINGS)))
def test_files_of_peft_are_read_and_written_back(tmp_path, family, targets, settings):
    case = make(family)
    theirs = moved(peft.get_peft_model(make(family).model, peft.LoKrConfig(target_modules=targets, **settings)))
    theirs.save_pretrained(tmp_path / "theirs")
    model = pk.hf.load(case.model, tmp_path / "theirs", trainable=True)
    wanted = outputs(case, theirs)
    assert not torch.allclose(wanted, outputs(case, make(family).model))
    close(outputs(case, model), wanted)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert pk.counts(model).trainable == trained

    pk.hf.save(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = peft.PeftModel.from_pretrained(make(family).model, tmp_path / "ours", is_trainable=True)
    close(outputs(case, again), wanted)
    read, written = (peft.PeftConfig.from_pretrained(tmp_path / where).to_dict() for where in ("theirs", "ours"))
    for key in ("alpha", "r", "decompose_factor", "rank_dropout", "module_dropout", "use_effective_conv2d"):
        assert read[key] == written[key]
    pk.save(model, tmp_path / "native")
    close(outputs(case, pk.load(make(family).model, tmp_path / "native")), wanted)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_is_written_is_read_by_peft(tmp_path, family):
    case = make(family)
    method = pk.LoKr(rank=1, rank_pattern={"v": 3}, alpha_pattern={"q": 5.0}, rank_dropout=0.25)
    pk.attach(case.model, method, train=("head",), name="one")
    perturb(case.model, "one")
    where = pk.hf.save(case.model, tmp_path)
    assert (where / "one" / "adapter_config.json").exists()
    theirs = peft.PeftModel.from_pretrained(make(family).model, where / "one")
    close(outputs(case, theirs), outputs(case, case.model))
    again = pk.hf.load(make(family).model, where, "one")
    assert torch.equal(outputs(case, again), outputs(case, case.model))
    assert pk.active(again) == ["one"] and not any(p.requires_grad for p in again.parameters())


def test_a_path_that_ends_others(tmp_path):
    """PEFT takes a target for every path that ends in it: "0" is also "1.0"."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 4)))

    ours, x = pk.attach(model(), pk.LoKr(rank=1, rank_pattern={"@0": 9}), ("@0",)), torch.randn(3, 4)
    perturb(ours)
    pk.hf.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert [n for n, m in theirs.named_modules() if isinstance(m, lokr.LoKrLayer)] == ["base_model.model.0"]
    close(theirs(x), ours(x))


def test_writing_replaces_only_when_told(tmp_path):
    model = pk.attach(make("llama").model, pk.LoKr())
    pk.hf.save(model, tmp_path)
    with pytest.raises(FileExistsError, match="force=True"):
        pk.hf.save(model, tmp_path)
    pk.hf.save(model, tmp_path, force=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOKR"


@pytest.mark.parametrize(
    ("family", "method", "targets", "told"),
    [
        ("bert", pk.BitFit(), None, "has bitfit; PEFT's files take LoKr, LoRA"),
        ("gpt2", pk.LoKr(), None, "PEFT has LoKr of whole ones"),  # rows of c_attn
        ("gpt2", pk.LoKr(), "down", "is a Conv1D, which PEFT's LoKr does not know"),
        ("whisper", pk.LoKr(), "*.conv1", "has a full w2, of which PEFT makes no Kronecker product"),
        ("bert", pk.Union(pk.LoKr(), pk.at("down", pk.LoKr(rank_dropout=0.5))), None, "LoKr of 2 settings"),
    ],
    ids=["bitfit", "rows", "Conv1D", "conv1d", "parts"],
)
def test_what_these_files_cannot_hold_is_told_and_nothing_written(tmp_path, family, method, targets, told):
    model = pk.attach(make(family).model, method, targets)
    with pytest.raises(ValueError, match="PEFT") as error:
        pk.hf.save(model, tmp_path / "out")
    assert told in str(error.value) and not (tmp_path / "out").exists()


def _spoiled(change):
    def spoil(where):
        values = load_file(where / "adapter_model.safetensors")
        told = change(values)
        save_file(values, where / "adapter_model.safetensors")
        return told

    return spoil


def _reconfigured(told, **fields):
    def spoil(where):
        path = where / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return told

    return spoil


def _strange(values):
    values["base_model.model.nowhere.weight"] = torch.zeros(2)
    return "has base_model.model.nowhere.weight, which is neither LoKr nor of modules_to_save"


def _lost(values):
    del values[min(values)]
    return "it lacks 1 tensors"


def _three(values):
    values[min(values)] = torch.zeros(2, 2, 2)
    values[min(values).replace("lokr_w1", "lokr_w2")] = torch.zeros(2, 2, 2)
    return "of a 1-d convolution"


def _empty(values):
    values.clear()
    return "has no tensors of LoKr"


@pytest.mark.parametrize(
    "spoil",
    [
        *map(_spoiled, (_strange, _lost, _three, _empty)),
        _reconfigured("is LOHA of PEFT; expected one of LOKR, LORA, IA3", peft_type="LOHA"),
        _reconfigured("which is neither LoRA nor of modules_to_save", peft_type="LORA"),
        _reconfigured("LoKr decompose_factor = 0", decompose_factor=0),
        _reconfigured("gives rank or alpha None", r=None),
        _reconfigured("does not fit this model", r=3),
    ],
    ids=["strange", "lost", "conv1d", "empty", "loha", "lora", "factor", "rank", "another rank"],
)
def test_what_cannot_be_read_is_told_and_the_model_untouched(tmp_path, spoil):
    pk.hf.save(pk.attach(make("llama").model, pk.LoKr(rank=1)), tmp_path)
    told, model = spoil(tmp_path), make("llama").model
    with pytest.raises(ValueError, match=".") as error:
        pk.hf.load(model, tmp_path)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not any("peft" in name for name, _ in model.named_modules())


def test_each_reader_names_the_other(tmp_path):
    model = pk.attach(make("llama").model, pk.LoKr(rank=1))
    pk.hf.save(model, tmp_path / "theirs")
    pk.save(model, tmp_path / "ours")
    with pytest.raises(ValueError, match="pk.load reads what pk.save wrote"):
        pk.hf.load(make("llama").model, tmp_path / "ours")
    with pytest.raises(ValueError, match="was written by Hugging Face PEFT"):
        pk.load(make("llama").model, tmp_path / "theirs")
    with pytest.raises(FileNotFoundError):
        pk.hf.load(make("llama").model, tmp_path)
