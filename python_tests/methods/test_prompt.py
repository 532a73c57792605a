"""Prompts at the input: counts, HF PEFT's numbers, generation, padding, routes, how they begin."""

import copy

import pytest
import torch
from models import KINDS, assert_same, close, make, perturb, snapshot

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

DECODERS = ("gpt2", "llama")
OTHER_DECODERS = ("mistral", "qwen2", "qwen3", "opt", "gpt_neox", "bloom", "falcon", "gemma", "gemma2", "phi", "phi3")
GENERATING = (*DECODERS, "t5", *(pytest.param(f, marks=pytest.mark.slow) for f in (*OTHER_DECODERS, "bart", "marian")))
LENGTH = 3


def prompted(family, **fields):
    case = make(family)
    pk.attach(case.model, pk.PromptTuning(**{"length": LENGTH, **fields}), seed=fields.get("seed", 0))
    return case


def prompt_of(model, name="default"):
    return next(t for _, t in tuners(model, name) if hasattr(t, "rows"))


# -- counts and forms -------------------------------------------------------------------------------------------------


def test_count_of_t5_large():
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        config = T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, vocab_size=32128)
        model = T5ForConditionalGeneration(config)
    pk.attach(model, pk.PromptTuning(length=20, init="vocabulary"))
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 20_480
    assert counts.changed == counts.rank == 0


@pytest.mark.parametrize("family", KINDS)
def test_where_the_rows_are(family):
    targets = ("*.decoder",) if family == "whisper" else None
    model = pk.attach(make(family).model, pk.PromptTuning(length=LENGTH), targets).eval()
    config = model.config
    sizes = {"opt": 8, "electra": 128}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == LENGTH * sizes.get(family, 16)
    names = [path for path, t in tuners(model, "default") if next(t.parameters(), None) is not None]
    assert len(names) == 1, config.model_type


def test_whisper_has_no_prompt_in_its_encoder():
    with pytest.raises(ValueError, match=r"model.encoder takes no embeddings.*target '@model.decoder' alone"):
        pk.attach(make("whisper").model, pk.PromptTuning())
    with pytest.raises(ValueError, match="takes no embeddings and makes none; target the role backbone"):
        pk.attach(make("bert").model, pk.PromptTuning(), ("*.encoder",))


# -- the same numbers as HF PEFT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert", "qwen2"])
def test_equals_hf_peft(family):
    peft = pytest.importorskip("peft")
    case = prompted(family)
    theirs = copy.deepcopy(case.model)
    pk.detach(theirs)
    kinds = {"t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION"}
    model = theirs.bert if family == "bert" else theirs
    config = peft.PromptTuningConfig(task_type=kinds.get(family, "CAUSAL_LM"), num_virtual_tokens=LENGTH)
    wrapped = peft.get_peft_model(model, config).eval()
    rows = prompt_of(case.model).rows
    with torch.no_grad():
        wrapped.prompt_encoder.default.embedding.weight[:LENGTH] = rows
    mask = torch.ones_like(case.inputs["input_ids"])
    mask[1, -2:] = 0
    inputs = {**case.inputs, "attention_mask": mask}
    if family == "bert":
        ours = case.model.bert(**inputs).last_hidden_state
        close(ours[mask == 1], wrapped(**inputs).last_hidden_state[:, LENGTH:][mask == 1])
        return
    logits = wrapped(**inputs).logits
    ours = case.model(**inputs).logits
    if family == "t5":
        close(ours, logits)
    else:
        close(ours[mask == 1], logits[:, LENGTH:][mask == 1])


