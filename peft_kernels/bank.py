"""AdapterBank: many LoRA adapters on one model, loaded, swapped and evicted while it serves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .engine.attach import Adapter, attach_parts, check_name, detach, is_attached, set_active, state_of, tuners
from .engine.method import Part, numbers, promoted, words
from .engine.roles import resolve
from .engine.site import Site, base_modules
from .engine.slots import Slots
from .engine.text import aligned
from .files import size
from .methods._banked import Banked, BankedTuner
from .methods._updates import Update, updates
from .methods.lora import LoRA

_Factors = tuple[Tensor, Tensor, float]  # a [r, in], bt [r, out], scale


class AdapterBank:
    """Room for LoRA adapters of any rank on one model, which `pk.route` then takes by name, row by row.

        bank = pk.AdapterBank(model, slots=16, max_rank=16)
        bank.load("alice", "directory")  # saved by pk.save or Hugging Face PEFT
        with torch.no_grad(), pk.route(model, ["alice", None, "bob"]):
            model(**x)

    slots: how many adapters; one slot more is kept, so that a full bank can swap one for its next version.
    max_rank: of an adapter. A linear of which several targets are parts (GPT-2's fused q, k, v) has as many times that.
    targets, exclude, layers: the linear layers, as in `pk.attach`. An adapter may tune some of them, not others.
    dtype: of the factors; None: the one in which `pk.load` holds them, fp32 or wider.

    All memory is taken here, (slots + 1) * max_rank * (in + out) numbers per layer, and stays where it is. A graph that
    torch.compile made inside a route serves later ones of as many rows, whatever is loaded, swapped for another rank or
    evicted in between, and in the kernels each row costs its own adapter's rank, without padding. Any thread may call
    anything: a route keeps the versions that it began with until it ends, and no slot in use is written.

    `bank.names`, `len(bank)` and `name in bank` tell what is in it, `bank.free` how many new names there is room for,
    `print(bank)` the sizes. Outside of routes the model runs as before, with what else is attached to it. Banked
    adapters have no dropout and no gradients, and are not saved with the model's. A model has one bank, and a copy of
    the model a copy of it. ValueError for bad values and targets, and what `pk.attach` raises.
    """

    name = "bank"  # its tuners are an adapter of the model, in none of its lists of active ones

    def __init__(
        self,
        model: nn.Module,
        slots: int = 16,
        max_rank: int = 16,
        targets: Sequence[str] | str = LoRA.roles,
        *,
        exclude: Iterable[str] = (),
        layers: Sequence[int] | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"AdapterBank got a {type(model).__name__}; expected a torch.nn.Module")
        for what, value in (("slots", slots), ("max_rank", max_rank)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"AdapterBank {what} = {value!r}; expected at least 1")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"AdapterBank dtype = {dtype}; expected a floating point type")
        if is_attached(model) and state_of(model).bank is not None:
            raise ValueError(f"{type(model).__name__} has a bank already; close that one, or use AdapterBank.of(model)")
        self.targets = words(targets)
        found = resolve(model, self.targets, exclude=words(exclude), layers=numbers(layers))
        ranks: dict[str, int] = {}
        for site in found:
            if site.kind == "linear":
                ranks[site.name] = ranks.get(site.name, 0) + max_rank
        if not ranks:
            raise ValueError(f"AdapterBank: no linear layer among {self.targets}; choose other targets")
        method = Banked(slots + 1, max_rank, dtype, ranks)
        active = list(state_of(model).active) if is_attached(model) else []
        # Values of a bank may be written inside and outside of inference mode only if they are made outside.
        with torch.inference_mode(False):
            attach_parts(model, self.name, Adapter([Part(method, tuple(f"@{path}" for path in ranks))], 0))
        set_active(model, active)
        self.model, self._slots = model, Slots(slots)
        self._contents: dict[int, tuple[list[int], int]] = {}  # slot -> (rank of each layer, numbers)
        state_of(model).bank = self

    @classmethod
    def of(cls, model: nn.Module) -> AdapterBank:
        """The bank of a model, such as a copy of one that has it; ValueError if there is none."""
        bank = state_of(model).bank if is_attached(model) else None
        if not isinstance(bank, cls):
            raise ValueError(f"{type(model).__name__} has no bank; make one with pk.AdapterBank(model)")
        return bank

    # -- what is in it ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The adapters that a route may name now, in the order in which they were loaded first."""
        return list(self._slots.state())

    @property
    def free(self) -> int:
        """How many new names there is room for now."""
        return self._slots.room()

    def __len__(self) -> int:
        return len(self._slots.held)

    def __contains__(self, name: object) -> bool:
        return name in self._slots.held

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    # -- changing it --------------------------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        source: str | os.PathLike | nn.Module | Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        wait: float = 0.0,
    ) -> None:
        """Puts an adapter in under `name`. Where the name is taken, routes that begin from now on get this version.

        source: a directory written by `pk.save` or Hugging Face PEFT, as in `pk.load`; a model, for the values that its
            adapter `name`, or the only one, has now; or tensors by name, with what adapter_config.json holds as config.
        wait: seconds to wait for a slot, while routes still run with older versions.

        FileNotFoundError if the directory holds none. ValueError if it is broken, of another model or not LoRA of
        linear layers, if it tunes a layer that is not the bank's, or has a higher rank. RuntimeError if the bank is
        full. The bank is unchanged then. Loading reads safetensors and JSON only.
        """
        self._require_open()
        check_name(name)
        if name in state_of(self.model).adapters:
            raise ValueError(f"adapter {name!r} is attached to the model; choose another name or detach it")
        found, where = updates(self.model, name, source, config)
        values = self._fitted(found, where)
        with self._slots.filling(name, wait) as slot:
            self._write(slot, values)
            factors = list(values.values())
            self._contents[slot] = [len(a) for a, _, _ in factors], sum(a.numel() + bt.numel() for a, bt, _ in factors)

    def evict(self, name: str) -> None:
        """Takes an adapter out. Routes that run keep it; its slot is free when they end. ValueError if it is not in."""
        try:
            self._slots.evict(name)
        except KeyError:
            raise ValueError(f"no adapter {name!r} in the bank; it holds {', '.join(self.names) or 'none'}") from None

    def close(self) -> None:
        """Takes the bank off the model, with all it holds. RuntimeError while routes run."""
        self._require_open()
        detach(self.model, self.name)

    def _is_open(self) -> bool:
        return is_attached(self.model) and state_of(self.model).bank is self

    def _require_open(self) -> None:
        if not self._is_open():
            raise RuntimeError("the bank is closed, its model has it no longer; make a new one")

    def _tuners(self) -> list[tuple[str, BankedTuner]]:
        """(path of the module, tuner), in model order."""
        return cast("list[tuple[str, BankedTuner]]", list(tuners(self.model, self.name)))

    def _fitted(self, found: list[Update], where: str) -> dict[str, _Factors]:
        """The factors by module path, those of several rows or parts of a module put together; ValueError."""
        if not found:
            raise ValueError(f"{where} holds no LoRA of any layer; expected tensors of one")
        modules = dict(base_modules(self.model))
        own = dict(self._tuners())
        outside = sorted({u.path for u in found} - own.keys())
        if outside:
            if unknown := [path for path in outside if path not in modules]:
                raise ValueError(f"{where} tunes {unknown[0]}, which the model has not; was it another model's?")
            ends = ", ".join(sorted({repr("*." + path.rpartition(".")[2]) for path in outside}))
            raise ValueError(
                f"{where} tunes {len(outside)} layers that the bank's targets {self.targets} leave out "
                f"({outside[0]}); make it with targets for them too, such as {ends}"
            )
        by_path: dict[str, list[Update]] = {}
        for update in found:
            by_path.setdefault(update.path, []).append(update)
        return {
            path: _joined(Site(path, modules[path]), some, own[path].ranks, where) for path, some in by_path.items()
        }

    @torch.no_grad()
    def _write(self, slot: int, values: dict[str, _Factors]) -> None:
        own = self._tuners()
        # Whatever stream used the slot last has to be done with it, and any stream may use it next.
        devices = {tuner.a.device for _, tuner in own if tuner.a.device.type != "cpu"}
        for device in devices:
            torch.accelerator.synchronize(device)
        for path, tuner in own:
            a, bt, scale = values.get(path, (tuner.a[:0], tuner.bt[:0], 0.0))
            tuner.put(slot, a, bt, scale)
        for device in devices:
            torch.accelerator.synchronize(device)

    # -- what routes ask ----------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """How many routes of the model run, in all threads."""
        return self._slots.running

    @contextmanager
    def leased(self, names: Iterable[Any]) -> Iterator[dict[str, int]]:
        """Within the `with`, those of `names` that are in the bank stay what they are: name -> number for the op."""
        with self._slots.leased(names) as slots:
            yield {name: BankedTuner.number(slot) for name, slot in slots.items()}

    # -- reports ------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        own = [t for _, t in self._tuners()] if self._is_open() else []
        held = sum(b.numel() * b.element_size() for t in own for b in t.buffers())
        return f"AdapterBank({len(self)} of {self._slots.size} slots, {len(own)} layers, {size(held)})"

    def __str__(self) -> str:
        """A line for each adapter: its ranks, layers and numbers, and how many running routes use it."""
        lines = [("", "ranks", "layers", "numbers", "routes")]
        for name, (slot, routes) in self._slots.state().items():
            ranks, total = self._contents[slot]
            span = f"{min(ranks)}-{max(ranks)}" if len(set(ranks)) > 1 else f"{ranks[0]}"
            lines.append((name, span, f"{len(ranks)}", f"{total:,}", f"{routes}"))
        return "\n".join([repr(self), *([aligned(lines)] if len(self) else ())])


