"""Parameters that all tuners of a method have in common, such as one vector or rule for the whole model."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.method import Method, Tuner
from ..engine.site import Site


class SharedTuner(Tuner):
    """A tuner that reads what is shared as attributes of `lender`, the first tuner of its method.

    Each makes the shared parameters for itself; `share` then leaves them to the lender, which alone saves and counts
    them. Elsewhere than on the lender's device their user moves them.
    """

    lender: SharedTuner

    def __init__(self, cfg: Method, site: Site):
        super().__init__(cfg, site)
        vars(self)["lender"] = self  # past nn.Module, which would register it as a submodule


def share(tuners: Sequence[SharedTuner], *names: str) -> None:
    """The parameters `names` of the first tuner become those of all; for `Method.attached`."""
    for tuner in tuners[1:]:
        for name in names:
            delattr(tuner, name)
        vars(tuner)["lender"] = tuners[0]
