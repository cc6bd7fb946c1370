"""Tokenizers: nothing is lost, nothing in a text is special, and a file is what was saved."""

import json
import os

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memorizing.config import TokenizerConfig
from memorizing.data import Tokenizer, load_tokenizer, train_tokenizer
from memorizing.data.tokenizer import PIECES
from memorizing.errors import TokenizerError
from memorizing.huggingface import MemorizingTokenizer
from tests.data.conftest import CODE

TRICKY = (
    "<|document|> <unk> <0x0A>\u2581x \u2581\u2581 caf\u00e9 \u6c49 \U0001f600\r\n\n\t  \x00 end  "
)


@settings(deadline=None, max_examples=50)
@given(text=st.text())
@example(text=TRICKY)
def test_bpe_gives_any_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())
    assert bpe.start_token not in ids


@settings(deadline=None, max_examples=50)
@given(text=st.text())
@example(text=TRICKY)
def test_unigram_gives_any_text_back(unigram, text):
    ids = unigram.encode(text)
    assert unigram.decode(ids) == text
    assert unigram.token_bytes[ids].sum() == len(text.encode())
    assert unigram.start_token not in ids


def test_digits_stand_alone_and_line_ends_take_the_indent(bpe):
    pieces = [bpe.decode([i]) for i in bpe.encode("\n        return 1234")]
    assert pieces[0] == "\n        "
    assert pieces[-4:] == list("1234")


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


def test_more_blanks_than_a_pattern_can_step_back_over_are_read():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    # Two blocks of 4 million blanks, their rest, and the letter.
    assert Tokenizer(backend).encode(" " * 10_000_019 + "x").tolist() == [0] * 4


def test_a_text_in_pieces_is_the_same_text(bpe, monkeypatch):
    whole = [bpe.encode(text).tolist() for text in (CODE, "a" + " " * 12 + "b")]
    monkeypatch.setattr("memorizing.data.tokenizer._MAX_BLANKS", 11)
    assert [bpe.encode(text).tolist() for text in (CODE, "a" + " " * 12 + "b")] == whole
    for text in (" " * 97, "\n" + "\t \u2003" * 41 + "\n\nx", "x" + " " * 67 + "y" + " " * 71):
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode_batch(["", " " * 37, "x"])[2].tolist() == bpe.encode("x").tolist()


def test_a_surrogate_that_stands_alone_is_read_as_what_cannot_be_read(bpe, unigram):
    for tokenizer in (bpe, unigram):
        for odd in ("\ud800", "\udcff", "\udfff"):
            assert tokenizer.decode(tokenizer.encode(f"a{odd}b")) == "a\ufffdb"


@pytest.mark.parametrize("largest", [2**24, 2**31, 2**32, 2**53])
@pytest.mark.parametrize("place", ["vocabulary", "added"])
def test_an_id_that_no_vocabulary_has_is_refused_before_a_table_is_made(
    bpe, tmp_path, largest, place
):
    path = bpe.save(tmp_path)
    spec = json.loads(path.read_text(encoding="utf-8"))
    if place == "vocabulary":
        spec["model"]["vocab"]["far"] = largest
    else:
        spec["added_tokens"].append({**spec["added_tokens"][0], "id": largest, "content": "far"})
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(TokenizerError, match=f"the id {largest:,}; allowed are ids below"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="allowed are ids below"):
        MemorizingTokenizer(str(path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b"[" * 100_003, "nested too deeply|recursion depth"),
        (b"{}", "no tokenizer, or is damaged"),
        ("{}".encode("utf-16"), "UTF-8"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a x"]}}', "damaged"),
        # Read once, but not again: `tokenizers` panics over the ids that are the same.
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0, "ab": 0}, "merges": ["a b"], '
         b'"continuing_subword_prefix": "##"}}', "damaged"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, problem):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=problem):
        load_tokenizer(path)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(TokenizerError, match="is no file"):
            load_tokenizer(source)
