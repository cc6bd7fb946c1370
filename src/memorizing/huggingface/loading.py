"""A causal language model and its tokenizer, by folder or by name on the hub."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

# The hub's client comes with transformers, which is what this package depends on.
from transformers.utils.hub import (
    HfApi,  # pyright: ignore[reportPrivateImportUsage]
    RepositoryNotFoundError,  # pyright: ignore[reportPrivateImportUsage]
    cached_file,
)

from memorizing.errors import ConfigError, TokenizerError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TIMEOUT_S = 10.0
_WEIGHTS = ("*.safetensors", "*.bin")
_LARGEST = 2**31 - 1
"""What a whole number of a config may be: torch and tokenizers count with 32 bits in places."""
_MOST_PER_BYTE = 8
"""Weights that may stand in a byte of a file: none has less than a bit."""


def load_pretrained(
    name: str, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """Load a model and its tokenizer. What is on this machine is used first.

    Nothing is downloaded for a folder, or for a name that is in the hub's cache; code that comes
    with a model is not run.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the hub.
        dtype: of the weights; "auto" is as they were saved.
        device: where they go.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
        TokenizerError: it has no tokenizer, or one with more tokens than the model knows.
    """
    # So that models of ours are known by their type.
    import memorizing.huggingface.own_model.model  # noqa: F401

    model, tokenizer = _load_both(check_place(name), name, dtype)
    num_known = model.get_input_embeddings().weight.shape[0]
    num_tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if num_tokens > num_known:
        raise TokenizerError(
            f"the tokenizer of {name!r} has ids for {num_tokens:,} tokens, and the model knows "
            f"{num_known:,}; use the tokenizer that the model was trained with"
        )
    model = model.eval().to(device)
    with keep_quiet():
        _try_out(model, tokenizer, name)
    return model, tokenizer


def _try_out(model: Any, tokenizer: Any, name: str) -> None:
    """Encode a word and generate a token: much of what config files say is only looked at then.

    Raises:
        ConfigError, TokenizerError: it fails, whatever for.
    """
    try:
        tokenizer("text")
    except Exception as error:
        raise TokenizerError(explain_failure("tokenizer", name, error)) from error
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        # Sampling must leave the seed of the caller alone.
        with torch.random.fork_rng():
            model.generate(token, attention_mask=torch.ones_like(token), max_new_tokens=1)
    except Exception as error:
        raise ConfigError(explain_failure("model", name, error)) from error


def check_place(name: str) -> str:
    """The folder or hub name that is meant.

    Raises:
        ConfigError: a folder without a model or whose path is not UTF-8, or what is neither a
            folder nor a name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            # The libraries that open its files take text.
            raise ConfigError(
                f"the path {name!r} is not UTF-8, and a model cannot be loaded from there; rename "
                "the folder"
            ) from error
        if not (path / "config.json").is_file():
            inside = sorted(found.parent.name for found in path.glob("*/config.json"))
            hint = f"there is one in {inside[-1]!r}" if inside else "name one that has it"
            raise ConfigError(
                f"the folder {name!r} holds no model: it has no config.json, which save_pretrained "
                f"writes; {hint}"
            )
        return str(path)
    if path.exists():
        raise ConfigError(
            f"{name!r} is a file; a model is a folder with config.json, model.safetensors and "
            "tokenizer.json"
        )
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"there is no folder {name!r}, and it is no name on the hub (owner/model); check the "
            "path"
        )
    return name


