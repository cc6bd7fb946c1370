"""The tokens where memory helped most are those, and are spread out."""

import math

import numpy as np
import pytest

from memorizing.analysis import find_helped_tokens
from memorizing.errors import ConfigError


@pytest.fixture
def find(tokenizer, make_document, make_result):
    """Choose among documents `a`, `b`, ... of words with these gains."""

    def find(*documents: tuple[str, list[float]], **settings) -> list[tuple[int, int]]:
        texts = [make_document("abcdefg"[i], words) for i, (words, _) in enumerate(documents)]
        baseline = make_result(*([5.0] * len(gains) for _, gains in documents))
        result = make_result(*(5.0 - np.array(gains) for _, gains in documents))
        settings = {"neighborhood": 1, "max_per_document": 9} | settings
        helped = find_helped_tokens(result, baseline, texts, tokenizer, **settings)
        return [(token.document, token.position) for token in helped]

    return find


def test_the_largest_gains_come_first_from_all_documents(find):
    first, second = ("ant bee cow", [1.0, 4.0, 0.5]), ("dog elk", [3.0, 2.0])
    assert find(first, second, num_tokens=3) == [(0, 1), (1, 0), (1, 1)]


def test_tokens_that_memory_harmed_are_never_shown(find):
    assert find(("ant bee cow", [-1.0, 0.0, 0.5])) == [(0, 2)]


def test_neighbors_of_a_chosen_token_are_left_out(find):
    document = ("ant bee cow dog elk", [1.0, 5.0, 4.0, 3.0, 2.0])
    assert find(document, neighborhood=2) == [(0, 1), (0, 3)]
    assert find(document, neighborhood=3) == [(0, 1), (0, 4)]


def test_a_document_gives_at_most_two_unless_there_are_too_few(find):
    documents = [("ant bee cow", [9.0, 8.0, 7.0]), ("dog elk fox", [3.0, 2.0, 1.0])]
    settings = {"max_per_document": 2}
    assert find(*documents, num_tokens=3, **settings) == [(0, 0), (0, 1), (1, 0)]
    assert find(*documents, num_tokens=5, **settings) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_punctuation_and_a_text_shown_before_are_left_out(find, tokenizer):
    assert tokenizer.decode([8]) == "("
    assert find(("( ant bee ant ( cow", [9.0, 8.0, 1.0, 7.0, 6.0, 2.0])) == [
        (0, 1),
        (0, 5),
        (0, 2),
    ]


def test_the_first_segment_can_be_left_out(find):
    assert find(("ant bee cow", [9.0, 8.0, 7.0]), ("dog", [5.0]), min_position=1) == [
        (0, 1),
        (0, 2),
    ]


def test_probabilities_are_those_of_the_two_models(tokenizer, make_document, make_result):
    (token,) = find_helped_tokens(
        make_result([math.log(2)]),
        make_result([math.log(50)]),
        [make_document("a", "ant")],
        tokenizer,
    )
    assert token.probability == pytest.approx(0.5)
    assert token.baseline_probability == pytest.approx(0.02)
    assert token.gain == pytest.approx(math.log(25))


def test_results_of_other_documents_or_tokens_are_refused(tokenizer, make_document, make_result):
    result, documents = make_result([1.0, 2.0]), [make_document("a", "ant bee")]
    with pytest.raises(ConfigError, match="is not of the 1 given"):
        find_helped_tokens(result, make_result([1.0, 2.0], [1.0]), documents, tokenizer)
    with pytest.raises(ConfigError, match="is not of the 1 given"):
        find_helped_tokens(result, result, [make_document("b", "ant bee")], tokenizer)
    with pytest.raises(ConfigError, match="different numbers of tokens"):
        find_helped_tokens(result, make_result([1.0]), documents, tokenizer)
