"""Calls to complete: which are asked for, and how right an answer is."""

from __future__ import annotations

import pytest

from experiments.faults.tiny import save_llama
from memorizing.benchmark.memory_use.completion import (
    count_names,
    draw_calls,
    is_exact,
    measure_similarity,
)
from memorizing.benchmark.memory_use.places import Source, encode_package
from memorizing.errors import ConfigError, CorpusError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A token for every byte."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_llama(tmp_path_factory.mktemp("models") / "llama"))


def make_python(tokenizer, name: str, num_calls: int):
    calls = "".join(f"    area({number})\n" for number in range(num_calls))
    texts = [
        ("home.py", "# first\n\ndef area(x):\n    return x\n"),
        ("use.py", f"from .home import area\n\ndef use():\n{calls}"),
    ]
    return encode_package(tokenizer, name, texts)


def test_a_call_is_asked_for_after_its_file_up_to_the_parenthesis(tokenizer):
    package = make_python(tokenizer, "some/package", 1)
    (place,) = draw_calls([package], 5, tokenizer, prompt_len=19, seed=0)
    assert tokenizer.decode(list(place.prompt)) == "\ndef use():\n    area("[-19:]
    assert tokenizer.decode(list(place.answer)) == "0)"
    assert place.left_out
    assert (place.package, place.document) == ("some/package", "use.py")
    # Tokens are bytes: the definition begins after nine of them.
    assert place.sources == (Source("home.py", 9),)


def test_calls_are_spread_over_packages_and_drawn_by_the_seed(tokenizer):
    packages = [make_python(tokenizer, name, 13) for name in ("one", "two", "three")]
    packages.insert(1, encode_package(tokenizer, "none", [("a.py", "x"), ("b.py", "y")]))
    places = draw_calls(packages, 8, tokenizer, prompt_len=19, seed=0)
    assert [place.package for place in places] == ["one"] * 3 + ["two"] * 3 + ["three"] * 2
    assert places == draw_calls(packages, 8, tokenizer, prompt_len=19, seed=0)
    assert places != draw_calls(packages, 8, tokenizer, prompt_len=19, seed=1)


def test_without_a_call_that_can_be_asked_for_it_is_said_what_is_needed(tokenizer):
    long = f"from .home import area\narea('{'x' * 64}')"
    for text in ("area(1)", long):
        texts = [("home.py", "def area(x): ..."), ("use.py", text)]
        package = encode_package(tokenizer, "p", texts)
        with pytest.raises(CorpusError, match="no call was found of what another file"):
            draw_calls([package], 1, tokenizer, prompt_len=19, seed=0)


@pytest.mark.parametrize(("places", "length"), [(0, 19), (1, 15)])
def test_too_little_is_refused(tokenizer, places, length):
    with pytest.raises(ConfigError, match=r"is (0|15); allowed: (1|16) or more"):
        draw_calls([], places, tokenizer, prompt_len=length, seed=0)


def test_white_space_makes_no_answer_wrong():
    assert is_exact("x,\n    y = 1)", "x, y=1)")
    assert not is_exact("x, y=2)", "x, y=1)")


@pytest.mark.parametrize(
    ("written", "answer", "expected"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("a b", "ab", 1.0),
        ("", "abc", 0.0),
        ("", "", 1.0),
        ("abc", "xyz", 0.0),
        ("größe)", "grösse)", 1 - 2 / 7),
    ],
)
def test_similarity_is_one_less_the_share_of_letters_to_change(written, answer, expected):
    assert measure_similarity(written, answer) == pytest.approx(expected)
    assert measure_similarity(answer, written) == pytest.approx(expected)


def test_names_are_counted_as_often_as_they_are_wanted():
    assert count_names("f(a, a, c) if x", "a, b, a2=lambda: a, True") == (2, 4)
    assert count_names("anything", "1, 'x' if None else 2") == (0, 1)
    assert count_names("", "1, 2)") == (0, 0)
