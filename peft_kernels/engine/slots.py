"""Which adapter is in which slot of a bank, and which slots running routes use: what its threads agree on."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Slots:
    """`size` names and one slot more, so that a full bank can still swap an adapter for its next version.

    A slot is free, being filled, held by a name, or outlived: its name is gone or has moved on, and routes that began
    before still use it. Nobody writes into a slot that is held or outlived.
    """

    def __init__(self, size: int):
        self.size = size
        self.held: dict[str, int] = {}  # name -> slot
        self.outlived: dict[int, str] = {}  # slot -> the name it had
        self.running = 0  # routes
        self._free = deque(range(size + 1))  # the one that was given back first is taken first
        self._users = [0] * (size + 1)  # routes of each slot
        self._filling: Counter[str] = Counter()
        self._changed = threading.Condition()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the names, and nothing runs in it."""
        with self._changed:
            return {"size": self.size, "held": dict(self.held)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
        self.held = state["held"]
        self._free = deque(slot for slot in self._free if slot not in self.held.values())

    @contextmanager
    def leased(self, names: Iterable[Any]) -> Iterator[dict[str, int]]:
        """Within the `with`, the slots of those of `names` that are here keep what they hold: name -> slot."""
        with self._changed:
            taken = {name: self.held[name] for name in names if name in self.held}
            self.running += 1
            for slot in taken.values():
                self._users[slot] += 1
        try:
            yield taken
        finally:
            with self._changed:
                self.running -= 1
                for slot in taken.values():
                    self._users[slot] -= 1
                    if not self._users[slot] and self.outlived.pop(slot, None) is not None:
                        self._free.append(slot)
                self._changed.notify_all()

    def state(self) -> dict[str, tuple[int, int]]:
        """name -> (its slot, how many running routes use that)."""
        with self._changed:
            return {name: (slot, self._users[slot]) for name, slot in self.held.items()}

    def room(self) -> int:
        """How many new names there is a slot for now."""
        with self._changed:
            return max(0, min(self.size - len(self._names()), len(self._free)))

    @contextmanager
    def filling(self, name: str, wait: float) -> Iterator[int]:
        """A slot to write into; at the end of the `with` it is the name's. An exception gives it back.

        wait: so many seconds for a slot to become free; RuntimeError says what holds them all.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._fits(name) and self._free, wait):
                raise RuntimeError(self._full(name))
            slot = self._free.popleft()
            self._filling[name] += 1
        done = False
        try:
            yield slot
            done = True
        finally:
            with self._changed:
                self._filling[name] -= 1
                if done:
                    old, self.held[name] = self.held.get(name), slot
                    self._leave(name, old)
                else:
                    self._free.appendleft(slot)
                self._changed.notify_all()

    def evict(self, name: str) -> None:
        """Takes a name out; KeyError if it is not here."""
        with self._changed:
            if name not in self.held:
                raise KeyError(name)
            self._leave(name, self.held.pop(name))
            self._changed.notify_all()

    def _leave(self, name: str, slot: int | None) -> None:
        if slot is None:
            return
        if self._users[slot]:
            self.outlived[slot] = name
        else:
            self._free.append(slot)

    def _names(self) -> set[str]:
        return {*self.held, *(+self._filling)}

    def _fits(self, name: str) -> bool:
        return name in self._names() or len(self._names()) < self.size

    def _full(self, name: str) -> str:
        if not self._fits(name):
            names = ", ".join(sorted(self._names()))
            return f"no room for {name!r}: the bank's {self.size} slots hold {names}; evict one, or make more slots"
        used = ", ".join(sorted({f"{old} in {self._users[slot]}" for slot, old in self.outlived.items()}))
        return (
            f"no slot for {name!r} yet: running routes use adapters that were swapped or evicted ({used or 'none'}), "
            f"and {sum(self._filling.values())} are being loaded; wait=seconds waits for them"
        )