# -- what the caller sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "distilbert"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_outputs_have_the_shapes_of_the_base(family, dictionary):
    case, plain = prompted(family), make(family)
    for model in (case.model, plain.model):
        model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict": dictionary}
    ours, theirs = (c.model(**c.inputs, **wanted) for c in (case, plain))

    def shapes(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        if isinstance(value, (tuple, list, dict)):
            return [shapes(v) for v in (value.values() if isinstance(value, dict) else value)]
        return None

    if family != "t5":
        assert shapes(ours) == shapes(theirs)
    elif dictionary:
        assert ours.encoder_last_hidden_state.shape[1] == 7 + LENGTH  # the decoder attends to P
        assert shapes(ours.decoder_hidden_states) == shapes(theirs.decoder_hidden_states)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_labels_and_losses_are_of_the_text(family):
    case = prompted(family)
    labels = torch.arange(2) if family == "bert" else case.inputs["input_ids"].clone()
    if family == "t5":
        case.inputs.pop("decoder_input_ids")
    out = case.model(**case.inputs, labels=labels)
    if family == "gpt2":
        wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    else:
        wanted = torch.nn.functional.cross_entropy(out.logits.flatten(0, -2), labels.flatten())
    close(out.loss, wanted)


def test_a_pooler_reads_the_first_token():
    case = prompted("bert")
    out = case.model.bert(**case.inputs)
    close(out.pooler_output, case.model.bert.pooler(out.last_hidden_state))


def test_embeddings_given_or_looked_up():
    case = prompted("llama")
    x = case.model.get_input_embeddings()(case.inputs["input_ids"])
    close(case.model(inputs_embeds=x).logits, case.call(case.model))


def test_the_base_is_untouched_and_back_when_disabled():
    case = prompted("llama")
    before, base = snapshot(case.model), make("llama")
    optimizer = torch.optim.AdamW([p for p in case.model.parameters() if p.requires_grad], lr=0.1)
    case.loss(case.model).backward()
    optimizer.step()
    assert_same(case.model, before)
    with pk.disabled(case.model):
        assert torch.equal(case.call(case.model), base.call(base.model))


# -- generation -------------------------------------------------------------------------------------------------------


def generate(model, ids, **kwargs):
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **kwargs,
    )


def same(one, other):
    assert torch.equal(one.sequences[:, -5:], other.sequences[:, -5:])
    for a, b in zip(one.scores, other.scores, strict=True):
        close(a, b)


@pytest.mark.parametrize("family", GENERATING)
def test_cached_generation_equals_uncached(family):
    case = prompted(family)
    perturb(case.model)
    ids = case.inputs["input_ids"][:, :4]
    for beams in (1, 3):
        same(generate(case.model, ids, num_beams=beams), generate(case.model, ids, num_beams=beams, use_cache=False))
    plain = generate(case.model, ids)
    static = {"cache_implementation": "static", "disable_compile": True}
    same(generate(case.model, ids, **static), plain)
    if family in ("bart", "marian"):  # whose positions count padding
        return
    padding = torch.zeros(2, 2, dtype=ids.dtype)
    padded, mask = torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)
    same(generate(case.model, padded, attention_mask=mask), plain)
    same(generate(case.model, padded, attention_mask=mask, use_cache=False), plain)
    same(generate(case.model, padded, attention_mask=mask, **static), plain)


