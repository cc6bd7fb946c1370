"""Tokenizers of `transformers`: text is text, and which of them are one."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from memorizing.huggingface.sessions.texts import (
    encode_chat,
    encode_text,
    encode_with_offsets,
    hash_tokenizer,
    is_same_tokenizer,
    wrap_tokenizer,
)

CHARACTERS = {chr(code): 3 + code - 32 for code in range(32, 127)}
TEXT = "a</s>b <s> <pad>"


def make(first: int = 3) -> Any:
    """Every character is a token."""
    words = {character: number + first - 3 for character, number in CHARACTERS.items()}
    backend = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    backend.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.mark.parametrize("text", [TEXT, "<s>", "no special token"])
def test_what_is_spelled_like_a_special_token_is_text(text: str):
    tokenizer, expected = make(), [CHARACTERS[character] for character in text]
    assert encode_text(tokenizer, text).tolist() == expected
    assert encode_text(tokenizer, text, is_whole=True).tolist() == [1, *expected]
    tokens, offsets = encode_with_offsets(tokenizer, text)
    assert tokens.tolist() == [1, *expected]
    assert offsets is not None
    assert offsets[1:].tolist() == [[n, n + 1] for n in range(len(text))]
    own = wrap_tokenizer(tokenizer)
    assert own is not None
    assert np.array_equal(own.encode(text), expected)


@pytest.mark.parametrize("text", [TEXT, "why?"])
def test_what_is_said_cannot_end_its_turn(text: str):
    tokenizer = make()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    said = [{"role": role, "content": role + text} for role in ("user", "assistant", "user")]
    expected = [
        token
        for one in said
        for token in (1, *(CHARACTERS[character] for character in one["content"]), 2)
    ]
    assert encode_chat(tokenizer, said).tolist() == expected


def test_what_a_template_leaves_out_or_says_twice_is_so():
    tokenizer = make()
    tokenizer.chat_template = "{{ messages[1]['content'] }}</s>{{ messages[1]['content'] }}"
    said = [{"role": "user", "content": text} for text in ("<s>", "a</s>")]
    text = [CHARACTERS[character] for character in "a</s>"]
    assert encode_chat(tokenizer, said).tolist() == [*text, 2, *text]


def test_padding_and_truncation_do_not_make_another_tokenizer():
    tokenizer, fresh = make(), make()
    expected = hash_tokenizer(fresh)
    for options in ({"padding": True}, {"padding": "max_length", "max_length": 7}):
        tokenizer(["a", "bcd"], **options)
        assert hash_tokenizer(tokenizer) == expected
    tokenizer(["a", "bcd"], truncation=True, max_length=2)
    assert hash_tokenizer(tokenizer) == expected
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    assert hash_tokenizer(tokenizer) == expected
    for other in (make(first=4), make()):
        other.add_tokens(["word"])
        assert hash_tokenizer(other) != expected


@pytest.mark.parametrize("before", [{}, {"padding": True}, {"truncation": True, "max_length": 5}])
@pytest.mark.parametrize("after", [{}, {"padding": True}])
def test_hashes_of_the_first_format_are_known_as_far_as_can_be_told(before: Any, after: Any):
    tokenizer = make()
    tokenizer(["a", "bcd"], **before)
    stored = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:32]
    # A state of truncation is anyone's: it is known only as long as the tokenizer has it.
    tokenizer = copy.deepcopy(tokenizer) if "truncation" in before else make()
    if "truncation" not in before:
        tokenizer(["a", "bcd"], **after)
    assert is_same_tokenizer(stored, tokenizer)
    other = make(first=4)
    other(["a", "bcd"], **after)
    assert not is_same_tokenizer(stored, other)
