"""WARP: rows around the text and a [MASK], whose representation class embeddings are compared with."""

import copy
import inspect

import pytest
import torch
from models import _SIZES, _config, close, make, perturb
from torch.nn import functional as F

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

FAMILIES = ("bert", "roberta", "distilbert", "electra")
families = pytest.mark.parametrize("family", FAMILIES)
MASK, CLASSES, LENGTHS = 4, 3, (6, 3, 9, 2)
FRONT, BETWEEN, BEHIND = 1, 2, 2


def masked(family, dtype=torch.float32):
    """A tiny ...ForMaskedLM model."""
    from transformers import AutoModelForMaskedLM

    sizes = {**_SIZES, "max_position_embeddings": 24, "pad_token_id": 0}
    sizes |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24} if family == "distilbert" else {}
    sizes |= {"embedding_size": 8} if family == "electra" else {}
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(_config(family, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype).eval()


def warped(model, **fields):
    """(the frozen model, the same with WARP, P, V)"""
    frozen = copy.deepcopy(model).requires_grad_(False)
    cfg = pk.WARP(FRONT + BETWEEN + BEHIND, FRONT, BEHIND, mask_token=MASK, num_labels=CLASSES)
    pk.attach(model, pk.Method.from_json({**cfg.to_json(), **fields}))
    perturb(model)
    own = dict(named for _, t in tuners(model, "default") for named in t.named_parameters())
    return frozen, model, own["rows"], own["weight"]


def batch(side):
    """Ids and mask of texts of LENGTHS, padded, and the texts: [CLS] words [SEP]."""
    torch.manual_seed(1)
    texts = [torch.cat([torch.tensor([1]), torch.randint(5, 50, (n - 2,)), torch.tensor([2])]) for n in LENGTHS]
    ids, mask = torch.zeros(2, len(texts), max(LENGTHS), dtype=torch.long)
    for row, text in enumerate(texts):
        at = slice(0, len(text)) if side == "right" else slice(ids.shape[1] - len(text), None)
        ids[row, at], mask[row, at] = text, 1
    return {"input_ids": ids, "attention_mask": mask}, texts


def transform(model, h):
    """The LM head without its decoder, in plain torch."""
    kind = model.config.model_type
    if kind == "bert":
        return model.cls.predictions.transform(h)
    if kind == "roberta":
        return model.lm_head.layer_norm(F.gelu(model.lm_head.dense(h)))
    if kind == "distilbert":
        return model.vocab_layer_norm(F.gelu(model.vocab_transform(h)))
    return model.generator_predictions.LayerNorm(F.gelu(model.generator_predictions.dense(h)))


def spelled_out(model, text, p, v):
    """Class logits of one text: the model on [CLS] P text P [MASK] P [SEP]."""
    words = model.get_input_embeddings()
    e, mask = words(text), words(torch.tensor([MASK]))
    pieces = [e[:1], p[:FRONT], e[1:-1], p[FRONT : FRONT + BETWEEN], mask, p[FRONT + BETWEEN :], e[-1:]]
    out = model.base_model(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state[0]
    at = len(text) - 1 + FRONT + BETWEEN
    h = out[at] if model.get_output_embeddings() is None else transform(model, out[at])
    return v @ h


# -- what it computes -------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", ["masked", "classifier"])
def test_against_the_spelled_out_sequence(family, side, head):
    frozen, model, p, v = warped(masked(family) if head == "masked" else classifier(family))
    inputs, texts = batch(side)
    labels = torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        out = model(**inputs, labels=labels)
        truth = torch.stack([spelled_out(frozen, text, p, v) for text in texts])
    close(out.logits, truth)
    close(out.loss, F.cross_entropy(truth, labels))
    assert model(**inputs).loss is None
    loss, logits = model(**inputs, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)


def classifier(family):
    from transformers import AutoModelForSequenceClassification

    config = masked(family).config
    config.num_labels = CLASSES
    torch.manual_seed(2)
    return AutoModelForSequenceClassification.from_config(config).eval()


def test_gradients_are_those_of_the_spelled_out_sequence():
    frozen, model, p, v = warped(masked("bert", torch.float64))
    inputs, texts = batch("right")
    labels = torch.tensor([0, 2, 1, 1])
    own = torch.autograd.grad(model(**inputs, labels=labels).loss, [p, v])
    q, w = (t.detach().requires_grad_() for t in (p, v))
    truth = F.cross_entropy(torch.stack([spelled_out(frozen, text, q, w) for text in texts]), labels)
    for a, b in zip(own, torch.autograd.grad(truth, [q, w]), strict=True):
        close(a, b, torch.float64)


def test_losses():
    inputs, _ = batch("right")
    for count, labels, loss in [
        (1, torch.tensor([0.5, 2.0, -1.0, 0.0]), lambda x, y: F.mse_loss(x[:, 0], y)),
        (CLASSES, torch.rand(4, CLASSES), F.binary_cross_entropy_with_logits),
    ]:
        _, model, _, _ = warped(masked("bert"), num_labels=count)
        out = model(**inputs, labels=labels)
        close(out.loss, loss(out.logits, labels))


def test_token_types_and_given_positions():
    frozen, model, p, v = warped(masked("bert"))
    inputs, _ = batch("right")
    types, places = torch.zeros_like(inputs["input_ids"]), torch.arange(9).expand(4, 9)
    with torch.no_grad():
        plain = model(**inputs).logits
        close(model(**inputs, token_type_ids=types, position_ids=places).logits, plain)
        assert not torch.allclose(model(**inputs, token_type_ids=types + 1).logits, plain)
        assert not torch.allclose(model(**inputs, position_ids=places + 1).logits, plain)
    assert frozen.config.type_vocab_size == 2


def test_the_backbone_alone_is_as_long_as_its_text():
    """Nothing but the class logits asks for [MASK]: who calls the backbone sees the text's rows."""
    _, model, _, _ = warped(masked("bert"))
    inputs, _ = batch("right")
    with torch.no_grad():
        out = model.bert(**inputs, output_hidden_states=True)
        whole = model(**inputs, output_hidden_states=True)
    assert out.last_hidden_state.shape == out.hidden_states[-1].shape == whole.hidden_states[-1].shape == (4, 9, 16)
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1])


