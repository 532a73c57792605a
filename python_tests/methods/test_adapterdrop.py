"""AdapterDrop: which layers have an adapter, the draws of a training, and what is deployed."""

import copy

import pytest
import torch
from models import Case, close, make, perturb
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.roles import layer_of


def small(**fields):
    return pk.AdapterDrop(**{**pk.AdapterDrop.tiny, **fields})


def adapters(model, name="default"):
    """path -> the tuner there that has a bottleneck"""
    return {path: t for path, t in tuners(model, name) if hasattr(t, "adapter")}


def deep(layers=5, kind="bert"):
    from transformers import AutoModelForSequenceClassification, BertConfig

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    model = AutoModelForSequenceClassification.from_config(BertConfig(**sizes, num_hidden_layers=layers))
    return Case(model, {"input_ids": torch.randint(50, (2, 7))})


def trained():
    """In training mode with random adapters off their start, and no other draws."""
    case = deep()
    pk.attach(case.model, small(drop=3, random=True))
    perturb(case.model).train()
    for m in case.model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return case


def running(case):
    """The layers whose adapters run in a call."""
    found = []
    hooks = [
        t.adapter.register_forward_hook(lambda *_, path=path: found.append(layer_of(path)))
        for path, t in adapters(case.model).items()
    ]
    case.call(case.model)
    for hook in hooks:
        hook.remove()
    return found


def test_the_lowest_layers_of_each_stack_have_no_adapter():
    for family, paths in (("t5", 2), ("bart", 2), ("llama", 1)):
        found = adapters(pk.attach(make(family).model, pk.AdapterDrop(drop=1)))
        assert len(found) == paths and {layer_of(path) for path in found} == {1}
    everywhere = adapters(pk.attach(make("t5").model, pk.AdapterDrop(drop=1, random=True)))
    assert len(everywhere) == 4


def test_backward_ends_at_the_lowest_adapter():
    case = deep()
    pk.attach(case.model, pk.AdapterDrop(drop=3))
    trained = []
    for layer in case.model.bert.encoder.layer:
        layer.register_forward_hook(lambda m, args, out: trained.append(out.requires_grad))
    case.call(case.model)
    assert trained == [False, False, False, True, True]


def test_each_step_draws_how_many_layers_go_without():
    """A training step drops the same layers in every call, evaluation none; every number up to `drop` comes."""
    case = deep()
    pk.attach(case.model, pk.AdapterDrop(drop=3, random=True))
    method, own = pk.AdapterDrop(drop=3, random=True), [t for _, t in tuners(case.model, "default")]
    case.model.train()
    numbers = []
    for _ in range(60):
        ran = running(case)
        assert ran == running(case) == list(range(5 - len(ran), 5))
        numbers.append(5 - len(ran))
        method.step(own, 0.0)
    assert set(numbers) == {0, 1, 2, 3} and all(numbers.count(n) > 5 for n in range(4))
    case.model.eval()
    assert running(case) == [0, 1, 2, 3, 4]


def test_the_draws_follow_from_the_seed():
    def draws(seed):
        case = deep()
        pk.attach(case.model, pk.AdapterDrop(drop=3, random=True), seed=seed)
        own, found = [t for _, t in tuners(case.model, "default")], []
        for _ in range(20):
            torch.rand(3)  # the global generator has no part in it
            found.append(int(own[0].state[1]))
            own[0].cfg.step(own, 0.0)
        return found

    assert draws(1) == draws(1) != draws(2)


