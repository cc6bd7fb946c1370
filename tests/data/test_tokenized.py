"""Tokenized documents: kept by content, rebuilt when damaged, cut without loss."""

import os

import numpy as np
import pytest

from memorizing.config import TokenizerConfig
from memorizing.data import (
    Document,
    TokenizedDocument,
    cut_documents,
    take_beginnings,
    tokenize_documents,
    train_tokenizer,
)
from memorizing.data.tokenized import TokenCache, find_cache_dir
from memorizing.errors import CorpusError, ResourceError

TEXTS = ["def f(x):\n    return x\n" * 41, "caf\u00e9 \U0001f600 \u6c49\u5b57 " * 29, "short"]
DOCUMENTS = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, TokenizerConfig(vocab_size=307))


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def replace(raw, place, value):
    return raw[:place] + bytes([value]) + raw[place + 1 :]


def test_tokens_are_those_of_the_tokenizer_in_the_order_given(tokenizer, tmp_path):
    done = []
    for _ in range(2):
        documents = tokenize_documents(iter(DOCUMENTS), tokenizer, tmp_path, progress=done.append)
        assert [d.name for d in documents] == ["d0", "d1", "d2"]
        for document, source in zip(documents, DOCUMENTS, strict=True):
            assert document.tokens.dtype == np.int32
            assert np.array_equal(document.tokens, tokenizer.encode(source.text))
            assert document.num_bytes == len(source.text.encode())
    assert sum(done) == 2 * sum(d.num_bytes for d in DOCUMENTS)
    assert len(files(tmp_path)) == 3


def test_the_cache_is_read_and_keyed_by_text_and_tokenizer(tokenizer, tmp_path):
    cache = TokenCache(tmp_path)
    path = cache.locate("short", tokenizer.fingerprint)
    cache.write(path, np.array([5, 7, 11]))
    (document,) = tokenize_documents([Document("renamed", "short")], tokenizer, tmp_path)
    assert document.tokens.tolist() == [5, 7, 11]
    assert cache.locate("shorter", tokenizer.fingerprint) != path
    assert cache.locate("short", "other") != path


@pytest.mark.parametrize(
    "damage",
    ["truncated", "altered", "emptied", "another file", "out of vocabulary", "encrypted", "packed"],
)
def test_a_damaged_cache_file_is_rebuilt(tokenizer, tmp_path, damage):
    tokenize_documents(DOCUMENTS[:1], tokenizer, tmp_path)
    (path,) = files(tmp_path)
    good = path.read_bytes()
    middle = len(good) // 2
    if damage == "out of vocabulary":
        TokenCache(tmp_path).write(path, np.array([tokenizer.vocab_size]))
    else:
        path.write_bytes(
            {
                "truncated": good[:-13],
                "emptied": b"",
                "another file": b"text",
                "altered": replace(good, middle, good[middle] ^ 1),
                # Of the entry in the central directory: flags, and a packer that nobody has.
                "encrypted": replace(good, good.index(b"PK\x01\x02") + 8, 1),
                "packed": replace(good, good.index(b"PK\x01\x02") + 10, 99),
            }[damage]
        )
    (document,) = tokenize_documents(DOCUMENTS[:1], tokenizer, tmp_path)
    assert np.array_equal(document.tokens, tokenizer.encode(TEXTS[0]))
    assert np.array_equal(TokenCache(tmp_path).read(path, tokenizer.vocab_size), document.tokens)


def test_a_pipe_in_the_cache_is_not_waited_for(tokenizer, tmp_path):
    path = TokenCache(tmp_path).locate("short", tokenizer.fingerprint)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    (document,) = tokenize_documents(DOCUMENTS[2:], tokenizer, tmp_path)
    assert np.array_equal(document.tokens, tokenizer.encode("short"))
    assert path.is_file()


