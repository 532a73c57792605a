"""What tuners compute from tensors that seldom change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0  # of all optimizers: fused ones and those of other libraries write without counting a version


def _stepped(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_stepped)


class Kept(dict[str, tuple[list, Any]]):
    """name -> (what it was computed from, value); in no state_dict, pickle or copy.

    Clear it after writes that no version counts: FSDP's, and those to `.data`.
    """

    def once(self, name: str, compute: Callable[[], Any], sources: Sequence[Tensor]) -> Any:
        """compute(), or what it returned last where no source was replaced, written into or trained since."""
        transformed = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or any(t.is_inference() for t in sources):  # the latter count no versions
            return compute()
        # A weak reference: the memory of a weight that is gone is neither held nor mistaken for its successor's.
        state: list[Any] = [
            (StorageWeakRef(t.untyped_storage()), t._version, t.storage_offset(), t.shape, t.stride()) for t in sources
        ]
        state.append(_steps if any(t.requires_grad for t in sources) else None)
        kept = self.get(name)
        if kept is None or kept[0] != state:
            kept = self[name] = state, compute()
        return kept[1]

    def __reduce__(self) -> tuple:
        return Kept, ()
