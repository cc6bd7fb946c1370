"""Tokens by what they are part of, and by how often they were there before."""

import numpy as np

from memorizing.analysis.token_classes import classify_tokens, count_earlier, name_times


def classify(pieces: list[str], defined=()) -> list[str]:
    return classify_tokens("".join(pieces), np.cumsum([len(p) for p in pieces]), defined)


def test_a_token_has_the_class_of_the_word_it_begins_in():
    pieces = [
        "the",
        " the the",
        " the",
        " so",
        "me_",
        "name",
        " (",
        "42",
        " ",
        "\n",
        "Ada",
        "",
        ".",
    ]
    assert classify(pieces) == [
        "common words",
        "common words",
        "common words",
        "identifiers",
        "identifiers",
        "identifiers",
        "signs",
        "numbers",
        "blanks",
        "blanks",
        "names",
        "signs",
        "signs",
    ]


def test_identifiers_are_defined_called_or_written_like_one():
    assert classify(["grow", " ", "call", "(", "x", ") ", "camelCase", " v2"], {"grow"}) == [
        "identifiers", "blanks", "identifiers", "signs", "rare words", "signs", "identifiers",
        "identifiers",
    ]  # fmt: skip


def test_a_capital_that_is_also_written_small_is_no_name():
    assert classify(["The", " ", "the", " ", "Zoo"]) == [
        "rare words", "blanks", "rare words", "blanks", "names",
    ]  # fmt: skip


def test_earlier_occurrences_are_counted():
    tokens = np.array([5, 7, 5, 5, 2, 7])
    assert count_earlier(tokens).tolist() == [0, 0, 1, 2, 0, 1]
    assert count_earlier(tokens[:0]).tolist() == []
    counts = np.array([0, 1, 2, 3, 4, 15, 16, 63, 64, 999])
    assert name_times(counts) == [
        "never", "once", "2 to 3", "2 to 3", "4 to 7", "8 to 15", "16 to 63", "16 to 63",
        "64 or more", "64 or more",
    ]  # fmt: skip