def test_fit_draws_before_each_step_and_resumes_bit_equal(tmp_path):
    def run(stop=None, **where):
        case, drawn = deep(), []
        pk.attach(case.model, pk.AdapterDrop(size=4, drop=3, random=True), train=("head",))
        lender = next(t for _, t in tuners(case.model, "default") if hasattr(t, "lender"))

        def on_epoch(epoch, model):
            drawn.append(int(lender.state[0]))
            if epoch == stop:
                raise KeyboardInterrupt
            return {}

        batches = [{**case.inputs, "labels": torch.tensor([i % 2, 1])} for i in range(4)]
        log = pk.fit(case.model, batches, epochs=3, lr=1e-2, on_epoch=on_epoch, progress=False, **where)
        return case.model.state_dict(), [row["loss"] for row in log if "step" in row], drawn

    whole, losses, drawn = run()
    assert drawn == [5, 9, 13]
    with pytest.raises(KeyboardInterrupt):
        run(2, checkpoint=tmp_path / "c", checkpoint_every=3)
    resumed, again, _ = run(checkpoint=tmp_path / "c", resume=True)
    assert again == losses
    assert all(torch.equal(t, resumed[key]) for key, t in whole.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_drops_the_same_layers(reentrant):
    case = trained()
    method, own = pk.AdapterDrop(drop=3, random=True), [t for _, t in tuners(case.model, "default")]
    case.model.enable_input_require_grads()

    def gradients():
        case.model.zero_grad()
        case.loss(case.model).backward()
        return {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}

    for _ in range(6):
        method.step(own, 0.0)
        case.model.gradient_checkpointing_disable()
        plain = gradients()
        case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = gradients()
        assert plain.keys() == again.keys()
        for n, g in plain.items():
            close(again[n], g)


def test_one_compiled_graph_serves_all_draws():
    case = trained()
    own, graphs = [t for _, t in tuners(case.model, "default")], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, seen = torch.compile(case.model, fullgraph=True, backend=backend), set()
    for _ in range(8):
        close(case.call(compiled), case.call(case.model))
        seen.add(int(own[0].state[1]))
        own[0].cfg.step(own, 0.0)
    assert len(graphs) == 1 and len(seen) > 1


def test_deploy_takes_the_lowest_adapters_away(tmp_path):
    case = deep()
    pk.attach(case.model, small(drop=3, random=True), train=("head",), seed=4)
    perturb(case.model).eval()
    every = pk.counts(case.model).trainable
    per_layer = sum(p.numel() for p in next(iter(adapters(case.model).values())).parameters())
    reference = copy.deepcopy(case)
    for path, t in adapters(reference.model).items():
        if layer_of(path) < 2:
            t.adapter.up_weight.data.zero_()
            t.adapter.up_bias.data.zero_()
    assert pk.AdapterDrop.deploy(case.model, 2) is case.model
    assert {layer_of(path) for path in adapters(case.model)} == {2, 3, 4} and pk.active(case.model) == ["default"]
    close(case.call(case.model), reference.call(reference.model))
    assert pk.counts(case.model).trainable == every - 2 * per_layer
    pk.save(case.model, tmp_path / "a")
    fresh = deep()
    pk.load(fresh.model.eval(), tmp_path / "a")
    assert torch.equal(fresh.call(fresh.model), case.call(case.model))
    pk.AdapterDrop.deploy(fresh.model, 4)
    assert {layer_of(path) for path in adapters(fresh.model)} == {4}
    assert not any(p.requires_grad for t in adapters(fresh.model).values() for p in t.parameters())
    for drop, message in ((3, "none in the lowest 4 layers; give drop at least"), (5, "leaves no adapter")):
        with pytest.raises(ValueError, match=message):
            pk.AdapterDrop.deploy(fresh.model, drop)
    assert {layer_of(path) for path in adapters(fresh.model)} == {4}
    pk.detach(case.model)
    plain = deep()
    close(case.call(case.model), plain.call(plain.model.eval()))
    pk.attach(plain.model, pk.Houlsby(), name="h")
    with pytest.raises(ValueError, match=r"adapter 'h' is Houlsby; expected AdapterDrop"):
        pk.AdapterDrop.deploy(plain.model, 1, "h")


def test_a_random_adapter_on_the_meta_device():
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = pk.attach(BertModel(BertConfig(), add_pooling_layer=False), pk.AdapterDrop(random=True))
    assert pk.counts(model).trainable == 894_528