def test_a_cache_without_the_prompt_and_one_of_another_length():
    case = prompted("llama")
    ids = case.inputs["input_ids"]
    with pk.disabled(case.model):
        cache = case.model(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="cache that was filled without this prompt"):
        case.model(ids, past_key_values=cache)
    cache = case.model(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 7 + LENGTH
    cache.crop(-2)
    close(case.model(ids[:, 5:], past_key_values=cache).logits, case.call(case.model)[:, 5:])
    with pytest.raises(RuntimeError, match="generate in one go"):
        case.model(ids[:, :1], attention_mask=torch.ones(2, 11), past_key_values=cache)


def test_a_static_cache_that_is_made_already():
    from transformers import StaticCache

    case = prompted("llama")
    config, ids = case.model.config, case.inputs["input_ids"]
    for size in (12, 8):
        cache = StaticCache(config=config, max_cache_len=size)
        cache.early_initialization(2, 1, 8, torch.float32, torch.device("cpu"))
        if size == 12:
            close(case.model(ids, past_key_values=cache).logits, case.call(case.model))
            continue
        with pytest.raises(RuntimeError, match="a static cache of 8 has no room for 7 tokens and a prompt of 3"):
            case.model(ids, past_key_values=cache)


def test_a_cache_step_by_step_with_positions_given_or_not():
    case = prompted("gpt2")
    ids = case.inputs["input_ids"]
    whole = case.call(case.model)
    close(case.model(ids, position_ids=torch.arange(7)[None]).logits, whole)
    for given in (True, False):
        first = case.model(ids[:, :5], use_cache=True)
        places = {"position_ids": torch.tensor([[5, 6]])} if given else {}
        then = case.model(ids[:, 5:], past_key_values=first.past_key_values, **places)
        close(torch.cat([first.logits, then.logits], 1), whole)


# -- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "t5", "opt", "gpt_neox"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(family, left):
    case = prompted(family)
    perturb(case.model)
    ids = case.inputs["input_ids"]
    padding = torch.zeros(2, 2, dtype=ids.dtype)

    def padded(t, other):
        return torch.cat([other, t] if left else [t, other], 1)

    inputs = {**case.inputs, "input_ids": padded(ids, padding), "attention_mask": padded(torch.ones_like(ids), padding)}
    if family in ("bert", "roberta", "distilbert"):
        body = case.model.base_model
        out, wanted = body(**inputs).last_hidden_state, body(**case.inputs).last_hidden_state
    else:
        out, wanted = case.model(**inputs).logits, case.call(case.model)
    close(out if family == "t5" else out[:, 2:] if left else out[:, :-2], wanted)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_masks_of_four_dimensions(family):
    case = prompted(family)
    body = case.model.base_model
    ids = case.inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    wanted = body(ids, attention_mask=mask).last_hidden_state
    seen = (mask[:, None, None, :] == 1).expand(2, 1, 7, 7)
    if family == "llama":
        seen = seen & torch.ones(7, 7, dtype=torch.bool).tril()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for four in (seen, added):
        close(body(ids, attention_mask=four).last_hidden_state[mask == 1], wanted[mask == 1])
    with pytest.raises(ValueError, match=r"attention mask \(2, 7, 7\); expected \[batch, keys\] or four"):
        body(ids, attention_mask=seen[:, 0])


# -- several adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit", "bart"])
def test_two_prompts_at_once_and_beside_lora(family):
    case = prompted(family)
    pk.attach(case.model, pk.LoRA(rank=2), name="lora")
    pk.attach(case.model, pk.PromptTuning(length=2), name="second", seed=1)
    perturb(perturb(perturb(case.model), "lora"), "second")
    pk.set_active(case.model, ["default", "second", "lora"])
    both = case.call(case.model)
    twin = copy.deepcopy(case.model)
    assert torch.equal(case.call(twin), both)
    # P of the upper one follows that of the lower one
    joint = make(family)
    pk.attach(joint.model, pk.PromptTuning(length=LENGTH + 2))
    pk.attach(joint.model, pk.LoRA(rank=2), name="lora")
    perturb(joint.model, "lora")
    lower, upper = prompt_of(case.model).rows, prompt_of(case.model, "second").rows
    with torch.no_grad():
        prompt_of(joint.model).rows.copy_(torch.cat([lower, upper]))
    pk.set_active(joint.model, ["default", "lora"])
    close(joint.call(joint.model), both)


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "t5", "bart"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_routed_over_prompts_of_other_lengths(family, masked):
    case = prompted(family)
    pk.attach(case.model, pk.PromptTuning(length=5), name="long", seed=1)
    pk.attach(case.model, pk.LoRA(rank=2), name="lora")
    perturb(case.model, "lora")
    inputs = {key: torch.cat([t, t]) for key, t in case.inputs.items()}
    if masked and family != "vit":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, -2:] = 0
        inputs["attention_mask"][2, :2] = 0
    names = ["long", None, "default", "lora"]
    off = {"use_cache": False} if family in ("t5", "bart", "llama") else {}
    with pk.route(case.model, names):
        routed = case.model(**inputs, **off).logits
    for row, name in enumerate(names):
        pk.set_active(case.model, [name] if name else [])
        alone = case.model(**{key: t[row : row + 1] for key, t in inputs.items()}, **off).logits[0]
        keep = inputs["attention_mask"][row] == 1 if masked and family == "llama" else slice(None)
        close(routed[row][keep], alone[keep])
    pk.set_active(case.model, ["default", "long", "lora"])
    with pk.route(case.model, names):
        case.model.train()
        case.model(**inputs, **off).logits.square().sum().backward()
    for name in ("default", "long"):
        assert prompt_of(case.model, name).rows.grad.abs().sum() > 0


def test_encoder_decoder_routes_generate():
    case = prompted("t5")
    pk.attach(case.model, pk.PromptTuning(length=5), name="long", seed=1)
    ids, names = case.inputs["input_ids"], ["long", "default"]
    off = {"use_cache": False}
    with pk.route(case.model, names):
        routed = generate(case.model, ids, num_beams=2, **off)
    for row, name in enumerate(names):
        pk.set_active(case.model, [name])
        alone = generate(case.model, ids[row : row + 1], num_beams=2, **off)
        assert torch.equal(routed.sequences[row], alone.sequences[0])


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_in_both_modes(family, reentrant):
    case = prompted(family)
    for m in case.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    case.model.train()
    torch.manual_seed(7)
    case.loss(case.model).backward()
    rows = prompt_of(case.model).rows
    wanted, rows.grad = rows.grad, None
    case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(7)
    case.loss(case.model).backward()
    close(rows.grad, wanted)


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_compiled_with_a_mask(family):
    case = prompted(family)
    mask = torch.ones_like(case.inputs["input_ids"])
    mask[1, :2] = 0
    inputs = {**case.inputs, "attention_mask": mask, "use_cache": False}
    if family == "bert":
        inputs.pop("use_cache")
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    out = compiled(**inputs).logits
    keep = mask == 1 if family == "gpt2" else slice(None)
    close(out[keep], case.model(**inputs).logits[keep])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantised_base(kind):
    case = make("llama")
    pk.quantize(case.model, kind)
    pk.attach(case.model, pk.PromptTuning(length=LENGTH))
    case.loss(case.model).backward()
    rows = prompt_of(case.model).rows
    assert rows.dtype == torch.float32
    assert rows.grad.abs().sum() > 0


