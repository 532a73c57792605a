"""The one place that imports transformers (with hf_trainer.py): loads models and tokenizers, errors of one line."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .engine.store import read_config

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
        found = getattr(transformers, f"AutoModelFor{kind}")
        model = found.from_pretrained(source, config=config, ignore_mismatched_sizes=True)
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
        model, info = cls.from_pretrained(
            source, config=config, dtype=wide, output_loading_info=True, ignore_mismatched_sizes=True
        )
    return model, info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}


def skeleton(source: str) -> nn.Module:
    """The model that the config in a directory describes, on the meta device: shapes, no values."""
    transformers = need("transformers")
    with _loading(source, "a model"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        return transformers.AutoModel.from_config(config) if cls is None else cls(config)


def load_base(
    adapter: str | os.PathLike, source: str | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, set[str]]:
    """`load_model` for the model that a saved adapter belongs to; source None: the one that the adapter names."""
    like = read_config(Path(adapter))[0].get("model") or {}
    if source is None and not like.get("source"):
        raise ValueError(f"{adapter} does not say which model it belongs to; name it with --model")
    return load_model(source or like["source"], like, dtype)


def save_model(model: Any, directory: Path) -> None:
    """Writes weights, config and generation config, and the tokenizer where the model's source has one."""
    transformers, hub, source = need("transformers"), need("transformers.utils"), model.name_or_path
    with quiet():
        model.save_pretrained(directory)
    # Asked first, because AutoTokenizer makes an empty tokenizer up where there is no file.
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if any(hub.cached_file(source, name, **lenient) for name in TOKENIZER_FILES):
        with _loading(source, "the tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            pad = getattr(model.config, "pad_token_id", None)
            if tokenizer.pad_token is None and pad is not None:
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
            tokenizer.save_pretrained(directory)


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
