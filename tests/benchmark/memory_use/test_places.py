"""Places that a model is asked about: where they are, and what is changed in them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memorizing.benchmark.memory_use.places import (
    MIN_START,
    Place,
    Source,
    draw_quotes,
    encode_package,
    rename_words,
)
from memorizing.errors import ConfigError, CorpusError
from tests.benchmark.memory_use.tools import make_package, spell
from tests.huggingface.sessions.tools import TOKENIZER

LENGTHS = {"prompt_len": 7, "answer_len": 5}


def test_a_prompt_stands_in_its_file_and_its_answer_comes_next():
    package = make_package(331, 263)
    places = draw_quotes(package, 11, seed=3, **LENGTHS)
    assert [place.document for place in places].count("a.txt") in (5, 6)
    assert len(places) == len(set(places)) == 11
    for place in places:
        (source,) = place.sources
        tokens = package.find(place.document).tokens
        assert source.document == place.document
        assert tokens[source.token - 7 : source.token] == place.prompt
        assert tokens[source.token : source.token + 5] == place.answer
        assert source.token - 7 >= MIN_START


def test_the_same_seed_draws_the_same_places_and_another_one_others():
    package = make_package(331, 263)
    first, again, other = (draw_quotes(package, 9, seed=seed, **LENGTHS) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_fewer_prompts_than_files_are_of_different_files():
    places = draw_quotes(make_package(263, 331, 229), 2, seed=0, **LENGTHS)
    assert len({place.document for place in places}) == 2


@pytest.mark.parametrize(("extra", "expected"), [(-1, None), (0, 1), (1, 2)])
def test_a_file_must_be_just_long_enough(extra, expected):
    package = make_package(MIN_START + 12 + extra, 31)
    if expected is None:
        with pytest.raises(CorpusError, match="need a file of 212 tokens, and the longest has 211"):
            draw_quotes(package, 99, seed=0, **LENGTHS)
    else:
        assert len(draw_quotes(package, 99, seed=0, **LENGTHS)) == expected


@pytest.mark.parametrize("wrong", ["prompt_len", "answer_len"])
def test_a_length_of_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"{wrong} is 0; allowed: 1 or more"):
        draw_quotes(make_package(263), 1, seed=0, **{**LENGTHS, wrong: 0})


def test_names_are_renamed_alike_wherever_they_stand_and_the_answer_stays():
    class Words:
        """A tokenizer of characters."""

        def decode(self, tokens):
            return "".join(map(chr, tokens))

        def __call__(self, text, **options):
            return {"input_ids": [ord(letter) for letter in text]}

    words = Words()
    prompt = tuple(map(ord, "def größe(x, größe_2): return größe + x1_ab * 333"))
    place = Place("p", "f.py", prompt, (1, 2), (Source("f.py", 50),))
    renamed = rename_words(place, words, seed=5)
    text = words.decode(renamed.prompt)
    keyword, name, other, rest, longer = (
        text[0:3], text[4:9], text[13:20], text[30:35], text[38:43]
    )  # fmt: skip
    assert text == f"{keyword} {name}(x, {other}): {text[23:29]} {rest} + {longer} * 333"
    assert name == rest != "größe"
    assert other != "größe_2"
    assert renamed == replace(place, prompt=renamed.prompt)
    assert rename_words(place, words, seed=5) == renamed
    assert rename_words(place, words, seed=6) != renamed


def test_a_text_of_nothing_is_no_place_but_is_read():
    package = encode_package(TOKENIZER, "p", [("empty", ""), ("one", spell([7]))])
    assert [document.tokens for document in package.documents] == [(), (7,)]
    assert package.num_tokens == 1
