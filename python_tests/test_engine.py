"""The life of adapters around any method: stacks, names, files, foreign forwards and classes, counts, errors."""

import dataclasses
import inspect
import json

import pytest
import torch
from models import assert_same, attached, close, fits, make, perturb, snapshot
from torch import nn
from torch._dynamo.testing import CompileCounter

import peft_kernels as pk
from peft_kernels.engine.attach import all_adapters, tuners

# -- stacks, names, flags ---------------------------------------------------------------------------------------------


def test_a_stack_folds_and_merges_in_order():
    case = make("bert", torch.float64)
    pk.attach(case.model, pk.LoRA(rank=2), ("k", "v", "down"), name="low")
    pk.attach(case.model, pk.IA3(), name="scales")
    pk.attach(case.model, pk.BitFit(), name="biases")
    for name in ("low", "scales", "biases"):
        perturb(case.model, name)
    assert pk.active(case.model) == ["low", "scales", "biases"]
    before, adapted = snapshot(case.model), case.call(case.model)
    pk.merge(case.model)
    close(case.call(case.model), adapted, torch.float64)
    pk.unmerge(case.model)
    assert_same(case.model, before)
    with pytest.raises(RuntimeError, match="low lies below"):
        pk.merge(case.model, "scales")
    pk.merge(case.model, "low")
    close(case.call(case.model), adapted, torch.float64)


def test_set_active_and_disabled_choose_what_runs():
    case = make("bert")
    base = case.call(case.model)
    pk.attach(case.model, pk.LoRA(rank=2), name="one", train=("head",))
    pk.attach(case.model, pk.LoRA(rank=3), name="two", train=("head",))
    perturb(case.model, "one")
    perturb(case.model, "two")
    both = case.call(case.model)
    alone = {n: case.call(pk.set_active(case.model, [n])) for n in ("one", "two")}
    assert not torch.equal(alone["one"], alone["two"])
    assert torch.equal(case.call(pk.set_active(case.model, ["two", "one"])), both)
    with pk.disabled(case.model):
        assert torch.equal(case.call(case.model), base)
    assert torch.equal(case.call(case.model), both)
    pk.rename(case.model, "one", "train")  # also the name of a method of every module
    assert pk.active(case.model) == ["train", "two"]
    assert torch.equal(case.call(case.model), both)
    pk.detach(case.model, "two")
    assert torch.equal(case.call(case.model), alone["one"])


def test_several_adapters_save_side_by_side(tmp_path):
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2))
    pk.attach(case.model, pk.IA3(), name="scales")
    perturb(case.model)
    perturb(case.model, "scales")
    pk.save(case.model, tmp_path)
    fresh = make("bert")
    pk.load(pk.load(fresh.model, tmp_path), tmp_path / "scales")
    assert pk.active(fresh.model) == ["default", "scales"]
    assert torch.equal(fresh.call(fresh.model), case.call(case.model))


def test_initial_values_depend_on_the_seed_and_the_path_alone():
    one, same, other = (make("llama").model for _ in range(3))
    pk.attach(one, pk.LoRA(), seed=1)
    torch.manual_seed(99)
    pk.attach(same, pk.LoRA(), seed=1, train=("head",))
    pk.attach(other, pk.LoRA(), seed=2)
    a, b, c = ({s: t.a.detach() for s, t in tuners(m, "default") if hasattr(t, "a")} for m in (one, same, other))
    assert all(torch.equal(a[s], b[s]) for s in a)
    assert not any(torch.equal(a[s], c[s]) for s in a)
    values = list(a.values())
    assert not torch.equal(values[0], values[2])


# -- what others plant on modules -------------------------------------------------------------------------------------


