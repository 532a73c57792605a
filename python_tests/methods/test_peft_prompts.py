"""Prompts and prefixes in the files of HF PEFT: the same outputs as its model's, and files that it reads."""

import json

import pytest
import torch
from models import close, make, perturb
from safetensors.torch import load_file, save_file
from theirs import adapted, read_by_peft

import peft_kernels as pk

peft = pytest.importorskip("peft")

L = 3


def bare(family):
    """(the model that has hidden states or logits to compare, its inputs): a classifier without its head."""
    case = make(family)
    return (case.model.base_model if family in ("bert", "roberta") else case.model), case.inputs


def states(model, inputs, drop=0):
    """Logits, or hidden states, without the first `drop` rows."""
    with torch.no_grad():
        out = model.eval()(**inputs)
    return (out.logits if "logits" in out else out.last_hidden_state)[:, drop:]


def padded(inputs):
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -2:] = 0
    return {**inputs, "attention_mask": mask}


def text(check, a, b, inputs):
    """Where there is no padding: its positions, of which nobody reads the outputs, are OPT's own affair."""
    if a.shape[:2] == inputs.get("attention_mask", torch.empty(0)).shape:
        a, b = (t[inputs["attention_mask"].bool()] for t in (a, b))
    check(a, b)


TASKS = {"bert": "FEATURE_EXTRACTION", "roberta": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}


def task(family):
    return TASKS.get(family, "CAUSAL_LM")


def dropped(family):
    """An encoder-decoder model has the prompt in its encoder."""
    return 0 if task(family) == "SEQ_2_SEQ_LM" else L


# -- prompts ----------------------------------------------------------------------------------------------------------

CONFIGS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "lstm": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert", "bart"])
def test_prompts_of_peft_are_read_and_written_back(tmp_path, family, kind):
    cls, fields = CONFIGS[kind]
    theirs = adapted(bare(family)[0], cls(task_type=task(family), num_virtual_tokens=L, **fields), by=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model, inputs = bare(family)
    plain = states(model, inputs)
    for given in (inputs, padded(inputs)):
        wanted = states(theirs, given, dropped(family))
        pk.hf.load(model, tmp_path / "theirs", trainable=True)
        close(states(model, given), wanted)
        assert not torch.allclose(wanted, plain)
        pk.hf.save(model, tmp_path / "ours", force=True)
        close(states(read_by_peft(bare(family)[0], tmp_path / "ours"), given, dropped(family)), wanted)
        pk.detach(model)
    before, after = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("theirs", "ours"))
    assert before.keys() == after.keys() == {"prompt_embeddings"}
    assert torch.equal(before["prompt_embeddings"][:L], after["prompt_embeddings"])
    assert (
        pk.counts(pk.hf.load(model, tmp_path / "ours", trainable=True)).trainable == after["prompt_embeddings"].numel()
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "opt"])
def test_prompts_that_are_written_are_read_by_peft(tmp_path, family):
    model, inputs = bare(family)
    pk.attach(model, pk.PromptTuning(length=L), name="one")
    perturb(model, "one")
    pk.hf.save(model, tmp_path)
    wanted = states(model, inputs)
    close(states(read_by_peft(bare(family)[0], tmp_path / "one"), inputs, dropped(family)), wanted)
    assert torch.equal(states(pk.hf.load(bare(family)[0], tmp_path, "one"), inputs), wanted)


