"""LST: the side network is the backbone's in small, and nothing of the backbone is differentiated or kept."""

import copy
import threading

import pytest
import torch
from models import FAMILIES, KINDS, calibrated, close, make, perturb
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.bench.measure import peak_bytes
from peft_kernels.engine import taps
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.site import base_parameters

TRANSFORMERS = [f for f in FAMILIES if f != "mlp"]
SMALL = {"reduction": 2, "drop": 0}


def beside(family, dtype=torch.float32, perturbed=True, **fields):
    case = make(family, dtype)
    pk.attach(case.model, pk.LST(**{**SMALL, **fields}))
    if perturbed:
        perturb(case.model)
    return case


def sides(model):
    return dict(tuners(model, "default"))


# -- what the paper says ----------------------------------------------------------------------------------------------


def test_count_of_t5_base():
    """The paper's 1.74 %: 9 of 12 blocks in each stack, and a gate for each."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
        model = T5ForConditionalGeneration(config)
    pk.attach(model, pk.LST())
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 3_878_688 + 18
    assert counts.changed == counts.rank == 0
    assert round(100 * counts.trainable / counts.total, 2) == 1.74
    for tuner in sides(model).values():
        assert tuner.kept == [1, 2, 3, 5, 6, 7, 9, 10, 11]


def test_which_blocks_have_a_side_block():
    assert pk.LST().kept(6) == [1, 2, 3, 5]
    assert pk.LST(drop=0).kept(3) == [0, 1, 2]
    assert pk.LST().kept(1) == [0]
    assert pk.LST(keep=(3, 1)).kept(4) == [1, 3]
    with pytest.raises(ValueError, match="keep = \\(4,\\); expected numbers of blocks, which are 0 to 3 here"):
        pk.LST(keep=(4,)).kept(4)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_side_is_the_ladder_of_the_paper(family):
    """Recomputed from the hidden states of the plain model, block by block: gates of .5, D_i of h_i, U of the norm."""
    case = beside(family, torch.float64, perturbed=False)
    names = {"bert": "bert.encoder", "gpt2": "transformer", "llama": "model", "t5": "encoder"}
    tuner, stack = sides(case.model)[names[family]], case.model.get_submodule(names[family])
    rungs = next(m for m in tuner.side.children() if isinstance(m, torch.nn.ModuleList))
    blocks = next(m for m in stack.children() if isinstance(m, torch.nn.ModuleList))
    assert all(torch.sigmoid(rung.gate / rung.temperature) == 0.5 for rung in rungs)
    hidden, entered, left, streams = [], [], [], []

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    handles = [blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, args, out: hidden.append(first(out))) for block in blocks]
    for rung in rungs:
        handles.append(
            rung.block.register_forward_pre_hook(lambda _, args, kwargs: streams.append(args[0]), with_kwargs=True)
        )
        handles.append(rung.block.register_forward_hook(lambda _, args, out: left.append(first(out))))
    case.call(case.model)
    for handle in handles:
        handle.remove()
    before = [tuner.entry(entered[0]), *left]
    for j, rung in enumerate(rungs):
        close(streams[j], (before[j] + rung.down(hidden[j])) / 2, torch.float64)
    with torch.no_grad():
        for rung in rungs:  # wide open: nothing of the ladder comes in behind the embeddings
            rung.gate.fill_(100.0)
    one = case.call(case.model).detach()
    with torch.no_grad():
        for rung in rungs:
            rung.down.weight.normal_()
    assert torch.equal(case.call(case.model), one)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "gpt_neox", "phi3", "bart", "vit"])
def test_the_side_begins_with_a_part_of_the_backbone(family):
    """Each of its linears in a block is the backbone's at some rows and columns; the same ones throughout."""
    case = beside(family, perturbed=False)
    for path, tuner in sides(case.model).items():
        stack = case.model.get_submodule(path)
        name, rungs = next((n, m) for n, m in tuner.side.named_children() if isinstance(m, torch.nn.ModuleList))
        for j, rung in enumerate(rungs):
            block = stack.get_submodule(f"{name}.{tuner.kept[j]}")
            whole = dict(block.named_parameters())
            for key, p in rung.block.named_parameters():
                assert key in whole
                assert set(p.detach().flatten().tolist()) <= set(whole[key].detach().flatten().tolist()), key
            linears = {k: p for k, p in rung.block.named_parameters() if p.dim() == 2 and p.shape[0] != 32}
            for key, p in linears.items():  # a sub-block: rows of the whole, each at the same columns
                w = whole[key]
                columns = [
                    [c for c in range(w.shape[1]) if set(p[:, i].tolist()) <= set(w[:, c].tolist())]
                    for i in range(p.shape[1])
                ]
                assert all(columns), key
    other = beside(family, perturbed=False, init="random")
    assert not torch.allclose(case.call(case.model), other.call(other.model))