def test_a_text_with_surrogates_that_stand_alone_is_tokenized_and_kept(tokenizer, tmp_path):
    odd, plain = Document("odd", "caf\udce9 \ud800"), Document("plain", "caf\ufffd \ufffd")
    (first,) = tokenize_documents([odd], tokenizer, tmp_path)
    (second,) = tokenize_documents([plain], tokenizer, tmp_path)
    assert np.array_equal(first.tokens, second.tokens)
    assert len(files(tmp_path)) == 1


def test_ids_take_two_bytes_where_they_fit(tmp_path):
    cache = TokenCache(tmp_path)
    for largest, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        path = tmp_path / f"{largest}.npz"
        cache.write(path, np.array([0, largest], dtype=np.int32))
        with np.load(path) as arrays:
            assert arrays["tokens"].dtype == dtype
        read = cache.read(path, 70_001)
        assert read is not None
        assert (read.tolist(), read.dtype) == ([0, largest], np.int32)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "there"))
    assert find_cache_dir() == tmp_path / "there"
    monkeypatch.delenv("MEMORIZING_CACHE")
    assert find_cache_dir().parts[-2:] == (".cache", "memorizing")


def test_a_cache_that_cannot_be_written_says_so(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="choose another folder"):
        tokenize_documents(DOCUMENTS, tokenizer, tmp_path / "file")


@pytest.mark.parametrize("max_tokens", [1, 13, 101, 10_007])
def test_pieces_hold_every_token_and_byte_of_their_document(tokenizer, tmp_path, max_tokens):
    whole = tokenize_documents(DOCUMENTS, tokenizer, tmp_path)
    pieces = tokenize_documents(DOCUMENTS, tokenizer, tmp_path, max_tokens=max_tokens)
    assert all(1 <= len(p.tokens) <= max_tokens for p in pieces)
    for document in whole:
        own = [p for p in pieces if p.name.split("#")[0] == document.name]
        assert np.array_equal(np.concatenate([p.tokens for p in own]), document.tokens)
        assert sum(p.num_bytes for p in own) == document.num_bytes
        assert [p.num_bytes for p in own] == [
            int(tokenizer.token_bytes[p.tokens].sum()) for p in own
        ]
        assert [p.name for p in own] == [
            document.name,
            *(f"{document.name}#{i + 1}" for i in range(1, len(own))),
        ]


def test_bytes_of_pieces_sum_to_the_raw_bytes_where_some_were_replaced(tokenizer):
    tokens = tokenizer.encode("\ufffd" * 37 + "abc")
    pieces = cut_documents([TokenizedDocument("bad", tokens, 40)], tokenizer, max_tokens=11)
    assert sum(p.num_bytes for p in pieces) == 40
    assert all(p.num_bytes > 0 for p in pieces)


@pytest.mark.parametrize("num_tokens", [0, 1, 13, 10_000])
def test_beginnings_have_the_bytes_of_their_text(tokenizer, tmp_path, num_tokens):
    documents = tokenize_documents(DOCUMENTS, tokenizer, tmp_path)
    found = take_beginnings(documents, tokenizer, num_tokens)
    assert [document.name for document in found] == ["d0", "d1", "d2"]
    for document, beginning in zip(documents, found, strict=True):
        expected = document.tokens[: num_tokens or None]
        assert beginning.tokens.tolist() == expected.tolist()
        if document.name != "d1" or len(expected) == len(document.tokens):  # d1: cut in characters
            assert beginning.num_bytes == len(tokenizer.decode(expected).encode())


def test_documents_below_the_minimum_are_left_out(tokenizer, tmp_path):
    length = len(tokenizer.encode("short"))
    kept = tokenize_documents(DOCUMENTS, tokenizer, tmp_path, min_tokens=length)
    assert [d.name for d in kept] == ["d0", "d1", "d2"]
    kept = tokenize_documents(DOCUMENTS, tokenizer, tmp_path, min_tokens=length + 1)
    assert [d.name for d in kept] == ["d0", "d1"]
    with pytest.raises(CorpusError, match=f"longest document has {length} tokens"):
        tokenize_documents(DOCUMENTS[2:], tokenizer, tmp_path, min_tokens=length + 1)
