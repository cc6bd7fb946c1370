"""Tokenizers: nothing is lost, nothing in a text is special, and a file is what was saved."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memorizing.config import TokenizerConfig
from memorizing.data import Document, Tokenizer, load_tokenizer, train_tokenizer
from memorizing.data.tokenizer_training import sample_text
from memorizing.errors import CorpusError, TokenizerError

CODE = "".join(
    f"class Layer{i}(Module):\n    def forward(self, hidden):\n        return self.norm(hidden) "
    f"+ {i}\n\n"
    for i in range(97)
)
DOCUMENTS = [
    Document("code", CODE),
    Document("prose", "The gate opens, and the memory answers.\n" * 31),
]
TRICKY = (
    "<|document|> <unk> <0x0A>\u2581x \u2581\u2581 caf\u00e9 \u6c49 \U0001f600\r\n\n\t  \x00 end  "
)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(DOCUMENTS, TokenizerConfig(kind="bpe", vocab_size=431))


@pytest.fixture(scope="module")
def unigram():
    return train_tokenizer(DOCUMENTS, TokenizerConfig(kind="unigram", vocab_size=431))


@settings(deadline=None, max_examples=150)
@given(text=st.text())
@example(text=TRICKY)
def test_bpe_gives_any_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())
    assert bpe.start_token not in ids


@settings(deadline=None, max_examples=150)
@given(text=st.text())
@example(text=TRICKY)
def test_unigram_gives_any_text_back(unigram, text):
    ids = unigram.encode(text)
    assert unigram.decode(ids) == text
    assert unigram.token_bytes[ids].sum() == len(text.encode())
    assert unigram.start_token not in ids


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_fit_the_vocabulary_and_the_start_token_is_one_of_them(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(CODE)
    assert ids.dtype == np.int32
    assert ids.max() < tokenizer.vocab_size <= 431
    assert 0 <= tokenizer.start_token < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.start_token]) == "<|document|>"
    assert len(CODE) / len(ids) > 2


def test_digits_stand_alone_and_line_ends_take_the_indent(bpe):
    pieces = [bpe.decode([i]) for i in bpe.encode("\n        return 1234")]
    assert pieces[0] == "\n        "
    assert pieces[-4:] == list("1234")


def test_training_twice_gives_the_same_tokenizer(bpe):
    again = train_tokenizer(DOCUMENTS, TokenizerConfig(kind="bpe", vocab_size=431))
    assert again.fingerprint == bpe.fingerprint
    smaller = train_tokenizer(DOCUMENTS, TokenizerConfig(kind="bpe", vocab_size=307))
    assert smaller.fingerprint != bpe.fingerprint
    assert smaller.vocab_size == 307


def test_a_saved_tokenizer_is_the_same_by_file_and_by_folder(bpe, unigram, tmp_path):
    for tokenizer in (bpe, unigram):
        path = tokenizer.save(tmp_path / "run")
        assert path.name == "tokenizer.json"
        for source in (path, path.parent, str(path)):
            loaded = train_tokenizer([], TokenizerConfig(kind="pretrained", path=str(source)))
            assert loaded.fingerprint == tokenizer.fingerprint
            assert loaded.start_token == tokenizer.start_token
            assert np.array_equal(loaded.encode(CODE), tokenizer.encode(CODE))
        assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_the_fingerprint_ignores_the_layout_of_the_file(bpe, tmp_path):
    path = bpe.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=7))
    assert load_tokenizer(path).fingerprint == bpe.fingerprint


def test_a_tokenizer_without_a_start_token_gets_one():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    tokenizer = Tokenizer(backend)
    assert (tokenizer.start_token, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.encode("a b a b").tolist() == [1, 2, 1, 2]
    assert backend.truncation is not None


def test_a_tokenizer_that_is_not_there_is_named(tmp_path, bpe):
    with pytest.raises(TokenizerError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(tmp_path / "no.json")
    path = bpe.save(tmp_path)
    path.write_bytes(path.read_bytes()[:-97])
    with pytest.raises(TokenizerError, match="truncated"):
        load_tokenizer(path)


def test_no_text_trains_no_tokenizer():
    with pytest.raises(CorpusError, match="no text"):
        train_tokenizer([Document("empty", "")], TokenizerConfig())


def test_unigram_learns_words_that_repeat_only_as_a_whole(unigram):
    pieces = [unigram.decode([i]) for i in unigram.encode("        return self.norm(hidden)")]
    assert max(map(len, pieces)) >= 6
    assert "".join(pieces) == "        return self.norm(hidden)"


def test_a_sample_is_spread_evenly_over_documents():
    documents = [Document(f"d{i}", f"{i % 10}" * 163_840) for i in range(7)]
    sample = "".join(sample_text(documents, 573_440))
    assert 0.9 < len(sample) / 573_440 < 1.1
    counts = [sample.count(str(i)) for i in range(7)]
    assert max(counts) <= 2 * min(counts)
    assert "".join(sample_text(documents, 10**9)) == "".join(d.text for d in documents)