def test_an_instance_forward_is_lifted_and_put_back():
    """accelerate's hooks and tensor parallelism plant one; it becomes the innermost callable."""
    case = make("mlp")
    inner = case.model.first.forward
    calls = []

    def hooked(x):
        calls.append(1)
        return inner(x) * 1.0

    case.model.first.forward = hooked
    base = case.call(case.model)
    pk.attach(case.model, pk.LoRA(rank=2), ("first",))
    perturb(case.model)
    assert not torch.equal(case.call(case.model), base)
    assert len(calls) == 2
    pk.detach(case.model)
    assert vars(case.model.first)["forward"] is hooked
    assert torch.equal(case.call(case.model), base)


def test_a_bound_leftover_of_our_class_is_removed():
    case = make("mlp")
    pk.attach(case.model, pk.LoRA(rank=2), ("first",))
    case.model.first.forward = case.model.first.forward  # what a removed hook leaves behind
    pk.detach(case.model)
    assert "forward" not in vars(case.model.first)


def test_a_forward_planted_over_ours_stops_detach():
    case = make("mlp")
    pk.attach(case.model, pk.LoRA(rank=2), ("first",))
    ours = case.model.first.forward
    case.model.first.forward = lambda x: ours(x)
    with pytest.raises(RuntimeError, match="instance forward"):
        pk.detach(case.model)


def test_a_class_laid_over_ours_stops_detach_and_attach():
    class FSDPModule:
        pass

    case = make("mlp")
    pk.attach(case.model, pk.LoRA(rank=2), ("first",))
    case.model.first.__class__ = type("FSDPLinear", (FSDPModule, type(case.model.first)), {})
    with pytest.raises(RuntimeError, match="laid over"):
        pk.detach(case.model)
    with pytest.raises(ValueError, match="attach first"):
        pk.attach(case.model, pk.LoRA(rank=2), ("first",), name="two")


def test_torch_fast_paths_are_refused():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        pk.attach(layer, pk.LoRA(rank=2), ("linear1",))
    with pytest.raises(ValueError, match="MultiheadAttention"):
        pk.attach(layer, pk.LoRA(rank=2), ("out_proj",))


def test_the_swapped_class_is_the_class_others_knew():
    case = attached("lora", "llama")
    module = case.model.model.layers[0].self_attn.q_proj
    assert isinstance(module, torch.nn.Linear)
    assert type(module).__name__ == "Linear"
    assert type(module).__module__ == torch.nn.Linear.__module__
    assert case.model.generate(case.inputs["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 9)


def test_modules_are_called_by_keyword_too():
    """As Llama calls its attention."""
    case = attached("lora", "bert")
    linear = perturb(case.model).bert.encoder.layer[0].attention.self.query
    x = torch.randn(2, 16)
    assert torch.equal(linear(input=x), linear(x))
    llama = make("llama")
    llama.inputs["use_cache"] = False
    plain = llama.call(llama.model)
    pk.attach(llama.model, pk.Gated(pk.LayerType(types=("attn",))))
    close(llama.call(llama.model), plain)
    perturb(llama.model)
    assert not torch.allclose(llama.call(llama.model), plain)


def test_a_model_that_is_itself_a_site_stays_what_it_was(tmp_path):
    """transformers reads the class name, the signature and the generation code of the model it is given."""
    case = make("llama")
    names = list(inspect.signature(case.model.forward).parameters)
    plain = case.model.generate(case.inputs["input_ids"], max_new_tokens=3, do_sample=False)
    pk.attach(case.model, pk.FullTuning())
    assert list(inspect.signature(case.model.forward).parameters) == names
    assert torch.equal(case.model.generate(case.inputs["input_ids"], max_new_tokens=3, do_sample=False), plain)
    case.model.config.save_pretrained(tmp_path)
    case.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_dropout_draws_from_torch_and_only_in_training():
    case = attached("lora", "bert")
    perturb(case.model)
    assert torch.equal(case.call(case.model), case.call(case.model))
    case.model.train()
    for m in case.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(case.call(case.model))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_autocast_keeps_adapters_in_fp32():
    case = attached("lora", "llama")
    perturb(case.model).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call(case.model)
        case.loss(case.model).backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in case.model.parameters() if p.requires_grad)


# -- explain, graphs, devices, sharding -------------------------------------------------------------------------------


def test_explain_names_op_and_backend():
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2), name="low")
    pk.attach(case.model, pk.IA3(), name="scales")
    pk.attach(case.model, pk.BitFit(), name="biases")
    rows = pk.explain(case.model)
    assert {(r["adapter"], r["op"], r["backend"]) for r in rows} == {
        ("low", "lora_linear", "cpu"),
        ("scales", "rescale", "cpu"),
        ("biases", "torch", "torch"),
    }
    assert {"site", "adapter", "op", "backend", "reasons"} == rows[0].keys()
    assert next(r for r in rows if r["op"] == "lora_linear")["reasons"]["cuda"]
    table = str(rows)
    assert "4 sites" in table
    assert "lora_linear" in table
    with pk.backend("reference"):
        assert {r["backend"] for r in pk.explain(case.model)} == {"reference", "torch"}
    gpt2 = make("gpt2")
    pk.attach(gpt2.model, pk.LoRA(rank=2))
    assert {r["op"] for r in pk.explain(gpt2.model)} == {"lora_add"}  # rows of a fused linear: y exists already


