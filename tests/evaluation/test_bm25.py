"""Texts that have the words of another one."""

import math
import sys

import numpy as np
import pytest

from memorizing.errors import IndexUnavailableError
from memorizing.evaluation.bm25 import WordScorer, choose_apart

pytest.importorskip("bm25s")

TEXTS = ["lemma add_comm : a + b", "lemma mul_comm : a * b, a * c", "", "theorem 17"]


def test_scores_are_those_of_the_formula():
    scores = WordScorer(TEXTS).score("mul_comm 17 lemma")
    lengths = [6, 10, 0, 2]
    mean = sum(lengths) / len(lengths)

    def weigh(num_texts_with: int, length: int) -> float:
        idf = math.log(1 + (len(TEXTS) - num_texts_with + 0.5) / (num_texts_with + 0.5))
        return idf / (1 + 1.5 * (0.25 + 0.75 * length / mean))

    wanted = [weigh(2, 6), weigh(2, 10) + weigh(1, 10), -np.inf, weigh(1, 2)]
    assert scores == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("query", ["", " \n\t", "nowhere", "näht 漢字 \ufffd"])
def test_a_query_without_a_known_word_finds_nothing(query):
    assert (WordScorer(TEXTS).score(query) == -np.inf).all()


@pytest.mark.parametrize("texts", [[], [""], ["", "  "]])
def test_texts_without_words_are_not_found(texts):
    assert WordScorer(texts).score("lemma").tolist() == [-np.inf] * len(texts)


def test_words_of_any_script_are_words():
    scores = WordScorer(["größe 漢字", "größer", "x_1 = 漢字漢字"]).score("größe")
    assert scores.argmax() == 0
    assert np.isfinite(scores).sum() == 1


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(IndexUnavailableError, match=r'pip install "memorizing\[bm25\]"'):
        WordScorer(TEXTS)


def test_passages_are_chosen_best_first_and_none_overlap():
    spans = [("a", 0, 8), ("a", 4, 12), ("b", 4, 12), ("a", 8, 16), ("b", 12, 20)]
    scores = np.array([2.0, 3.0, 3.0, 1.0, -np.inf])
    # Of equal ones the first; what only touches another one does not overlap it.
    assert choose_apart(scores, spans, 4) == [1, 2]
    assert choose_apart(scores, spans, 1) == [1]
    assert choose_apart(np.array([2.0, 1.0, 0.0, 1.5, 0.5]), spans, 9) == [0, 3, 4, 2]
    assert choose_apart(np.zeros(0), [], 3) == []
