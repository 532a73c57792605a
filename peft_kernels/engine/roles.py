"""Where the roles of a method live in each model family, and how targets are resolved to sites.

A pattern is matched against the end of a module's path; `#` stands for a layer number. `path[i/n]` is the i-th of n
equal blocks of output rows of a fused linear. A family is one row, keyed by transformers' `config.model_type`.

A target is a role, a glob or an address (`Site.address`): `@path` is exactly one module, `role@path`
the same with its role, for a fused linear the rows of that role.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from .site import Site, base_modules, matches

# Every word that is a role and not a glob.
ROLES: tuple[str, ...] = (
    "q",
    "k",
    "v",
    "o",
    "up",
    "gate",
    "down",
    "attn",
    "ffn",
    "norm",
    "embed",
    "block",
    "head",
    "model",
)
ROLES += tuple(f"cross.{role}" for role in ("q", "k", "v", "o", "attn"))

_T5_FFN = "block.#.layer.#.DenseReluDense"

FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "bert": {
        "q": ("layer.#.attention.self.query", "layer.#.crossattention.self.query"),
        "k": ("layer.#.attention.self.key", "layer.#.crossattention.self.key"),
        "v": ("layer.#.attention.self.value", "layer.#.crossattention.self.value"),
        "o": ("layer.#.attention.output.dense", "layer.#.crossattention.output.dense"),
        "up": ("layer.#.intermediate.dense",),
        "down": ("layer.#.output.dense",),
        "attn": ("layer.#.attention", "layer.#.crossattention"),
        "norm": ("LayerNorm",),
        "embed": ("embeddings.word_embeddings",),
        "block": ("encoder.layer.#",),
        "head": ("classifier", "qa_outputs", "cls"),
        "cross.q": ("layer.#.crossattention.self.query",),
        "cross.k": ("layer.#.crossattention.self.key",),
        "cross.v": ("layer.#.crossattention.self.value",),
        "cross.o": ("layer.#.crossattention.output.dense",),
        "cross.attn": ("layer.#.crossattention",),
    },
    "gpt2": {
        "q": ("h.#.attn.c_attn[0/3]",),
        "k": ("h.#.attn.c_attn[1/3]",),
        "v": ("h.#.attn.c_attn[2/3]",),
        "o": ("h.#.attn.c_proj",),
        "up": ("h.#.mlp.c_fc",),
        "down": ("h.#.mlp.c_proj",),
        "attn": ("h.#.attn",),
        "ffn": ("h.#.mlp",),
        "norm": ("h.#.ln_1", "h.#.ln_2", "ln_f"),
        "embed": ("wte",),
        "block": ("h.#",),
        "head": ("lm_head", "score", "classifier", "qa_outputs"),
    },
    "llama": {
        "q": ("layers.#.self_attn.q_proj",),
        "k": ("layers.#.self_attn.k_proj",),
        "v": ("layers.#.self_attn.v_proj",),
        "o": ("layers.#.self_attn.o_proj",),
        "up": ("layers.#.mlp.up_proj",),
        "gate": ("layers.#.mlp.gate_proj",),
        "down": ("layers.#.mlp.down_proj",),
        "attn": ("layers.#.self_attn",),
        "ffn": ("layers.#.mlp",),
        "norm": ("layers.#.input_layernorm", "layers.#.post_attention_layernorm", "model.norm"),
        "embed": ("embed_tokens",),
        "block": ("layers.#",),
        "head": ("lm_head", "score", "qa_outputs"),
    },
    "t5": {
        "q": ("SelfAttention.q", "EncDecAttention.q"),
        "k": ("SelfAttention.k", "EncDecAttention.k"),
        "v": ("SelfAttention.v", "EncDecAttention.v"),
        "o": ("SelfAttention.o", "EncDecAttention.o"),
        "up": (f"{_T5_FFN}.wi", f"{_T5_FFN}.wi_1"),
        "gate": (f"{_T5_FFN}.wi_0",),
        "down": (f"{_T5_FFN}.wo",),
        "attn": ("SelfAttention", "EncDecAttention"),
        "ffn": (_T5_FFN,),
        "norm": ("layer_norm", "final_layer_norm"),
        "embed": ("shared",),
        "block": ("block.#",),
        "head": ("lm_head", "classification_head", "qa_outputs", "classifier"),
        "cross.q": ("EncDecAttention.q",),
        "cross.k": ("EncDecAttention.k",),
        "cross.v": ("EncDecAttention.v",),
        "cross.o": ("EncDecAttention.o",),
        "cross.attn": ("EncDecAttention",),
    },
}


def family(model: nn.Module) -> str | None:
    """The model's row in FAMILIES, or None."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind if kind in FAMILIES else None