# -- how they begin ---------------------------------------------------------------------------------------------------


def test_random_rows_are_those_of_the_paper():
    rows = prompt_of(prompted("bert").model).rows
    assert rows.abs().max() <= 0.5
    assert rows.std() > 0.2
    again = prompt_of(prompted("bert").model).rows
    assert torch.equal(rows, again)


@pytest.mark.parametrize("family", ["bert", "gemma", "bart"])
def test_rows_of_tokens_come_from_the_call_of_the_embedding(family):
    case = make(family)
    embedding = case.model.get_encoder().get_input_embeddings() if family == "bart" else None
    embedding = embedding or case.model.get_input_embeddings()
    e = embedding(torch.arange(50)[None])[0].detach()
    text = prompted(family, init="text", tokens=(7, 9))
    close(prompt_of(text.model).rows.detach(), e[[7, 9, 7]])
    labels = prompted(family, init="labels", classes=((7,), (8, 9)))
    rows = prompt_of(labels.model).rows.detach()
    close(rows[:2], torch.stack([e[7], (e[8] + e[9]) / 2]))
    found = prompt_of(prompted(family, init="vocabulary", length=60).model).rows.detach()
    nearest = torch.cdist(found, e).argmin(1)
    close(e[nearest], found)
    assert nearest.min() >= 3
    assert len(set(nearest.tolist())) == 47  # all but the special ones, some twice


def test_one_line_errors():
    with pytest.raises(ValueError, match="prompt length = 0, subspace = 0; expected at least 1 and 0"):
        pk.PromptTuning(length=0)
    with pytest.raises(ValueError, match="prompt init = 'zeros'; expected one of random, vocabulary, text, labels"):
        pk.PromptTuning(init="zeros")
    with pytest.raises(ValueError, match='init = "text" needs the tokens'):
        prompted("bert", init="text")
    with pytest.raises(ValueError, match='init = "labels" needs the tokens of each class'):
        prompted("bert", init="labels")
    with pytest.raises(ValueError, match="prompt token 50; expected numbers below 50"):
        prompted("bert", init="text", tokens=(50,))
    with pytest.raises(ValueError, match="has no vocabulary, so use random"):
        prompted("vit", init="vocabulary")


@pytest.mark.parametrize(("family", "most"), [("bert", 16), ("gpt2", 16), ("opt", 16), ("bart", 16), ("roberta", 15)])
def test_as_many_tokens_as_there_are_positions(family, most):
    case = prompted(family, length=most - 7)
    case.call(case.model)
    case = prompted(family, length=most - 6)
    with pytest.raises(ValueError, match=f"has {most} positions, too few for 7 tokens behind a prompt of {most - 6}"):
        case.call(case.model)


def test_words_become_tokens():
    def encode(text):
        return [len(word) for word in text.split()]

    assert pk.PromptTuning(init="text", text="a great one").spelled(encode, ()).tokens == (1, 5, 3)
    assert pk.PromptTuning(init="labels").spelled(encode, ["very bad", "good"]).classes == ((4, 3), (4,))
    both = pk.Union(pk.LoRA(), pk.PromptTuning(init="text", text="a great one"))
    assert both.spelled(encode, ()).members[1].method.tokens == (1, 5, 3)
    assert pk.PromptTuning().spelled(encode, ["bad"]) == pk.PromptTuning()
    cfg = pk.PromptTuning(init="labels", classes=[[4, 3], [4]])
    assert pk.Method.from_json(cfg.to_json()) == cfg


def test_a_subspace_trains_its_own_numbers_alone(tmp_path):
    case = prompted("bert", subspace=2, init="vocabulary")
    counts = pk.counts(case.model)
    assert counts.trainable == counts.stored == 2
    whole = prompted("bert", init="vocabulary")
    close(case.call(case.model), whole.call(whole.model))
    perturb(case.model)
    pk.save(case.model, tmp_path / "adapter")
    fresh = make("bert")
    pk.load(fresh.model, tmp_path / "adapter")
    close(fresh.call(fresh.model), case.call(case.model))