@pytest.mark.parametrize("key", pk.methods())
def test_explain_takes_every_method(key):
    case = attached(key, "bert" if fits(key, "bert") else "gpt2")
    assert {row["site"] for row in pk.explain(case.model)} == {site for site, _ in all_adapters(case.model)}


def test_explain_names_the_op_of_adapters():
    for key, ops in {"houlsby": {"bottleneck", "torch"}, "pfeiffer": {"bottleneck_add"}, "lst": {"torch"}}.items():
        assert {row["op"] for row in pk.explain(attached(key, "bert").model)} == ops


def test_graph_counts():
    """One adapter, a stack, merged: one graph each; batches of other sizes add one, going back adds none."""
    case = make("llama")
    pk.attach(case.model, pk.LoRA(rank=2))
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(case.model, fullgraph=True, backend=graphs)
    tokens = case.inputs["input_ids"]

    def run():
        with torch.no_grad():
            compiled(input_ids=tokens)
        return graphs.frame_count

    assert [run(), run()] == [1, 1]
    pk.attach(case.model, pk.BitFit(), name="biases")
    assert [run(), run()] == [2, 2]
    pk.merge(case.model)
    assert [run(), run()] == [3, 3]
    pk.unmerge(case.model)
    tokens = tokens[:, :5]
    run()
    before = graphs.frame_count
    for length in (4, 6, 5):
        tokens = torch.randint(3, 50, (2, length))
        run()
    assert graphs.frame_count <= before + 1


def test_an_offloaded_weight_is_tuned_where_it_is_executed():
    case = make("mlp")
    values = case.model.first.weight.detach().clone()
    case.model.first.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        pk.attach(case.model, pk.LoRA(rank=2), ("first",))
    case.model.first._hf_hook = type("Hook", (), {"execution_device": "cpu"})()

    def hooked(x):  # what accelerate's hook does: bring the weight for the call
        return torch.nn.functional.linear(x, values)

    case.model.first.forward = hooked
    pk.attach(case.model, pk.LoRA(rank=2), ("first",))
    assert case.model.first.peft.tuners["default"].a.device.type == "cpu"
    assert case.call(case.model).isfinite().all()
    with pytest.raises(RuntimeError, match="offloaded"):
        pk.merge(case.model)