def layer_of(path: str) -> int | None:
    """The layer a module belongs to: the first number in its path."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def resolve(
    model: nn.Module,
    targets: Sequence[str],
    *,
    exclude: Iterable[str] = (),
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Site]:
    """The sites that roles or globs pick, in model order. ValueError for a target that matches nothing."""
    if not targets:
        raise ValueError("targets is empty; expected roles or globs over module paths")
    modules = dict(base_modules(model))
    skips = [(test, part) for pattern in exclude for test, part, _ in _tests(model, pattern)]
    sites: dict[tuple[str, tuple[int, int] | None], Site] = {}
    for target in targets:
        found = 0
        for test, part, role in _tests(model, target):
            for path, module in modules.items():
                if test(path):
                    found += 1
                    rows = _rows(path, module, part)
                    if not any(skip(path) and _rows(path, module, p) in (None, rows) for skip, p in skips):
                        sites.setdefault((path, rows), Site(path, module, role or _role(model, path), rows, seed))
        if not found:
            raise ValueError(f"target {target!r} matches nothing in {type(model).__name__}; {_hint(model, modules)}")
    if not sites:
        raise ValueError(f"exclude leaves none of the targets {tuple(targets)}")
    order = {path: i for i, path in enumerate(modules)}
    chosen = sorted(sites.values(), key=lambda s: (order[s.name], s.rows or (0, 0)))
    return _in_layers(chosen, layers)


def _tests(model: nn.Module, target: str) -> list[tuple[Callable[[str], bool], tuple[int, int] | None, str]]:
    """(does a path match, (i, n) rows, role) of a role, glob or address."""
    if not isinstance(target, str) or not target:
        raise ValueError(f"target {target!r}; expected a role ({' '.join(ROLES)}) or a glob over module paths")
    role, at, path = target.partition("@")
    if at and not role:
        return [(path.__eq__, None, "")]
    if at and role in ROLES:
        return [(path.__eq__, part, role) for test, part, _ in _tests(model, role) if test(path)]
    if target == "model":
        return [(lambda path: path == "", None, "model")]
    if target == "*":  # everything but the task head, which is trained whole or not at all unless it is named
        heads = [
            test for pattern in FAMILIES.get(family(model) or "", {}).get("head", ()) for test, _ in [_pattern(pattern)]
        ]
        return [(lambda path: path != "" and not any(h(p) for p in _prefixes(path) for h in heads), None, "")]
    if target not in ROLES:
        return [(lambda path: path != "" and matches(path, target), None, "")]
    name = family(model)
    if name is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"role {target!r} is not known for {type(model).__name__}"
            f"{f' (model type {kind})' if kind else ''}; families in the table: {', '.join(FAMILIES)}. "
            "Give globs over module paths instead, such as '*.query'"
        )
    if target not in FAMILIES[name]:
        raise ValueError(f"role {target!r} does not exist in family {name}; it has {' '.join(FAMILIES[name])}")
    return [(*_pattern(pattern), target) for pattern in FAMILIES[name][target]]


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _pattern(pattern: str) -> tuple[Callable[[str], bool], tuple[int, int] | None]:
    path, _, rows = pattern.partition("[")
    expression = re.compile(r"(?:.*\.)?" + re.escape(path).replace(r"\#", r"\d+"))
    index, _, of = rows[:-1].partition("/")
    part = (int(index), int(of)) if rows else None
    return lambda candidate: expression.fullmatch(candidate) is not None, part


def _role(model: nn.Module, path: str) -> str:
    """The role of a whole module that was picked by a glob, so that patterns by role hold there too."""
    for role, patterns in FAMILIES.get(family(model) or "", {}).items():
        if any(part is None and test(path) for test, part in map(_pattern, patterns)):
            return role
    return ""


def _rows(path: str, module: nn.Module, part: tuple[int, int] | None) -> tuple[int, int] | None:
    if part is None:
        return None
    index, of = part
    size = Site(path, module).n_out // of
    return index * size, (index + 1) * size


def _in_layers(sites: list[Site], layers: Sequence[int] | None) -> list[Site]:
    if layers is None:
        return sites
    numbers = {n for s in sites if (n := layer_of(s.name)) is not None}
    depth = max(numbers, default=-1) + 1
    wanted = {n + depth if n < 0 else n for n in layers}
    if unknown := {n for n in layers if (n + depth if n < 0 else n) not in numbers}:
        raise ValueError(
            f"layers {sorted(unknown)} do not exist among the targets; they are in layers {sorted(numbers)}"
        )
    return [s for s in sites if layer_of(s.name) in wanted]


def _hint(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    name = family(model)
    if name:
        return f"family {name} has the roles {' '.join(FAMILIES[name])}; or give a glob over module paths"
    paths = [path for path in modules if path]
    return f"its modules are {', '.join(paths[:6])}{', ...' if len(paths) > 6 else ''}"