def test_pruning_keeps_the_largest_rows():
    case = make("llama")
    layer = case.model.model.layers[1]
    with torch.no_grad():
        for p in case.model.model.layers.parameters():
            if p.dim() == 2:
                p.uniform_(0.1, 0.2)
        layer.mlp.down_proj.weight[:, ::2] *= 50  # every second neuron
        for block in case.model.model.layers:
            block.self_attn.o_proj.weight[8:] *= 50  # hidden features 8 to 15
            block.self_attn.q_proj.weight.view(2, 8, -1)[:, [1, 3]] *= 50  # of each head two features ...
    pk.attach(case.model, pk.LST(reduction=2, keep=(1,)))
    (tuner,) = sides(case.model).values()
    block = tuner.side.layers[0].block
    assert torch.equal(block.mlp.up_proj.weight, layer.mlp.up_proj.weight[::2, 8:])
    assert torch.equal(block.mlp.down_proj.weight, layer.mlp.down_proj.weight[8:, ::2])
    turned = [1, 3, 5, 7, 9, 11, 13, 15]  # ... and those that turn with them
    assert torch.equal(block.self_attn.q_proj.weight, layer.self_attn.q_proj.weight[turned, 8:])
    assert torch.equal(block.self_attn.v_proj.weight, layer.self_attn.v_proj.weight[turned[:4], 8:])
    assert torch.equal(tuner.side.norm.weight, case.model.model.norm.weight[8:])


# -- memory -----------------------------------------------------------------------------------------------------------


def encoder(**changes):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=512, vocab_size=50)
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=64, **changes)).train()
    return model, {"input_ids": torch.randint(3, 50, (16, 64)), "labels": torch.zeros(16, dtype=torch.long)}