def test_fully_sharded_training_equals_plain_training(tmp_path):
    """FSDP2 on one process: attach first is right, attach after is refused."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    plain, sharded, late = (make("llama") for _ in range(3))
    for case in (plain, sharded):
        perturb(pk.attach(case.model, pk.LoRA(rank=2)))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in sharded.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded.model, mesh=mesh)
        for case in (plain, sharded):
            case.loss(case.model).backward()
        theirs = {n: p.grad.full_tensor() for n, p in sharded.model.named_parameters() if p.grad is not None}
        ours = {n: p.grad for n, p in plain.model.named_parameters() if p.grad is not None}
        assert ours.keys() == theirs.keys()
        for n, g in ours.items():
            close(theirs[n], g)
        fully_shard(late.model.model.layers[0], mesh=mesh)
        with pytest.raises(ValueError, match="attach first"):
            pk.attach(late.model, pk.LoRA(rank=2))
        mlp = make("mlp").model
        mlp.first.weight = nn.Parameter(distribute_tensor(mlp.first.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="is a DTensor"):
            pk.attach(mlp, pk.LoRA(rank=2), ("first",))
    finally:
        dist.destroy_process_group()


# -- traps -------------------------------------------------------------------------------------------------------------


def test_a_sequential_keeps_its_own_steps():
    model = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(3, 6)
    base = model(x)
    pk.attach(model, pk.LoRA(rank=2), ("0",), train=("1",))
    perturb(model)
    adapted = model(x)
    assert len(model[1]) == 3
    assert isinstance(model[1][-1], nn.Linear)
    assert len(model[1][:2]) == 2
    with pk.disabled(model):
        assert torch.equal(model(x), base)
    pk.merge(model)
    close(model(x), adapted)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("method", [pk.LoRA(rank=2), pk.BitFit()], ids=["lora", "bitfit"])
def test_a_linear_with_a_forward_of_its_own_is_called(method):
    model, x = nn.Sequential(Doubled(6, 5)), torch.randn(3, 6)
    base = model(x)
    pk.attach(model, method, ("0",))
    assert torch.equal(model(x), base)
    perturb(model)
    assert not torch.equal(model(x), base)
    with pytest.raises(RuntimeError, match="forward of its own"):
        pk.merge(model)


def test_a_merge_that_does_not_fit_the_dtype_is_refused():
    model = nn.Sequential(nn.Linear(8, 8).half())
    pk.attach(model, pk.LoRA(rank=1, alpha=1.0), ("0",))
    tuner = model[0].peft.tuners["default"]
    tuner.a.data.fill_(400.0)
    tuner.b.data.fill_(400.0)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="not be finite"):
        pk.merge(model)
    assert_same(model, before)


def test_a_head_inside_a_module_trained_whole_is_trained_once():
    case = make("bert")
    pk.attach(case.model, pk.FullTuning(), train=("head",))
    assert pk.counts(case.model).trainable == pk.counts(case.model).total
    with pytest.raises(ValueError, match="trained whole already"):
        pk.attach(make("bert").model, pk.LoRA(rank=2), ("classifier",), train=("head",))


def test_two_roots_over_one_module_are_refused():
    case = make("bert")
    pk.attach(case.model.bert, pk.LoRA(rank=2))
    for name in ("default", "other"):
        with pytest.raises(ValueError, match="another module"):
            pk.attach(case.model, pk.LoRA(rank=2), name=name)


def test_batch_norm_comes_back_as_it_was():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(16, 6)
    pk.attach(model, pk.FullTuning())
    model(x)
    tuned = model.eval()(x)
    pk.merge(model)
    close(model(x), tuned)
    pk.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    pk.attach(model.train(), pk.LoRA(rank=1), ("0",))
    model(x)
    pk.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_hooks_of_a_module_trained_whole_run_once():
    model, x = nn.Sequential(nn.Linear(6, 2)), torch.randn(3, 6)
    model[0].register_forward_hook(lambda m, i, o: o * 2)
    base = model(x)
    pk.attach(model, pk.Head(), ("0",))
    assert torch.equal(model(x), base)
    planted = nn.Sequential(nn.Linear(6, 2))
    planted[0].forward = planted[0].forward
    with pytest.raises(ValueError, match="instance forward"):
        pk.attach(planted, pk.Head(), ("0",))


def test_roles_hold_where_globs_picked_the_modules():
    by_role, by_glob = make("bert"), make("bert")
    pk.attach(by_role.model, pk.IA3(feedforward="down"), ("k", "down"))
    pk.attach(by_glob.model, pk.IA3(), ("*.key", "*layer.?.output.dense"))
    assert pk.counts(by_role.model) == pk.counts(by_glob.model)
    model = pk.attach(make("bert").model, pk.LoRA(rank=2, rank_pattern={"q": 4}), ("*.query",))
    assert pk.counts(model).rank == 8
    with pytest.raises(ValueError, match="'typo' matches none"):
        pk.attach(make("bert").model, pk.LoRA(rank=2, rank_pattern={"typo": 4}))
    case = make("gpt2")
    pk.attach(case.model, pk.LoRA(rank=2), ("q", "v"), exclude=("q",))
    assert pk.counts(case.model).rank == 4


def test_load_by_name_takes_the_subdirectory(tmp_path):
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2))
    pk.attach(case.model, pk.IA3(), name="scales")
    pk.save(case.model, tmp_path)
    model = pk.load(make("bert").model, tmp_path, "scales")
    assert pk.counts(model) == dataclasses.replace(pk.counts(case.model, "scales"), trainable=0)


def test_weights_and_config_of_two_saves_do_not_mix(tmp_path):
    pk.save(attached("lora", "bert").model, tmp_path / "a")
    other = pk.attach(make("bert").model, pk.LoRA(rank=2, alpha=1.0))
    pk.save(other, tmp_path / "b")
    (tmp_path / "b" / "adapter_config.json").replace(tmp_path / "a" / "adapter_config.json")
    with pytest.raises(ValueError, match="not saved together"):
        pk.load(make("bert").model, tmp_path / "a")


def test_two_adapters_change_a_number_once():
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("one", "two"):
        pk.attach(model, pk.LoRA(rank=5), ("0",), name=name)
    assert (pk.counts(model).changed, pk.counts(model).rank) == (64, 8)


@pytest.mark.parametrize("name", ["chain", "site", "train", "half"])
def test_any_name_will_do(name):
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    base = model(x)
    pk.attach(model, pk.LoRA(rank=1), ("0",), name=name)
    assert torch.equal(model.train()(x), base)
    pk.detach(model, name)
    with pytest.raises(ValueError, match="flag of every torch module"):
        pk.attach(model, pk.LoRA(rank=1), ("0",), name="training")


@pytest.mark.parametrize(
    "fields", [{"rank": "8"}, {"rank": 2.5}, {"alpha": "x"}, {"alpha": float("nan")}, {"rslora": 1}]
)
def test_fields_are_checked_by_type(fields):
    with pytest.raises(ValueError, match="expected"):
        pk.LoRA(**fields)


def test_forward_mode_and_second_derivatives_of_an_adapted_model():
    case = attached("lora", "mlp", torch.float64)
    perturb(case.model)
    x = case.inputs["x"].clone().requires_grad_()
    tangent = torch.randn_like(x)
    jacobian = torch.autograd.functional.jacobian(case.model, x)
    expected = (jacobian * tangent).sum((-2, -1))
    with torch.autograd.forward_ad.dual_level():
        out = case.model(torch.autograd.forward_ad.make_dual(x, tangent))
        close(torch.autograd.forward_ad.unpack_dual(out).tangent, expected, torch.float64)
    close(torch.func.jvp(case.model, (x,), (tangent,))[1], expected, torch.float64)
    assert torch.autograd.gradgradcheck(case.model, (x,), fast_mode=True)


def test_reentrant_checkpointing_repeats_the_draw():
    case = attached("lora", "mlp")
    perturb(case.model).train()
    x = case.inputs["x"].clone().requires_grad_()

    def gradients(run):
        torch.manual_seed(3)
        case.model.zero_grad()
        run(x).sum().backward()
        return [p.grad.clone() for p in case.model.parameters() if p.grad is not None]

    checkpointed = gradients(lambda x: torch.utils.checkpoint.checkpoint(case.model, x, use_reentrant=True))
    for ours, plain in zip(checkpointed, gradients(case.model), strict=True):
        close(ours, plain)