def test_the_task_head_is_not_used():
    _, model, _, _ = warped(classifier("bert"))
    inputs, _ = batch("right")
    with torch.no_grad():
        before = model(**inputs).logits
        model.classifier.weight.zero_()
        assert torch.equal(model(**inputs).logits, before)
    assert not model.classifier.weight.requires_grad


# -- what it begins with ----------------------------------------------------------------------------------------------


def started(model, **fields):
    pk.attach(model, pk.WARP(mask_token=MASK, **fields))
    return dict(named for _, t in tuners(model, "default") for named in t.named_parameters())


def test_rows_begin_as_mask_or_as_tokens():
    model = masked("bert")
    words = model.get_input_embeddings().weight
    own = started(model, length=5, tokens=(8, 9))
    assert torch.equal(own["rows"], words[[8, 9, MASK, MASK, MASK]])
    assert len(started(masked("bert"), length=2, tokens=(8, 9, 10))["rows"]) == 2


def test_class_embeddings_begin_as_the_words_of_classes():
    classes = ((7,), (8, 9), (10, 11, 12))
    for model in (masked("electra"), classifier("bert")):
        decoder = model.get_output_embeddings() or model.get_input_embeddings()
        own = started(model, init="labels", classes=classes, num_labels=3)["weight"]
        close(own, torch.stack([decoder.weight[list(tokens)].mean(0) for tokens in classes]))
    with pytest.raises(ValueError, match="3 classes, rows of 8 numbers; expected 3 classes, rows of 16; use random"):
        started(classifier("electra"), init="labels", classes=classes)
    with pytest.raises(ValueError, match="0 classes, rows of 16 numbers; expected 3 classes"):
        started(classifier("bert"), init="labels")
    assert started(classifier("bert"))["weight"].shape == (CLASSES, 16)  # as many as its config says


# -- counts, places, errors -------------------------------------------------------------------------------------------


