"""One batch for several adapters: the blocks below the first tuned one run once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .attach import all_adapters, refuse_routed, state_of
from .roles import resolve
from .rows import refuse_cache, same
from .site import Site


@contextmanager
def shared_trunk(model: nn.Module) -> Iterator[int]:
    """Within the `with`, further calls of the model with the very same arguments skip the blocks without a tuner.

    Those are the blocks before the first in which any attached adapter has a tuner, active or not; their number is what
    the `with` gives. So several tasks on one frozen model share all below their first own layer (Fu et al. 2021,
    LeTS):

        with pk.shared_trunk(model):
            for name in ("topic", "tone"):
                outputs[name] = pk.set_active(model, name)(**batch)

    The arguments must be the same objects, unchanged. Their hidden states are held until other arguments come or the
    block ends. A call under grad mode shares the graph, of which no part is trained, so each call may run its backward.
    ValueError where the family's blocks are not known; RuntimeError under a route or where a block gets a key-value
    cache (pass use_cache=False).
    """
    refuse_routed(state_of(model), "shared_trunk")
    trunk = _Trunk(model)
    for number, site in enumerate(trunk.blocks):
        if "forward" in vars(site.module):
            raise RuntimeError(f"{site.name} has an instance forward (an accelerate hook?); remove it first")
        trunk.plant(number, site)
    handle = model.register_forward_pre_hook(trunk.begin, with_kwargs=True)
    try:
        yield len(trunk.blocks)
    finally:
        handle.remove()
        for site in trunk.blocks:
            del vars(site.module)["forward"]


class _Trunk:
    def __init__(self, model: nn.Module):
        blocks = resolve(model, ("block",))
        tuned = [path for path, _ in all_adapters(model)]
        first = next((i for i, site in enumerate(blocks) if any(_inside(path, site.name) for path in tuned)), None)
        self.blocks = blocks[:first]
        self.call: tuple[tuple, dict[str, Any]] | None = None
        self.known: dict[int, Any] = {}  # block -> its output in that call

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.call is None or not same(self.call, (args, kwargs)):
            self.call, self.known = (args, kwargs), {}

    def plant(self, number: int, site: Site) -> None:
        run = site.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            refuse_cache(site, args, kwargs, "which a block that is skipped would not fill")
            if number not in self.known:
                self.known[number] = run(*args, **kwargs)
            return self.known[number]

        vars(site.module)["forward"] = forward


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".") or not path
