"""combine: a new adapter made of attached ones, and how far its change of the weights is from the one wanted."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attach import Adapter, all_adapters, attach_parts, detach, names_of, set_active, state_of
from .factor import truncated_svd
from .method import Method, Part, Tuner
from .site import Rows, Site, base_parameters, base_values
from .stack import Parts

_HOWS = ("cat", "sum", "average", "ties", "dare", "svd")
_DENSITY = {"ties": 0.2, "dare": 0.5}


@dataclass(frozen=True)
class CombineReport:
    """What a combination did.

    name, how: the new adapter and the way it was made.   exact: no site is further off than rounding.
    error: |achieved - wanted| / |wanted| of the change of the weights (Frobenius norms), the largest over the sites.
    site: where that is: the module's path, role@path for rows of a fused linear.   errors: the same for every site.
    """

    name: str
    how: str
    exact: bool
    error: float
    site: str
    errors: dict[str, float]

    def __str__(self) -> str:
        what = "exact up to rounding" if self.exact else "approximate"
        return (
            f"combined into {self.name!r} by {self.how}, {what}: relative error of the change of the weights at most "
            f"{self.error:.3g} over {len(self.errors)} sites, at {self.site or 'the model'}"
        )


@dataclass(frozen=True)
class _Share:
    """What one of the adapters has at a site."""

    number: int  # of the adapter among the names
    name: str
    weight: float
    site: Site
    tuner: Tuner


def combine(
    model: nn.Module,
    names: Sequence[str] | str,
    how: str = "cat",
    *,
    name: str = "combined",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> CombineReport:
    """Makes a new adapter `name` out of attached ones. It is left inactive: pk.set_active(model, name) switches to it.

    Wanted is the sum of the adapters' changes of the weights times `weights` (default 1 each), for "average" divided
    by the sum of the weights (none negative); the report says how far the new adapter is from it, for every `how`. An
    adapter that has nothing at a site changes nothing there.
    cat: low-rank factors side by side, rank the sum of the ranks. Exact.
    svd: the best low-rank approximation, of `rank` at most (default the largest of the ranks at each site).
    sum, average: number by number. Exact for methods whose change is linear in their numbers (BitFit, IA3, a trained
        head, full tuning); for LoRA, whose factors must have equal ranks, the product brings cross terms.
    ties: in each tensor, all but the `density` (default 0.2) largest numbers become 0, the sign of the weighted sum is
        elected, and the weighted numbers of that sign are averaged. Yadav et al. 2023, arXiv:2306.01708.
    dare: each number is kept with probability `density` (default 0.5), by `seed`, and divided by it. Yu et al. 2023,
        arXiv:2311.03099.
    sum, average, ties and dare act on the distances of the numbers from those of a new adapter; on LoRA's factors with
    scale and weight shared evenly by A and B, or for "average" on their means. Heads and the like beside LoRA are
    summed under cat and svd.

    ValueError for an unknown name or value, sites that adapters tune by different methods, and methods that cannot be
    combined so; RuntimeError while merged. The model is untouched then.
    """
    state = state_of(model)
    chosen = (names,) if isinstance(names, str) else tuple(names)
    if not chosen:
        raise ValueError("names is empty; expected the names of attached adapters")
    for n in chosen:
        names_of(model, n)
    if how not in _HOWS:
        raise ValueError(f"how = {how!r}; expected one of {', '.join(_HOWS)}")
    factors = _checked_weights(weights, len(chosen), how)
    if density is not None and (how not in _DENSITY or not 0 < density <= 1):
        raise ValueError(f"density = {density!r} with how={how!r}; expected a share in (0, 1], with ties or dare")
    if rank is not None and (how != "svd" or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank = {rank!r} with how={how!r}; expected a positive int, with svd")
    if state.merged:
        raise RuntimeError(f"{', '.join(state.merged)} is merged; pk.unmerge(model) before combining adapters")
    shares = _gather(model, chosen, factors)
    parts = _parts(shares, how, rank)
    mix = _Mix(how, _DENSITY.get(how, 1.0) if density is None else density, seed)

    active = list(state.active)
    attach_parts(model, name, Adapter(parts, seed))
    try:
        off = {_label(site): _fill(tuner, shares[_key(site)], mix) for site, tuner in _sites(model, name)}
    except BaseException:
        detach(model, name)
        raise
    set_active(model, active)
    errors = {label: error for label, (error, _) in off.items()}
    worst = max(errors, key=lambda where: errors[where])
    return CombineReport(name, how, all(exact for _, exact in off.values()), errors[worst], worst, errors)


def _checked_weights(weights: Sequence[float] | None, n: int, how: str) -> list[float]:
    values = [1.0] * n if weights is None else list(weights)
    if len(values) != n or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in values):
        raise ValueError(f"weights = {weights!r}; expected {n} finite numbers, one for each name")
    if how != "average":
        return values
    if min(values) < 0 or not sum(values):
        raise ValueError(f"weights = {weights!r}; an average needs weights of at least 0, not all 0; use how='sum'")
    return [w / sum(values) for w in values]


# -- which sites, which methods ---------------------------------------------------------------------------------------


_Key = tuple[str, Rows | None]


def _key(site: Site) -> _Key:
    return site.name, site.rows


def _label(site: Site) -> str:
    return site.name if site.rows is None else site.address


def _sites(model: nn.Module, name: str) -> Iterator[tuple[Site, Tuner]]:
    """(site, tuner) of one adapter; every block of rows of a fused linear by itself."""
    for _, adapters in all_adapters(model):
        tuner = adapters.tuners.get(name)
        if isinstance(tuner, Parts):
            yield from ((site, member) for site, _, member in tuner.parts())
        elif tuner is not None:
            yield adapters.site, tuner


def _gather(model: nn.Module, names: tuple[str, ...], weights: list[float]) -> dict[_Key, list[_Share]]:
    """What the adapters have at each site; ValueError where that cannot be combined."""
    shares: dict[_Key, list[_Share]] = {}
    for number, (name, weight) in enumerate(zip(names, weights, strict=True)):
        for site, tuner in _sites(model, name):
            _check(name, site, tuner)
            shares.setdefault(_key(site), []).append(_Share(number, name, weight, site, tuner))
    blocks: dict[str, _Share] = {}  # by module: all whole, or all by rows
    for first, *others in shares.values():
        for other in others:
            if type(first.tuner) is not type(other.tuner) or (
                first.tuner.additive and first.tuner.cfg != other.tuner.cfg
            ):
                raise ValueError(
                    f"{first.site}: {first.name!r} has {first.tuner.cfg} there and {other.name!r} {other.tuner.cfg}; "
                    "combine adapters of one method"
                )
        before = blocks.setdefault(first.site.name, first)
        if (before.site.rows is None) != (first.site.rows is None):
            raise ValueError(
                f"{first.site.name} is tuned whole by one of {before.name!r}, {first.name!r} and by rows by the other; "
                "combine adapters with the same targets"
            )
    return shares


def _check(name: str, site: Site, tuner: Tuner) -> None:
    kind, low_rank = type(tuner).__name__, tuner.factors() is not None
    if not (low_rank or tuner.mergeable):
        raise ValueError(
            f"{site}: {kind} of {name!r} has no weight-space form, so its combinations have no known error"
        )
    if not (low_rank or tuner.additive):
        raise ValueError(
            f"{site}: {kind} of {name!r} supports no how: its change is neither low-rank nor linear in its numbers; "
            "stack the adapters with pk.set_active instead"
        )
    read = {} if low_rank else dict(base_parameters(site.module))
    if not low_rank and site.kind != "module" and "weight" not in read:
        raise ValueError(f"{site}: its weight is parametrized; remove the parametrization first")
    if any(t.device.type == "meta" for t in (*tuner.parameters(), *read.values())):
        raise RuntimeError(f"{site}: its weights are on the meta device or offloaded; load them before combining")
    if not all(torch.isfinite(t).all() for t in tuner.parameters()):
        raise ValueError(f"{site}: {name!r} has numbers that are not finite, which cannot be combined")


def _parts(shares: dict[_Key, list[_Share]], how: str, rank: int | None) -> list[Part]:
    """The methods of the new adapter with the addresses of their sites."""
    ranks: dict[type[Method], dict[str, int]] = {}
    first: dict[type[Method], Method] = {}
    groups: list[tuple[Method, list[Site]]] = []
    for members in shares.values():
        cfg, site = members[0].tuner.cfg, members[0].site
        if members[0].tuner.factors() is not None:
            first.setdefault(type(cfg), cfg)
            ranks.setdefault(type(cfg), {})[site.address] = _rank(members, how, rank)
            continue
        for method, sites in groups:  # what a method selects may depend on the other sites
            if method == cfg and len(cfg.select([*sites, site])) > len(sites):
                sites.append(site)
                break
        else:
            groups.append((cfg, [site]))
    if how in ("cat", "svd") and not ranks:
        supported = ", ".join(h for h in _HOWS if h not in ("cat", "svd"))
        raise ValueError(f"how = {how!r} needs a low-rank method such as lora; {groups[0][0].key} supports {supported}")
    low = [Part(first[kind].with_ranks(found), tuple(found)) for kind, found in ranks.items()]
    return [*low, *(Part(cfg, tuple(site.address for site in sites)) for cfg, sites in groups)]


def _rank(members: list[_Share], how: str, rank: int | None) -> int:
    """The rank of the new adapter at a site."""
    site, ranks = members[0].site, [len(_factors(m.tuner)[0]) for m in members]
    limit = min(site.n_out, site.n_in)
    if how == "svd":
        return min(max(ranks) if rank is None else rank, sum(ranks), limit)
    if how == "cat":
        if sum(ranks) > limit:
            raise ValueError(
                f"{site}: the ranks {ranks} add up to more than a {site.n_out} x {site.n_in} layer takes; use how='svd'"
            )
        return sum(ranks)
    if len(set(ranks)) > 1:
        raise ValueError(f"{site}: the ranks {ranks} differ, so how={how!r} cannot go by number; use 'cat' or 'svd'")
    return ranks[0]


# -- the numbers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mix:
    """Weighted tensors, one per adapter, into one."""

    how: str
    density: float
    seed: int

    def __call__(self, tensors: dict[int, Tensor], where: str) -> Tensor:
        if self.how == "ties":
            values = torch.stack([self._trimmed(t) for t in tensors.values()])
            agreeing = values * (values.sign() == values.sum(0).sign())
            return agreeing.sum(0) / agreeing.count_nonzero(dim=0).clamp(min=1)
        if self.how == "dare":
            tensors = {number: t * self._kept(t, f"{self.seed}/{where}/{number}") for number, t in tensors.items()}
        return torch.stack([*tensors.values()]).sum(0)

    def _trimmed(self, t: Tensor) -> Tensor:
        keep = max(round(self.density * t.numel()), 1)
        return t * (t.abs() >= t.abs().flatten().topk(keep).values[-1])

    def _kept(self, t: Tensor, place: str) -> Tensor:
        """0 or 1 / density; drawn on the CPU, so that it does not depend on the device."""
        generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
        return (torch.rand(t.shape, generator=generator) < self.density).to(t) / self.density


@torch.no_grad()
def _fill(tuner: Tuner, shares: list[_Share], mix: _Mix) -> tuple[float, bool]:
    """Gives the new tuner its numbers; (relative error, whether it is rounding alone)."""
    by = _fill_low_rank if tuner.factors() is not None else _fill_additive
    off, wanted, size = by(tuner, shares, mix)
    eps = torch.finfo(next(tuner.parameters()).dtype).eps
    rounding = (4 * eps + 1e-12) * size  # of what is stored, and of what was computed in float64
    if wanted <= rounding:  # changes that cancel
        return (0.0, True) if off <= rounding else (math.inf, False)
    return off / wanted, off <= rounding


def _fill_low_rank(tuner: Tuner, shares: list[_Share], mix: _Mix) -> tuple[float, float, float]:
    """(distance from the wanted change, its norm, norm of what rounding acts on); no out x in matrix is made."""
    lefts, rights = {}, {}
    for share in shares:
        a, b = _factors(share.tuner)
        root = math.sqrt(abs(share.weight))
        rights[share.number], lefts[share.number] = a * root, b * math.copysign(root, share.weight)
    all_a, all_b = torch.cat([*rights.values()]), torch.cat([*lefts.values()], dim=1)
    if mix.how == "cat":
        tuner.set_factors(all_a, all_b)
    elif mix.how == "svd":
        tuner.set_factors(*_truncated(all_a, all_b, len(_factors(tuner)[0])))
    else:
        if mix.how == "average":  # the mean of each factor, so that adapters which agree keep what they agree on
            present = sum(share.weight for share in shares) or 1.0
            for share in shares:
                again = math.sqrt(share.weight / present)
                rights[share.number], lefts[share.number] = rights[share.number] * again, lefts[share.number] * again
        where = shares[0].site.address
        tuner.set_factors(mix(rights, f"{where}/a"), mix(lefts, f"{where}/b"))
    a, b = _factors(tuner)
    off = _norm(torch.cat([all_a, a]), torch.cat([all_b, -b], dim=1))
    return off, _norm(all_a, all_b), (all_a.norm() * all_b.norm() + a.norm() * b.norm()).item()


def _fill_additive(tuner: Tuner, shares: list[_Share], mix: _Mix) -> tuple[float, float, float]:
    """The same from the folded weights."""
    site = shares[0].site
    values = base_values(site.module)
    params = {key: values[key].double() for key, _ in base_parameters(site.module) if key in values}
    wanted: dict[str, Tensor] = {}
    for share in shares:
        for key, change in _change(share.tuner, site, params).items():
            wanted[key] = wanted.get(key, 0) + share.weight * change
    for key, start in _numbers(tuner).items():
        distances = {s.number: s.weight * (_numbers(s.tuner)[key].double() - start.double()) for s in shares}
        start.copy_(start.double() + mix(distances, f"{site.address}/{key}"))
    off = {key: change - wanted[key] for key, change in _change(tuner, site, params).items()}
    moved = {key: p for key, p in params.items() if key in wanted and wanted[key].any()}
    return _length(off), _length(wanted), _length(moved) + _length(wanted)


def _change(tuner: Tuner, site: Site, params: dict[str, Tensor]) -> dict[str, Tensor]:
    base = params if site.rows is None else site.written(*site.read(params))
    return {key: new.double() - base.get(key, 0) for key, new in tuner.folded(site, params).items()}


def _numbers(tuner: Tuner) -> dict[str, Tensor]:
    """Parameters and floating buffers (a head's running statistics); tied ones once."""
    return {key: t for key, t in (*tuner.named_parameters(), *tuner.named_buffers()) if t.is_floating_point()}


def _factors(tuner: Tuner) -> tuple[Tensor, Tensor]:
    factors = tuner.factors()
    assert factors is not None
    return factors


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of b @ a of that rank, from the SVD of the small core between two QRs."""
    (left, core_b), (right, core_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    low_a, low_b, _ = truncated_svd(core_b @ core_a.T, rank)
    return low_a @ right.T, left @ low_b


def _norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of b @ a, which is that of the core between two QRs."""
    return (torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T).norm().item()


def _length(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors.values()))