def kept_bytes(model, inputs):
    """What autograd keeps for the backward, each storage once, without parameters."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs).loss
    loss.backward()
    return sum(found.values())


def test_a_training_step_takes_less_than_half_of_the_memory_of_lora():
    kept, peak = {}, {}
    for method in (pk.LoRA(rank=8), pk.LST(reduction=8)):
        model, inputs = encoder()
        pk.attach(model, method)
        kept[method.key] = kept_bytes(model, inputs)
        model.zero_grad()
        peak[method.key] = peak_bytes(lambda m=model, i=inputs: m(**i).loss.backward(), "cpu")
    assert kept["lst"] < kept["lora"] / 2
    assert peak["lst"] < peak["lora"] / 2


@pytest.mark.parametrize("family", [*TRANSFORMERS, "bart", "vit"])
def test_no_block_of_the_backbone_is_in_the_graph(family):
    case = beside(family)
    model, outputs = case.model.train(), []
    for path in sides(model):
        stack = model.get_submodule(path)
        blocks = next(m for m in stack.children() if isinstance(m, torch.nn.ModuleList))
        for block in blocks:
            block.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    case.loss(model).backward()
    assert outputs
    assert not any(t.requires_grad for t in outputs)
    assert all(p.grad is None for _, p in base_parameters(model))


def test_no_hidden_state_outlives_a_call():
    case = beside("t5")
    case.call(case.model)
    assert not taps._local.inputs


# -- encoder and decoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_the_side_of_the_decoder_attends_to_the_side_of_the_encoder(family):
    case = beside(family)
    inputs = {k: v for k, v in case.inputs.items() if not k.startswith("decoder")}
    states = case.model.get_encoder()(**inputs)[0]
    assert states.shape[-1] == 16 + 8
    rest = {k: v for k, v in case.inputs.items() if k.startswith("decoder")}

    def logits(last):
        return case.model(encoder_outputs=(last,), **rest).logits

    close(logits(states), case.call(case.model))
    moved = states.clone()
    moved[..., 16:] += torch.randn_like(moved[..., 16:])
    assert not torch.allclose(logits(moved), logits(states))
    case.loss(case.model).backward()
    encoders = [p.grad for path, t in sides(case.model).items() if path.endswith("encoder") for p in t.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in encoders)
    with pytest.raises(ValueError, match="let the encoder run with this adapter"):
        logits(states[..., :16])
    pk.set_active(case.model, [])
    assert case.model.get_encoder()(**inputs)[0].shape[-1] == 16


def test_one_stack_of_two_may_be_tuned_alone():
    for stack in ("encoder", "decoder"):
        case = make("t5")
        before = case.call(case.model)
        pk.attach(case.model, pk.LST(**SMALL), targets=f"@{stack}")
        assert list(sides(case.model)) == [stack]
        perturb(case.model)
        out = case.call(case.model)
        assert not torch.allclose(out, before)
        case.loss(case.model).backward()
        assert all(p.grad.abs().sum() > 0 for p in case.model.parameters() if p.requires_grad)


# -- generation -------------------------------------------------------------------------------------------------------


GENERATING = ["gpt2", "llama", "t5", "bart"]
MORE = [
    k for k in ("whisper", "gpt_neox", "opt", "gemma3_text", "phi3", "falcon", "bloom", "umt5", "pegasus") if k in KINDS
]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [*GENERATING, *(pytest.param(k, marks=pytest.mark.slow) for k in MORE)])
def test_generation_with_a_cache_is_that_without(family, beams):
    case = beside(family)
    inputs = {k: v for k, v in case.inputs.items() if not k.startswith("decoder")}

    def generated(use_cache):
        return case.model.generate(
            **inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            num_beams=beams,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
        )

    plain, cached = generated(False), generated(True)
    assert torch.equal(plain.sequences, cached.sequences)
    for a, b in zip(plain.scores, cached.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_cache_that_the_side_did_not_fill_is_refused():
    case = beside("llama")
    ids = case.inputs["input_ids"]
    with pk.disabled(case.model):
        cache = case.model(ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="filled without LST; begin a new one"):
        case.model(ids[:, 3:], past_key_values=cache)
    with pytest.raises(RuntimeError, match="StaticCache, to which LST cannot add layers; pass use_cache=False"):
        case.model.generate(ids, max_new_tokens=3, cache_implementation="static")


def test_training_fills_no_cache():
    case = beside("llama")
    assert case.model.train()(**case.inputs).past_key_values is None
    assert len(case.model.eval()(**case.inputs).past_key_values) == 4


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the backbone's blocks, as it should be
def test_checkpointing(family, reentrant):
    case = beside(family)
    for m in case.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0

    def gradients():
        torch.manual_seed(7)  # T5's attention has dropouts that are no modules
        case.model.zero_grad()
        case.loss(case.model.train()).backward()
        return [p.grad.clone() for p in case.model.parameters() if p.requires_grad]

    plain = gradients()
    case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(gradients(), plain, strict=True):
        close(a, b)


def test_a_whole_model_may_be_checkpointed():
    case = beside("bert")

    def logits(x):
        return case.model(inputs_embeds=x).logits

    own = [p for p in case.model.parameters() if p.requires_grad]
    x = case.model.bert.embeddings.word_embeddings(case.inputs["input_ids"])
    plain = torch.autograd.grad(logits(x).sum(), own)
    again = torch.autograd.grad(checkpoint(logits, x, use_reentrant=False).sum(), own)
    for a, b in zip(again, plain, strict=True):
        close(a, b)


def test_a_training_goes_on_bit_equal(tmp_path):
    def run():
        case = make("bert")
        pk.attach(case.model, pk.LST(**SMALL), train=("head",))
        batches = [{**case.inputs, "labels": torch.arange(2)}] * 2
        return case, batches

    case, batches = run()
    before = case.loss(case.model).item()
    log = pk.fit(case.model, batches, epochs=4, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]
    assert case.loss(case.model).item() != before
    stopped, batches = run()

    def stop(epoch, model):
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        pk.fit(stopped.model, batches, epochs=4, progress=False, checkpoint=tmp_path / "c", on_epoch=stop)
    resumed, batches = run()
    pk.fit(resumed.model, batches, epochs=4, progress=False, checkpoint=tmp_path / "c", resume=True)
    for (_, a), (_, b) in zip(tuners(case.model, "default"), tuners(resumed.model, "default"), strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_tuner_under_it_is_refused_where_it_would_not_be_trained():
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2), name="below")
    pk.attach(case.model, pk.LST(**SMALL))
    with pytest.raises(RuntimeError, match="gets no gradient under LST; freeze or detach it"):
        pk.fit(case.model, [{**case.inputs, "labels": torch.arange(2)}], progress=False)
    for _, tuner in tuners(case.model, "below"):
        tuner.requires_grad_(False)
    pk.fit(case.model, [{**case.inputs, "labels": torch.arange(2)}], progress=False)


def test_a_frozen_adapter_below_is_what_the_ladder_sees():
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2), name="below")
    pk.attach(case.model, pk.LST(**SMALL))
    before = case.call(case.model)
    perturb(case.model, "below")
    assert not torch.allclose(case.call(case.model), before)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_quantised_backbone_gives_its_dense_values(name):
    case, twin = make("llama"), make("llama")
    pk.quantize(case.model, name)
    with torch.no_grad():
        for path, module in case.model.named_modules():
            if hasattr(module, "dense"):
                twin.model.get_submodule(path).weight.copy_(module.dense())
    for c in (case, twin):
        pk.attach(c.model, pk.LST(**SMALL))
    (own,), (dense,) = sides(case.model).values(), sides(twin.model).values()
    for p, q in zip(own.parameters(), dense.parameters(), strict=True):
        assert torch.equal(p, q)
    perturb(case.model)
    case.loss(case.model.train()).backward()
    assert all(p.grad is not None for p in own.parameters())


# -- sharing ----------------------------------------------------------------------------------------------------------


def test_threads_do_not_mix_their_hidden_states():
    case = beside("gpt2")
    batches = [torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        expected = [case.model(ids).logits for ids in batches]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(case.model(batches[i]).logits, expected[i]):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_several_side_networks_share_one_pass_of_the_backbone():
    case = make("bert")
    for seed, name in enumerate(("topic", "tone")):
        pk.attach(case.model, pk.LST(**SMALL), name=name, seed=seed)
        perturb(case.model, name)
    expected = {n: case.call(pk.set_active(case.model, n)) for n in ("topic", "tone")}
    runs = []
    case.model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: runs.append(1))
    with pk.shared_trunk(case.model) as blocks:
        assert blocks == 2
        for name, out in expected.items():
            close(case.call(pk.set_active(case.model, name)), out)
    assert len(runs) == 1
    assert not torch.allclose(expected["topic"], expected["tone"])


def test_the_last_of_two_active_ones_runs_alone():
    case = make("t5")
    for name in ("a", "b"):
        pk.attach(case.model, pk.LST(**SMALL), name=name, seed=ord(name))
        perturb(case.model, name)
    both = case.call(case.model)
    close(case.call(pk.set_active(case.model, "b")), both)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_hidden_states_asked_for_are_those_of_the_backbone(family):
    case, twin = make(family), make(family)
    pk.attach(case.model, pk.LST(**SMALL))
    with torch.no_grad():
        plain = twin.model(**case.inputs, output_hidden_states=True).hidden_states
        own = case.model(**case.inputs, output_hidden_states=True).hidden_states
    assert [h.shape for h in own] == [h.shape for h in plain]
    for a, b in list(zip(own, plain, strict=True))[:-1]:
        close(a, b)


def test_the_pooler_reads_the_side():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        )
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    pk.attach(model, pk.LST(**SMALL))
    out = model(x)
    close(out.pooler_output, model.pooler(out.last_hidden_state))
    out.pooler_output.sum().backward()
    assert all(p.grad is not None for p in model.peft.default.parameters())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reduction": 0}, "reduction = 0"),
        ({"drop": 1}, "drop = 1"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"init": "zeros"}, "expected prune or random"),
    ],
)
def test_fields_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        pk.LST(**fields)


def test_what_is_no_stack_of_transformers_is_refused():
    from torch import nn

    case = make("bert")
    for targets, words in (("block", "lists of blocks"), ("q", "lists of blocks")):
        with pytest.raises(ValueError, match=words):
            pk.attach(case.model, pk.LST(**SMALL), targets)
    with pytest.raises(ValueError, match="reduction = 3 does not divide hidden_size 16"):
        pk.attach(case.model, pk.LST(reduction=3))
    assert not hasattr(case.model.bert.encoder, "peft")
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="has no config"):
        pk.attach(plain, pk.LST(**SMALL), "model")
    with pytest.raises(ValueError, match="is not known for MLP"):
        pk.attach(make("mlp").model, pk.LST(**SMALL))


def test_the_global_generator_is_left_alone():
    case = make("bert")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    pk.attach(case.model, pk.LST(**SMALL, init="random"))
    assert torch.equal(torch.rand(3), expected)
    twin = copy.deepcopy(make("bert"))
    pk.attach(twin.model, pk.LST(**SMALL, init="random"))
    close(case.call(case.model), twin.call(twin.model))
    assert calibrated(case)
