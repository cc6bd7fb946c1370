"""Passages found from outside of a model: by words, and by an encoder of sentences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from memorizing.benchmark.memory_use.places import encode_package
from memorizing.benchmark.memory_use.retrievers import (
    Finder,
    SentenceEncoder,
    cut_spans,
)
from memorizing.errors import ConfigError
from memorizing.evaluation.bm25 import WordScorer
from tests.benchmark.memory_use.tools import make_package, spell
from tests.huggingface.sessions.tools import TOKENIZER


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (0, []),
        (1, [(0, 1)]),
        (4, [(0, 4)]),
        (8, [(0, 8)]),
        (9, [(0, 8), (4, 9)]),
        (12, [(0, 8), (4, 12)]),
        (13, [(0, 8), (4, 12), (8, 13)]),
    ],
)
def test_spans_cover_a_text_and_begin_half_a_length_apart(num_tokens, expected):
    assert list(cut_spans(num_tokens, 8)) == expected


def test_spans_of_one_token_are_its_tokens():
    assert list(cut_spans(3, 1)) == [(0, 1), (1, 2)]


def find_by_words(*texts: str, length: int = 4):
    package = encode_package(TOKENIZER, "p", [(f"{n}.txt", t) for n, t in enumerate(texts)])
    return Finder(package, length, TOKENIZER, WordScorer)


def test_the_passage_with_the_rare_word_is_first():
    finder = find_by_words("w3 w4 w5 w6", "w3 w4 w5 w7", "w3 w4 w8 w9")
    found = finder.find([3, 4, 7], 3)
    assert [one.document for one in found] == ["1.txt", "0.txt", "2.txt"]
    assert [(one.start, one.end) for one in found] == [(0, 4)] * 3
    assert found[0].score > found[1].score == found[2].score > 0


def test_a_word_twice_counts_for_more_than_once_and_in_a_long_text_for_less():
    # Lucene's BM25, by hand: ln(1 + (3 - 2 + .5) / (2 + .5)) * tf / (tf + 1.5 (.25 + .75 l / 3)).
    finder = find_by_words("w3 w3 w4", "w3 w5 w6 w7", "w8 w9")
    by_name = {one.document: one.score for one in finder.find([3], 5)}
    weight = math.log(1 + 1.5 / 2.5)
    assert by_name == {
        "0.txt": pytest.approx(weight * 2 / (2 + 1.5), rel=1e-5),
        "1.txt": pytest.approx(weight * 1 / (1 + 1.5 * (0.25 + 0.75 * 4 / 3)), rel=1e-5),
    }


def test_passages_that_are_found_do_not_overlap_and_one_document_can_be_left_out():
    text = spell(list(range(3, 15)))
    finder = find_by_words(text, "w3 w20")
    found = finder.find([3, 5, 6, 7, 8, 9], 9)
    spans = sorted((one.start, one.end) for one in found if one.document == "0.txt")
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))
    assert len({(one.document, one.start) for one in found}) == len(found)
    assert [one.document for one in finder.find([3, 5], 9, without="0.txt")] == ["1.txt"]


@pytest.mark.parametrize("query", [[], [99]])
def test_words_that_are_nowhere_find_nothing(query):
    assert find_by_words("w3 w4", "w5").find(query, 2) == []


def test_texts_without_a_word_are_never_found():
    assert find_by_words("", "").find([3], 2) == []


def test_what_is_kept_is_the_index_and_the_texts():
    one = find_by_words("w3 w4 w5 w6")
    two = find_by_words("w3 w4 w5 w6", "w7 w8 w9 w10 w11 w12")
    assert 11 < one.num_bytes < two.num_bytes


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny encoder whose texts may have five tokens."""
    folder = tmp_path_factory.mktemp("encoders") / "bert"
    words = {"<pad>": 0} | {f"w{number}": number for number in range(1, 41)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", model_max_length=5
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 7}
    config = BertConfig(
        vocab_size=41, hidden_size=14, intermediate_size=11, initializer_range=0.5, **shape
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_text_is_the_mean_of_its_tokens_however_it_is_padded(encoder_folder):
    encoder = SentenceEncoder(str(encoder_folder), "cpu")
    texts = ["w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12"]
    found = encoder.encode(texts)
    model = BertModel.from_pretrained(encoder_folder).eval()
    for vector, ids in zip(found, ([3, 4, 5], [6], [7, 8, 9, 10, 11]), strict=True):
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)
    assert encoder.encode([]).shape == (0, 14)


def test_a_passage_is_nearest_to_itself(encoder_folder):
    encoder = SentenceEncoder(str(encoder_folder), "cpu")
    package = make_package(23, 17)
    finder = Finder(package, 4, TOKENIZER, encoder.make_scorer)
    name, start, end = finder.spans[3]
    (best,) = finder.find(package.find(name).tokens[start:end], 1)
    assert (best.document, best.start, best.end) == (name, start, end)
    assert best.score == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["missing/encoder/here", "no folder"])
def test_an_encoder_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=name):
        SentenceEncoder(name, "cpu")


def test_a_folder_that_is_no_encoder_is_refused(encoder_folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="the embedder in .* cannot be loaded"):
        SentenceEncoder(str(tmp_path), "cpu")
