"""How long a training is: in epochs, in steps or in seconds, and when its phases begin."""

from __future__ import annotations

from torch import nn

from .checkpoint import Position, Settings
from .life import Entry, timeline

_UNKNOWN = 1000  # steps of a training in seconds, until some were timed: the rate begins low
_FIRST = 3  # steps before the first estimate
_RECENT = 32  # steps that the time of the next ones is judged by; their batches are of different lengths


class Plan:
    """total: optimizer steps.   entries: the phases, those of a training in seconds by the latest estimate of total."""

    def __init__(self, model: nn.Module, names: list[str], settings: Settings):
        self.model, self.names, self.seconds = model, names, settings.seconds
        whole = settings.epochs * -(-settings.batches // settings.accumulate)
        self.total = settings.steps or (whole if settings.seconds is None else _UNKNOWN)
        self.entries = timeline(model, names, self.total)

    def follow(self, at: Position) -> None:
        """Estimates the total anew. Phases that were entered stay so; one that should have been is next."""
        if self.seconds is None or not at.step:
            return
        left = max(0.0, self.seconds - at.spent)
        if left and at.step < _FIRST:
            return
        self.total = at.step + round(left / max(at.pace, 1e-9))
        entered = self.entries[: at.entered]
        known = set(map(_name, entered))
        coming = [e for e in timeline(self.model, self.names, self.total) if _name(e) not in known]
        self.entries = entered + coming

    def due(self, at: Position) -> list[Entry]:
        return [e for e in self.entries[at.entered :] if e.start <= at.step]

    def over(self, at: Position) -> bool:
        return at.step >= self.total

    def progress(self, at: Position) -> float:
        """From 0 to 1, never falling."""
        if self.seconds is None or self.over(at):
            return at.step / self.total
        return min(at.spent / self.seconds, 1.0)

    def ends(self, at: Position) -> int:
        """The step before which the phase under way is over."""
        return self.entries[at.entered].start if at.entered < len(self.entries) else self.total

    def last_start(self) -> int:
        """Where the last phase with steps begins."""
        return max((e.start for e in self.entries if e.phase.steps), default=0)


def _name(entry: Entry) -> tuple[str, int, str]:
    return entry.adapter, entry.part, entry.phase.name


def timed(at: Position, seconds: float) -> None:
    """A step took so long. The first one counts only until there is another: it warms up."""
    at.pace += (seconds - at.pace) / max(1, min(at.step - 1, _RECENT))
