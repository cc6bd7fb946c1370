"""What a corpus holds, counted."""

import json

import pytest

from memorizing.config import DataConfig, TokenizerConfig
from memorizing.data import (
    DocumentSize,
    LengthBin,
    choose_tokenizer,
    list_documents,
    load_corpus,
    measure_corpus,
)

LENGTHS = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 7, "f": 8, "g": 41}
"""Name -> words of a document; each is one token."""


@pytest.fixture
def corpus(tmp_path):
    for name, length in LENGTHS.items():
        (tmp_path / name).write_text("\n".join(["word"] * length))
    (tmp_path / "i.bin").write_bytes(b"\0")
    (tmp_path / "z").write_text("")
    return load_corpus(DataConfig(corpus=f"files:{tmp_path}"))


@pytest.fixture
def tokenizer():
    """One token for a word, and one for a line end."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from memorizing.data import Tokenizer as Wrapped

    backend = Tokenizer(models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "removed")
    return Wrapped(backend)


def test_a_corpus_is_counted_and_its_lengths_fall_into_bins_of_powers_of_two(corpus, tokenizer):
    done = []
    found = measure_corpus(corpus, tokenizer, "words", num_extremes=2, progress=done.append)
    assert (found.num_documents, found.num_tokens) == (7, sum(LENGTHS.values()))
    assert found.num_bytes == sum(5 * length - 1 for length in LENGTHS.values())
    assert found.median_tokens == 4
    assert found.histogram == (
        LengthBin(1, 2, 1, 1),
        LengthBin(2, 4, 2, 5),
        LengthBin(4, 8, 2, 11),
        LengthBin(8, 16, 1, 8),
        LengthBin(16, 32, 0, 0),
        LengthBin(32, 64, 1, 41),
    )
    assert found.longest == (DocumentSize("g", 204, 41), DocumentSize("f", 39, 8))
    assert found.shortest == (DocumentSize("a", 4, 1), DocumentSize("b", 9, 2))
    assert found.skipped == ("i.bin: binary", "z: no text")
    assert found.tokenizer == "words"
    assert done == [7]
    assert json.loads(json.dumps(found.to_dict()))["histogram"][1]["num_tokens"] == 5


def test_only_the_documents_asked_for_are_listed(corpus):
    listing = list_documents(corpus, 3)
    assert [document.name for document in listing.documents] == ["a", "b", "c"]
    assert not listing.is_complete
    for count in (7, 8):
        listing = list_documents(corpus, count)
        assert listing.documents[-1] == DocumentSize("g", 204)
        assert listing.is_complete
    assert listing.skipped == ("i.bin: binary", "z: no text")


def test_a_tokenizer_is_trained_on_the_first_documents_only(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} words\n" * 2**17)
    corpus = load_corpus(DataConfig(corpus=f"files:{tmp_path}"))
    config = TokenizerConfig(vocab_size=307, sample_mib=2)
    tokenizer, name = choose_tokenizer(corpus, config)
    assert tokenizer.vocab_size <= 307
    assert name == (f"bpe, {tokenizer.vocab_size} ids, trained on the first 2 documents (2.1 MB)")
    tokenizer.save(tmp_path / "kept")
    kept = TokenizerConfig(kind="pretrained", path=str(tmp_path / "kept"))
    again, name = choose_tokenizer(corpus, kept)
    assert again.fingerprint == tokenizer.fingerprint
    assert name.startswith(str(tmp_path / "kept"))