def test_counts_of_roberta_large():
    """The paper's upper end, 20 prompt tokens and three classes of MNLI: within its 25K."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    with torch.device("meta"):
        config = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        model = RobertaForMaskedLM(config)
    pk.attach(model, pk.WARP(mask_token=50264, num_labels=3))
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == (20 + 3) * 1024 == 23_552
    assert counts.changed == counts.rank == 0


def test_places():
    assert pk.WARP().cloze().places == (5, 5, 10)  # of the paper's 20
    assert pk.WARP(8).cloze().places == (2, 2, 4)
    assert pk.WARP(3, front=0, behind=0).cloze().places == (0, 3, 0)
    with pytest.raises(ValueError, match="length = 4, front = 3, behind = 2; expected a length"):
        pk.WARP(4, 3, 2)
    with pytest.raises(ValueError, match="init = 'zeros'; expected random or labels"):
        pk.WARP(init="zeros")


def test_the_tokenizer_is_asked():
    class Words:
        mask = 9

        def __call__(self, text):
            return [len(text)]

    cfg = pk.WARP(text="four", init="labels").spelled(Words(), ("a", "bc"))
    assert (cfg.mask_token, cfg.tokens, cfg.classes) == (9, (4,), ((1,), (2,)))
    assert pk.WARP(mask_token=7).spelled(Words(), ()) == pk.WARP(mask_token=7)
    with pytest.raises(ValueError, match="needs a model with a .MASK., and the tokenizer has none; use PromptTuning"):
        pk.WARP().spelled(len, ())


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "vit"])
def test_models_without_mask(family):
    with pytest.raises(ValueError, match=r"has no \[MASK\]; use PromptTuning"):
        pk.attach(make(family).model, pk.WARP(mask_token=MASK))


def test_mask_token_is_asked_for():
    for number in (-1, 50):
        with pytest.raises(ValueError, match=f"mask_token = {number}; expected the number of .MASK. in the model's"):
            pk.attach(masked("bert"), pk.WARP(mask_token=number))


def test_models_without_classes():
    from transformers import BertForTokenClassification

    with pytest.raises(ValueError, match="BertForTokenClassification gives texts no class; WARP needs"):
        pk.attach(BertForTokenClassification(masked("bert").config), pk.WARP(mask_token=MASK))


# -- life -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_model", [masked, classifier])
def test_rows_of_two_adapters(make_model):
    _, model, _, _ = warped(make_model("bert"))
    pk.attach(model, pk.WARP(3, mask_token=MASK, num_labels=CLASSES), name="second", seed=1)
    inputs, _ = batch("right")
    names = ["default", "second", "second", "default"]
    with torch.no_grad():
        with pk.route(model, names):
            logits = model(**inputs).logits
        for row, name in enumerate(names):
            pk.set_active(model, name)
            close(logits[row], model(**inputs).logits[row])


@pytest.mark.parametrize("make_model", [masked, classifier])
def test_the_upper_of_two_reads_its_own_mask(make_model):
    """In a stack the lower one's rows belong to the text of the upper, whose classes come out."""
    frozen, model, p, _ = warped(make_model("bert"))
    pk.attach(model, pk.WARP(2, 1, 1, mask_token=MASK, num_labels=2), name="upper", seed=1)
    upper = dict(named for _, t in tuners(model, "upper") for named in t.named_parameters())
    inputs, texts = batch("right")
    with torch.no_grad():
        logits, words = model(**inputs).logits, frozen.get_input_embeddings()
        for row, text in zip(logits, texts, strict=True):
            e, mask, q = words(text), words(torch.tensor([MASK])), upper["rows"]
            own = torch.cat([e[:1], q[:1], e[1:-1], mask, q[1:], e[-1:]])  # which the lower takes for its text
            pieces = [own[:1], p[:1], own[1:-1], p[1:3], mask, p[3:], own[-1:]]
            out = frozen.base_model(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state[0][len(text) + 1]
            close(row, upper["weight"] @ (out if make_model is classifier else transform(frozen, out)))


def test_training_and_file(tmp_path):
    frozen, model, _, _ = warped(masked("bert"))
    inputs, _ = batch("right")
    inputs["labels"] = torch.tensor([0, 2, 1, 1])
    before = model(**inputs).loss.item()
    pk.fit(model, [inputs], epochs=30, lr=0.03, progress=False)
    after = model.eval()(**inputs)
    assert after.loss.item() < before / 2
    pk.load(frozen, pk.save(model, tmp_path / "adapter"))
    close(frozen(**inputs).logits, after.logits)
    pk.detach(frozen)
    assert frozen(input_ids=inputs["input_ids"]).logits.shape == (4, 9, 50)
    assert "labels" in inspect.signature(frozen.forward).parameters