def explain_failure(what: str, name: str, error: Exception) -> str:
    """One sentence: what was not found or could not be loaded, and why."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if Path(name).expanduser().is_dir():
        return (
            f"the {what} in {name!r} cannot be loaded ({type(error).__name__}: {reason}); use "
            "another copy of it"
        )
    return (
        f"the {what} {name!r} of the hub cannot be loaded ({type(error).__name__}: {reason}); "
        "check that it is a causal language model of transformers, or give a folder"
    )


def _load_both(place: str, name: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    if Path(place).is_dir():
        with keep_quiet():
            return _load(place, name, dtype)
    # By its folder in the cache: by its name, some files are looked for on the hub all the same.
    config = cached_file(
        place, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if config is not None:
        with contextlib.suppress(ConfigError, TokenizerError), keep_quiet():
            model, tokenizer = _load(str(Path(config).parent), name, dtype)
            model.config._name_or_path = name
            return model, tokenizer
    _ask_hub(place)
    return _load(place, name, dtype)


def _load(place: str, name: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    kind: Any = AutoModelForCausalLM
    if Path(place).is_dir():
        _check_size(Path(place), name)
    try:
        model, info = kind.from_pretrained(
            place, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # Whatever a damaged file leads transformers to.
        raise ConfigError(explain_failure("model", name, error)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would draw them at random, with a warning only.
        raise ConfigError(
            f"the weights of {name!r} are not all there: {len(missing):,} are missing, such as "
            f"{missing[0]!r}; use another copy of the model"
        )
    try:
        return model, AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        raise TokenizerError(explain_failure("tokenizer", name, error)) from error


def describe_shape(name: str) -> tuple[Any, int]:
    """The config of a causal language model, and how many weights it has. None is loaded.

    Args:
        name: a folder with a config.json, or a name on the hub, of which that file is downloaded.

    Raises:
        ConfigError: there is no such model, or its config is damaged or needs code of its own.
    """
    import memorizing.huggingface.own_model.model  # noqa: F401

    place = check_place(name)
    if not Path(place).is_dir():
        try:
            place = str(Path(str(cached_file(place, "config.json"))).parent)
        except Exception as error:  # Of the hub's client.
            raise ConfigError(explain_failure("config", name, error)) from error
    with _explain_damage(name):
        config = _load_config(Path(place), name)
        return config, _count_weights(config)


@contextlib.contextmanager
def _explain_damage(name: str) -> Iterator[None]:
    """Let whatever a damaged config leads transformers to be a `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(explain_failure("model", name, error)) from error


def _load_config(folder: Path, name: str) -> Any:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_numbers(values, name)
    if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"the model {name!r} comes with code of its own, which is not run; use a model of "
            "a family that transformers knows"
        )
    return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def _count_weights(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(weight.numel() for weight in model.parameters())


def _check_size(folder: Path, name: str) -> None:
    """Refuse a config that its weights cannot be of, before anything is allocated for it.

    Raises:
        ConfigError: one that is damaged, has numbers that no model has, needs code of its own, or
            describes a model of many more weights than there are.
    """
    with _explain_damage(name):
        config = _load_config(folder, name)
        num_bytes = sum(file.stat().st_size for kind in _WEIGHTS for file in folder.glob(kind))
        text = config.get_text_config()
        sizes = ("hidden_size", "vocab_size", "num_hidden_layers")
        width, *counts = (int(getattr(text, size, None) or 1) for size in sizes)
        num_weights = width * sum(counts)
        if num_bytes and num_weights <= _MOST_PER_BYTE * num_bytes:
            num_weights = _count_weights(config)
    if num_bytes and num_weights > _MOST_PER_BYTE * num_bytes:
        raise ConfigError(
            f"config.json of {name!r} describes a model of {num_weights:,} weights or more, and "
            f"its files have {num_bytes:,} bytes; use another copy of the model"
        )


def _check_numbers(values: Any, name: str, key: str = "") -> None:
    """Refuse whole numbers that are too large, at any depth."""
    if isinstance(values, dict):
        for inner, value in values.items():
            _check_numbers(value, name, f"{key}.{inner}" if key else str(inner))
    elif isinstance(values, list):
        for value in values:
            _check_numbers(value, name, key)
    elif isinstance(values, int) and abs(values) > _LARGEST:
        raise ConfigError(
            f"{key} is {values:,} in config.json of {name!r}; allowed: at most {_LARGEST:,}; use "
            "another copy of the model"
        )


def _ask_hub(name: str) -> None:
    """Find out at once, without the minute of retries of a download, whether the hub has a model.

    Raises:
        ConfigError: it has not, or cannot be reached.
    """
    try:
        HfApi().model_info(name, timeout=_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"there is no folder {name!r}, and the hub shows no model of this name; check the "
            "name, or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # The client's HTTP library has exceptions of its own.
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"there is no folder {name!r}, the hub's cache on this machine has no whole model of "
            f"this name, and the hub cannot be asked ({reason}); check name and network, or give "
            "a folder"
        ) from error


@contextlib.contextmanager
def keep_quiet() -> Iterator[None]:
    """Without the bars and hints of loading."""
    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()
