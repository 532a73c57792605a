"""LeTS: the mask is that of SNIP, and tasks share what lies below their own blocks."""

import pytest
import torch
from models import make
from toys import classified

import peft_kernels as pk
from peft_kernels.engine.attach import tuners


def test_the_mask_is_the_largest_change_of_the_loss_over_all_weights():
    """Against autograd: the k largest |w g| of the mean gradient over the rows, of all tensors together."""
    model, batches = classified()
    pk.attach(model, pk.LeTS(keep_ratio=0.1))
    pk.calibrate(model, batches, progress=False)
    weights = {path: model.get_submodule(path).weight for path, _ in tuners(model, "default")}
    for w in weights.values():
        w.requires_grad_(True)
    pk.set_active(model, [])
    sum(model(**batch).loss * len(batch["labels"]) for batch in batches).backward()
    scores = {path: (w * w.grad).abs().detach().flatten() for path, w in weights.items()}
    k = round(0.1 * sum(s.numel() for s in scores.values()))
    least = torch.cat(list(scores.values())).sort(descending=True).values[k - 1]
    for path, tuner in tuners(model, "default"):
        assert torch.equal(tuner.positions.long(), (scores[path] >= least).nonzero().flatten())
        assert tuner.sums is None
        assert tuner.site is None


def test_tuned_leaves_the_trunk_to_all_tasks():
    case = make("bert")
    for name in ("a", "b"):
        pk.attach(case.model, pk.LeTS(keep_ratio=0.2, tuned=1), name=name, train=("head",))
        pk.set_active(case.model, name)
        pk.calibrate(case.model, [{**case.inputs, "labels": torch.tensor([0, 2])}], progress=False)
        assert {path.split(".")[3] for path, t in tuners(case.model, name) if "layer" in path} == {"1"}
        pk.fit(case.model, [{**case.inputs, "labels": torch.tensor([0, 2])}] * 3, seed=len(name), progress=False)
    alone = {name: pk.set_active(case.model, name)(**case.inputs).logits for name in ("a", "b")}
    with pk.shared_trunk(case.model) as shared:
        together = {name: pk.set_active(case.model, name)(**case.inputs).logits for name in ("a", "b")}
    assert shared == 1
    for name, out in alone.items():
        assert torch.equal(together[name], out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"tuned": -1}, "tuned = -1"), ({"samples": 0}, "samples = 0"), ({"keep_ratio": 0.0}, "LeTS keep_ratio = 0.0")],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        pk.LeTS(**fields)
    with pytest.raises(ValueError, match=r"layers \[-3\] do not exist"):
        pk.attach(make("bert").model, pk.LeTS(tuned=3))
