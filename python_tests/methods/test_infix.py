"""Infix tuning: [x; P; y], where x never sees P, at a place of its own in each row of a batch."""

import copy
import inspect
import threading

import pytest
import torch
from models import close, make, perturb

import peft_kernels as pk
from peft_kernels.engine import taps
from peft_kernels.engine.attach import tuners

QUICK = ("gpt2", "llama", "opt")
SLOW = ("gpt_neox", "mistral", "qwen2", "gemma", "phi", "phi3", "falcon", "bloom")
decoders = pytest.mark.parametrize("family", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
L = 3


def infixed(family, dtype=torch.float32, **kwargs):
    """(the frozen model, one like it with an infix, P)"""
    base, case = make(family, dtype).model, make(family, dtype)
    pk.attach(case.model, pk.InfixTuning(L, **kwargs))
    ((_, tuner),) = [(s, t) for s, t in tuners(case.model, "default") if hasattr(t, "rows")]
    return base, case.model, tuner.rows


def spelled_out(base, x, p, y):
    """Logits [len(x) + len(y), vocabulary] of one text without padding: the model on the sequence itself."""
    ids = torch.cat([x, y])[None]
    e = base.get_input_embeddings()(ids)[0]
    out = base(inputs_embeds=torch.cat([e[: len(x)], p.to(e.dtype), e[len(x) :]])[None]).logits[0]
    return torch.cat([out[: max(len(x) - 1, 0)], out[len(x) + L - min(len(x), 1) :]])


TEXTS = [(4, 3), (1, 6), (6, 1), (2, 2)]  # tokens of input and output


def batch(side, labelled=True):
    """Ids, mask and labels of TEXTS, padded; and the texts."""
    torch.manual_seed(1)
    texts = [(torch.randint(3, 50, (a,)), torch.randint(3, 50, (b,))) for a, b in TEXTS]
    width = max(a + b for a, b in TEXTS)
    ids, mask, labels = (torch.full((len(texts), width), v) for v in (0, 0, -100))
    for row, (x, y) in enumerate(texts):
        n = len(x) + len(y)
        at = 0 if side == "right" else width - n
        ids[row, at : at + n], mask[row, at : at + n] = torch.cat([x, y]), 1
        labels[row, at + len(x) : at + n] = y
    return {"input_ids": ids, "attention_mask": mask, **({"labels": labels} if labelled else {})}, texts


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


# -- where P stands ---------------------------------------------------------------------------------------------------


@decoders
@pytest.mark.parametrize("side", ["right", "left"])
def test_each_row_has_it_where_its_output_begins(family, side):
    base, model, p = infixed(family)
    inputs, texts = batch(side)
    if side == "left" and "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = positions(inputs["attention_mask"])
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, (x, y) in enumerate(texts):
            close(logits[row][inputs["attention_mask"][row] == 1], spelled_out(base, x, p, y))


@decoders
def test_the_input_sees_nothing_of_it(family):
    base, model, _ = infixed(family)
    for side in ("right", "left"):
        inputs, texts = batch(side)
        with torch.no_grad():
            before = base(**inputs, output_hidden_states=True).hidden_states
            after = model(**inputs, output_hidden_states=True).hidden_states
        for row, (x, _) in enumerate(texts):
            real = inputs["attention_mask"][row].nonzero()[: len(x) - 1, 0]
            for a, b in zip(after, before, strict=True):
                close(a[row][real], b[row][real])
                assert not torch.allclose(a[row], b[row]) or a is after[0]


def test_equal_bits_without_padding():
    base, model, _ = infixed("gpt2")
    ids = torch.randint(3, 50, (2, 7))
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        before, after = (m(ids, labels=labels, output_hidden_states=True) for m in (base, model))
    for a, b in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(a[:, :4], b[:, :4], rtol=0, atol=1e-6)
    assert not torch.allclose(after.logits[:, 4], before.logits[:, 4])


def test_a_whole_text_has_it_in_front():
    base, model, p = infixed("llama")
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        logits = model(ids, labels=ids).logits
        for row, x in zip(logits, ids, strict=True):
            close(row, spelled_out(base, x[:0], p, x))


def test_without_labels_it_stands_at_the_end():
    base, model, p = infixed("gpt2")
    for side in ("right", "left"):
        inputs, texts = batch(side, labelled=False)
        inputs["position_ids"] = positions(inputs["attention_mask"])
        with torch.no_grad():
            logits = model(**inputs).logits
            for row, (x, y) in enumerate(texts):
                own = inputs["attention_mask"][row] == 1
                close(logits[row][own], spelled_out(base, torch.cat([x, y]), p, y[:0]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_reads_its_last_row(side):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, num_labels=3, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    frozen = copy.deepcopy(model)
    pk.attach(model, pk.InfixTuning(L))
    ((_, tuner),) = [(s, t) for s, t in tuners(model, "default") if hasattr(t, "rows")]
    inputs, texts = batch(side, labelled=False)
    inputs["position_ids"] = positions(inputs["attention_mask"])
    with torch.no_grad():
        scores = model(**inputs, labels=torch.tensor([0, 1, 2, 0])).logits
        for row, (x, y) in zip(scores, texts, strict=True):
            e = frozen.transformer.wte(torch.cat([x, y]))
            out = frozen.transformer(inputs_embeds=torch.cat([e, tuner.rows])[None]).last_hidden_state
            close(row, frozen.score(out[0, -1]))


def test_attentions_are_those_of_the_text():
    base, model, _ = infixed("llama")
    model.set_attn_implementation("eager")
    inputs, _ = batch("right")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    rows, n = inputs["input_ids"].shape
    assert all(a.shape == (rows, 2, n, n) for a in attentions)
    assert (attentions[0][0, :, :3].sum(-1) - 1).abs().max() < 1e-5  # the input attends to itself alone
    assert (attentions[0][0, :, 4:7].sum(-1) < 0.999).all()  # the output to P too


def test_gradient_is_that_of_the_spelled_out_sequence():
    base, model, p = infixed("gpt2", torch.float64)
    base.requires_grad_(False)
    inputs, texts = batch("right")
    score = torch.randn(50, dtype=torch.float64)
    logits = model(**inputs).logits[inputs["attention_mask"] == 1]
    q = p.detach().requires_grad_()
    wanted = torch.cat([spelled_out(base, x, q, y) for x, y in texts])
    (own,), (truth,) = (torch.autograd.grad((t.tanh() @ score).sum(), [w]) for t, w in ((logits, p), (wanted, q)))
    close(own, truth, torch.float64)


# -- generation -------------------------------------------------------------------------------------------------------


def greedy(base, x, p, steps):
    y = x[:0]
    for _ in range(steps):
        y = torch.cat([y, spelled_out(base, x, p, y)[-1].argmax()[None]])
    return y


@decoders
def test_generation_with_and_without_a_cache(family):
    base, model, p = infixed(family)
    inputs, texts = batch("left", labelled=False)
    asked = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    n = inputs["input_ids"].shape[1]
    cached, uncached = (model.generate(**inputs, **asked, use_cache=use)[:, n:] for use in (True, False))
    assert torch.equal(cached, uncached)
    with torch.no_grad():
        for row, (x, y) in zip(cached, texts, strict=True):
            assert torch.equal(row, greedy(base, torch.cat([x, y]), p, 4))
    assert taps.noted("length of the text that generate was given") is None


@decoders
def test_beams(family):
    _, model, _ = infixed(family)
    inputs, _ = batch("left", labelled=False)
    asked = dict(max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached, uncached = (model.generate(**inputs, **asked, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_a_loop_of_its_own_with_right_padding():
    """The first call says where the output begins; the mask of later calls has padding before it."""
    base, model, p = infixed("llama")
    inputs, texts = batch("right", labelled=False)
    mask, place = inputs["attention_mask"], inputs["attention_mask"].sum(1, keepdim=True)
    with torch.no_grad():
        out = model(**inputs, position_ids=positions(mask), use_cache=True)
        token = out.logits.gather(1, (place - 1)[..., None].expand(-1, -1, 50))[:, 0].argmax(-1, keepdim=True)
        written = [token]
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(
                token,
                attention_mask=mask,
                position_ids=place + step,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            written.append(token)
        for row, (x, y) in zip(torch.cat(written, 1), texts, strict=True):
            assert torch.equal(row, greedy(base, torch.cat([x, y]), p, 4))


def test_caches_that_are_refused():
    _, model, _ = infixed("llama")
    ids = torch.randint(3, 50, (2, 5))
    with torch.no_grad(), pk.disabled(model):
        foreign = model(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="filled without this prompt; begin a new one"):
        model(ids[:, :1], past_key_values=foreign)
    with torch.no_grad():
        own = model(ids, use_cache=True).past_key_values
    own.crop(-1)
    with pytest.raises(
        RuntimeError, match="gets 1 tokens under a mask of 6 and a key-value cache of 4 behind the prompt"
    ):
        model(ids[:, :1], attention_mask=torch.ones(2, 6), past_key_values=own)
    with pytest.raises(ValueError, match=r"infix got the attention mask \(2, 1, 5, 5\); expected \[batch, keys\]"):
        model(ids, attention_mask=torch.zeros(2, 1, 5, 5))
    with pytest.raises(RuntimeError, match="gets 2 of 5 tokens of the input; InfixTuning needs them at once"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=2, pad_token_id=0)


# -- life -------------------------------------------------------------------------------------------------------------


def test_generate_is_the_models_own_again():
    case = make("gpt2")
    before, ids = dict(vars(case.model)), case.inputs["input_ids"]
    pk.attach(case.model, pk.InfixTuning(L))
    twin = copy.deepcopy(case.model)
    assert vars(twin)["generate"].model is twin
    pk.attach(case.model, pk.InfixTuning(L), name="second")
    pk.detach(case.model, "default")
    assert "generate" in vars(case.model)
    pk.detach(case.model)
    assert vars(case.model).keys() == before.keys()
    pk.detach(twin)
    assert "generate" not in vars(twin)
    assert torch.equal(*(m.generate(ids, max_new_tokens=2, pad_token_id=0) for m in (twin, case.model)))


def test_rows_of_two_adapters_and_none():
    base, model, _ = infixed("gpt2")
    pk.attach(model, pk.InfixTuning(5), name="second")
    perturb(model, "second")
    inputs, _ = batch("right")
    names = ["default", "second", None, "default"]
    with torch.no_grad():
        with pk.route(model, names):
            logits = model(**inputs).logits
        for row, name in enumerate(names):
            pk.set_active(model, [name] if name else [])
            close(logits[row], model(**inputs).logits[row])


def test_two_in_a_stack_are_one_of_both():
    base, model, p = infixed("llama")
    pk.attach(model, pk.InfixTuning(2), name="second", seed=1)
    inputs, _ = batch("right")
    with torch.no_grad():
        once, (tuner,) = model(**inputs).logits, [t for _, t in tuners(model, "second") if hasattr(t, "rows")]
        pk.detach(model)
        pk.attach(model, pk.InfixTuning(5))
        (both,) = [t for _, t in tuners(model, "default") if hasattr(t, "rows")]
        both.rows.copy_(torch.cat([p, tuner.rows]))
        close(model(**inputs).logits, once)


def test_threads_do_not_mix():
    _, model, _ = infixed("gpt2")
    jobs = [batch("right")[0], batch("right", labelled=False)[0]]
    with torch.no_grad():
        wanted, found = [model(**job).logits for job in jobs], [None, None]

        def run(i):
            with torch.no_grad():
                for _ in range(10):
                    found[i] = model(**jobs[i]).logits

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(map(torch.equal, wanted, found))


def test_training_lowers_the_loss():
    _, model, _ = infixed("gpt2")
    inputs, _ = batch("right")
    before = model(**inputs).loss.item()
    pk.fit(model, [inputs], epochs=20, progress=False)
    assert model.eval()(**inputs).loss.item() < before


# -- counts and errors ------------------------------------------------------------------------------------------------


def test_counts_of_gpt2_medium():
    """Ten rows of 1024: as many as prompt tuning has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    pk.attach(model, pk.InfixTuning())
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 10 * 1024
    assert counts.changed == counts.rank == 0


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "bert sees the whole text at once"),
        ("t5", "encoder sees the whole text at once"),
        ("bart", "encoder sees the whole text at once"),
        ("vit", "vit sees the whole text at once"),
    ],
)
def test_what_is_no_causal_decoder(family, kind):
    with pytest.raises(ValueError, match=f"{kind}; InfixTuning, .* use PromptTuning"):
        pk.attach(make(family).model, pk.InfixTuning(L))


def test_a_decoder_that_attends_to_an_encoder():
    with pytest.raises(ValueError, match="decoder attends to an encoder; InfixTuning, .* use PromptTuning"):
        pk.attach(make("whisper").model, pk.InfixTuning(L), "*.decoder")


def test_bad_fields():
    with pytest.raises(ValueError, match="length = 0; expected at least 1"):
        pk.InfixTuning(0)
