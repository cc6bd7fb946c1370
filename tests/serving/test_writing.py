"""Text as its tokens come."""

from __future__ import annotations

from typing import Any

import pytest

from memorizing.serving.writing import TextOfTokens

TEXT = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE} stop here; stops\n"


@pytest.fixture(scope="module")
def tokenizer(model_folder) -> Any:
    """A token is a byte."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


def tell(tokenizer: Any, ids: list[int], *stops: str) -> tuple[list[str], bool]:
    told: list[str] = []
    text = TextOfTokens(tokenizer, stops, told.append)
    for token in ids:
        text.add(token)
        if text.is_stopped:
            break
    text.end()
    return told, text.is_stopped


def test_pieces_are_whole_characters_and_come_as_soon_as_they_can(tokenizer):
    told, is_stopped = tell(tokenizer, tokenizer(TEXT)["input_ids"])
    assert told == list(TEXT)
    assert not is_stopped


def test_bytes_that_are_no_character_are_told_at_the_end(tokenizer):
    ids = tokenizer("a\N{GRINNING FACE}")["input_ids"][:-1]
    told, _ = tell(tokenizer, ids)
    assert told == ["a", tokenizer.decode(ids)[1:]]
    assert told[1].startswith("\N{REPLACEMENT CHARACTER}")


def test_special_tokens_are_no_text(tokenizer):
    ids = tokenizer("ab")["input_ids"]
    end = tokenizer.eos_token_id
    assert "".join(tell(tokenizer, [ids[0], end, ids[1], end])[0]) == "ab"
    assert tell(tokenizer, [end])[0] == []
    assert tell(tokenizer, []) == ([], False)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("stop",), TEXT[: TEXT.index("stop")]),
        (("stop here", "here"), TEXT[: TEXT.index("stop")]),
        (("stops",), TEXT[: TEXT.index("stops")]),
        (("here", "op h"), TEXT[: TEXT.index("op h")]),
        (("\n",), TEXT[:-1]),
        (("c",), ""),
    ],
)
def test_text_ends_before_the_first_string_to_stop_at(tokenizer, stops, expected):
    told, is_stopped = tell(tokenizer, tokenizer(TEXT)["input_ids"], *stops)
    assert "".join(told) == expected
    assert is_stopped


def test_what_only_begins_like_a_stop_is_told_in_the_end(tokenizer):
    told, is_stopped = tell(tokenizer, tokenizer(TEXT)["input_ids"], "stops\n\n", "never")
    assert "".join(told) == TEXT
    assert not is_stopped


def test_a_stop_inside_the_last_piece_is_found(tokenizer):
    # Bytes that are no character are one piece, which comes at the end.
    ids = tokenizer("a\N{GRINNING FACE}")["input_ids"][:-1]
    told, is_stopped = tell(tokenizer, ids, "\N{REPLACEMENT CHARACTER}")
    assert (told, is_stopped) == (["a"], True)


@pytest.mark.parametrize("pieces", [True, False])
def test_words_that_begin_with_a_space_keep_it(pieces):
    """Where a tokenizer leaves out the first space of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"\N{LOWER ONE EIGHTH BLOCK}one": 0, "\N{LOWER ONE EIGHTH BLOCK}two": 1, "s": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="s"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [0, 1, 2, 1] if pieces else [1]
    assert "".join(tell(tokenizer, ids)[0]) == tokenizer.decode(ids)