def classifier(family):
    """A sequence classifier of two classes of a decoder."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = make(family).model.config
    config.num_labels = 3
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_classifier_of_a_decoder(tmp_path, family, trained):
    """PEFT saves a copy of the head, trained or not; it reads the last row."""
    inputs = make(family).inputs

    def logits(model):
        with torch.no_grad():
            return model(**inputs).logits

    model = pk.attach(classifier(family), pk.PromptTuning(length=L), train=("score",) if trained else ())
    perturb(model)
    pk.hf.save(model, tmp_path)
    theirs = read_by_peft(classifier(family), tmp_path)
    for theirs_mask in ({}, {"attention_mask": torch.ones_like(inputs["input_ids"])}):
        close(theirs(**inputs, **theirs_mask).logits.detach(), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    again = pk.hf.load(classifier(family), tmp_path / "theirs", trainable=True)
    close(logits(again), logits(model))
    assert pk.counts(again).trainable == L * 16 + 48


# -- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "bart", "opt", "qwen2"])
def test_prefixes_of_peft_are_read_and_written_back(tmp_path, family, projected):
    config = peft.PrefixTuningConfig(
        task_type=task(family), num_virtual_tokens=L, prefix_projection=projected, encoder_hidden_size=8
    )
    theirs = adapted(bare(family)[0], config, by=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model, inputs = bare(family)
    plain = states(model, inputs)
    for given in (inputs, padded(inputs)):
        wanted = states(theirs, given)
        pk.hf.load(model, tmp_path / "theirs", trainable=True)
        text(close, states(model, given), wanted, given)
        assert not torch.allclose(wanted, plain)
        pk.hf.save(model, tmp_path / "ours", force=True)
        text(close, states(read_by_peft(bare(family)[0], tmp_path / "ours"), given), wanted, given)
        pk.detach(model)
    before, after = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("theirs", "ours"))
    assert before.keys() == after.keys() == {"prompt_embeddings"}
    if family != "bart":  # of which PEFT uses every second pair
        assert torch.equal(before["prompt_embeddings"], after["prompt_embeddings"])


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_prefixes_that_are_written_are_read_by_peft(tmp_path, family, hidden):
    model, inputs = bare(family)
    perturb(pk.attach(model, pk.PrefixTuning(length=L, hidden=hidden, shift=True)))
    pk.hf.save(model, tmp_path)
    wanted = states(model, inputs)
    close(states(read_by_peft(bare(family)[0], tmp_path), inputs), wanted)
    close(states(pk.hf.load(bare(family)[0], tmp_path), inputs), wanted)


def test_a_prefix_under_a_classifier(tmp_path):
    case = make("bert")
    theirs = peft.get_peft_model(make("bert").model, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=L))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs.eval()(**case.inputs).logits.detach()
    model = pk.hf.load(case.model, tmp_path / "theirs")
    close(case.call(model.eval()).detach(), wanted)
    pk.hf.save(model, tmp_path / "ours")
    close(read_by_peft(make("bert").model, tmp_path / "ours")(**case.inputs).logits.detach(), wanted)


def test_prefixes_that_these_files_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="has shift=False; in PEFT"):
        pk.hf.save(pk.attach(make("gpt2").model, pk.PrefixTuning(length=L)), tmp_path)
    with pytest.raises(ValueError, match="has not one prefix at every self-attention"):
        pk.hf.save(pk.attach(make("gpt2").model, pk.PrefixTuning(length=L, shift=True), layers=0), tmp_path)
    with pytest.raises(ValueError, match="has not one prefix at every self-attention"):
        pk.hf.save(pk.attach(make("bart").model, pk.PrefixTuning(length=L, shift=True)), tmp_path)
    with pytest.raises(ValueError, match="relative positions of a T5"):
        pk.hf.save(pk.attach(make("t5").model, pk.PrefixTuning(length=L)), tmp_path)
    bart = make("bart").model
    targets = [f"attn@model.decoder.layers.{i}.self_attn" for i in range(2)]
    pk.attach(bart, pk.PrefixTuning(length=L, shift=True), targets)
    with pytest.raises(ValueError, match="two layers of such a decoder one prefix"):
        pk.hf.save(bart, tmp_path)
    assert not list(tmp_path.iterdir())
    pk.hf.save(pk.attach(make("gpt2").model, pk.PrefixTuning(length=L, shift=True)), tmp_path)
    with pytest.raises(ValueError, match="relative positions of a T5"):
        pk.hf.load(make("t5").model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(L, 50)}, file)
    with pytest.raises(ValueError, match=r"has prompt_embeddings \(3, 50\); expected \[3, 2 layers"):
        pk.hf.load(make("gpt2").model, tmp_path)


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_head_that_reads_the_first_row_is_refused(tmp_path):
    """In PEFT it reads the prompt's, here the text's."""
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=L)
    peft.get_peft_model(make("bert").model, config).save_pretrained(tmp_path / "theirs")
    model = make("bert").model
    with pytest.raises(ValueError, match="reads the first row of P"):
        pk.hf.load(model, tmp_path / "theirs")
    with pytest.raises(ValueError, match="reads the first row of P"):
        pk.hf.save(pk.attach(model, pk.PromptTuning(length=L)), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("method", "targets", "told"),
    [
        (pk.Union(pk.PromptTuning(length=2), pk.LoRA(rank=2)), None, "these files of PEFT take LoRA alone"),
        (pk.Union(pk.PromptTuning(length=2), pk.PromptTuning(length=3)), None, "is not one prompt of texts"),
    ],
)
def test_what_these_files_cannot_hold_is_told(tmp_path, method, targets, told):
    model = pk.attach(make("gpt2").model, method, targets)
    with pytest.raises(ValueError, match="PEFT") as error:
        pk.hf.save(model, tmp_path / "out")
    assert told in str(error.value) and not (tmp_path / "out").exists()


def _lost(values):
    del values["prompt_embeddings"]


def _flat(values):
    values["prompt_embeddings"] = values["prompt_embeddings"].flatten()


def _wide(values):
    values["prompt_embeddings"] = torch.zeros(L, 17)


def _more(values):
    values["base_model.transformer.wte.weight"] = torch.zeros(50, 16)


@pytest.mark.parametrize(
    ("spoil", "fields", "told"),
    [
        (_lost, {}, "has prompt_embeddings None"),
        (_flat, {}, "has prompt_embeddings (48,)"),
        (_wide, {}, "does not fit this model"),
        (_more, {}, "has base_model.transformer.wte.weight, which is neither prompt tuning nor of modules_to_save"),
        (dict, {"num_virtual_tokens": 4}, "num_virtual_tokens = 4; expected"),
        (dict, {"peft_type": "MULTITASK_PROMPT_TUNING"}, "is MULTITASK_PROMPT_TUNING of PEFT; expected one of"),
    ],
)
def test_what_cannot_be_read_is_told_and_the_model_untouched(tmp_path, spoil, fields, told):
    pk.hf.save(pk.attach(make("gpt2").model, pk.PromptTuning(length=L)), tmp_path)
    path, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    values = load_file(file)
    spoil(values)
    save_file(values, file)
    model = make("gpt2").model
    with pytest.raises(ValueError, match=".") as error:
        pk.hf.load(model, tmp_path)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not any("peft" in name for name, _ in model.named_modules())