def _joined(site: Site, found: list[Update], ranks: int, where: str) -> _Factors:
    """The updates of one module as one, with zeros for the rows that an update leaves alone."""
    sizes = [site.n_out if u.rows is None else len(u.rows.of(torch.arange(site.n_out))) for u in found]
    for u, n_out in zip(found, sizes, strict=True):
        floating = u.a.is_floating_point() and u.b.is_floating_point()
        if not floating or u.a.dim() != 2 or u.a.shape[1] != site.n_in or u.b.shape != (n_out, len(u.a)):
            raise ValueError(
                f"{where} has a {tuple(u.a.shape)} {u.a.dtype} and b {tuple(u.b.shape)} {u.b.dtype} at {site.name}; "
                f"expected numbers [r, {site.n_in}] and [{n_out}, r]; was it another model's?"
            )
    total = sum(len(u.a) for u in found)
    if total > ranks:
        raise ValueError(
            f"{where} has rank {total} at {site.name}, the bank room for {ranks}; make it with more max_rank"
        )
    if len(found) == 1 and found[0].rows is None:
        return found[0].a, found[0].b.T, found[0].scale
    shared = found[0].scale if len({u.scale for u in found}) == 1 else None
    bt = found[0].b.new_zeros(total, site.n_out, dtype=promoted(found[0].b.dtype))
    columns, start = torch.arange(site.n_out, device=bt.device), 0
    for u in found:
        own = columns if u.rows is None else u.rows.of(columns)
        bt[start : start + len(u.a), own] = u.b.T.to(bt.dtype) * (1.0 if shared is not None else u.scale)
        start += len(u.a)
    return torch.cat([u.a for u in found]), bt, 1.0 if shared is None else shared
