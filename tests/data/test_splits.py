"""Held-out documents: by name, by hash, and never joined with what is trained on."""

import pytest

from memorizing.config import DataConfig
from memorizing.data import Document, join_documents, load_splits, split_documents
from memorizing.errors import ConfigError, CorpusError

NAMES = [f"doc{i}" for i in range(211)]


def test_patterns_hold_out_names():
    split = split_documents(
        ["a1", "a2", "b[1]", "c"], DataConfig(validation=("a?",), test=("b[1]",))
    )
    assert (split.train, split.validation, split.test) == (("c",), ("a1", "a2"), ("b[1]",))


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(
        CorpusError, match="data.test names 'lama', which no document matches; did you mean 'llama'"
    ):
        split_documents(["llama", "bert"], DataConfig(test=("lama",)))


def test_a_document_has_one_use():
    with pytest.raises(CorpusError, match="'bert' is in both"):
        split_documents(["llama", "bert"], DataConfig(validation=("b*",), test=("bert",)))


def test_names_and_a_share_exclude_each_other():
    with pytest.raises(ConfigError, match="held_out_share"):
        split_documents(["llama", "bert"], DataConfig(validation=("b*",), held_out_share=0.5))


def test_a_share_is_held_out_half_each_and_stays_put():
    config = DataConfig(held_out_share=0.4)
    split = split_documents(NAMES, config)
    assert sorted([*split.train, *split.validation, *split.test]) == sorted(NAMES)
    assert 0.12 < len(split.validation) / len(NAMES) < 0.28
    assert 0.12 < len(split.test) / len(NAMES) < 0.28
    fewer = split_documents(NAMES[::-2], config)
    assert set(fewer.test) == set(split.test) & set(NAMES[::-2])


def test_everything_is_trained_on_where_nothing_is_held_out():
    assert split_documents(NAMES, DataConfig()).train == tuple(NAMES)


def test_joining_keeps_every_text_and_byte_once():
    documents = [Document(f"n{i}", f"text {i}\n", 100 + i) for i in range(11)]
    joined = join_documents(documents, 3, seed=1)
    assert [len(d.name.split("+")) for d in joined] == [3, 3, 3, 2]
    assert sum(d.num_bytes for d in joined) == sum(d.num_bytes for d in documents)
    for document in joined:
        assert document.text == "".join(f"text {n[1:]}\n" for n in document.name.split("+"))
    assert join_documents(documents[::-1], 3, seed=1) == joined
    assert join_documents(documents, 3, seed=2) != joined
    assert join_documents(documents, 1, seed=1) == documents


def test_a_held_out_folder_never_shares_a_document_with_a_trained_one(tmp_path):
    for i in range(13):
        (tmp_path / f"f{i}").mkdir()
        (tmp_path / f"f{i}" / "a.txt").write_text(f"body {i}\n")
    (tmp_path / "f7" / "b.txt").write_bytes(b"\xff\n")
    config = DataConfig(
        corpus=f"repositories:{tmp_path}",
        folders_per_document=4,
        validation=("f1", "f2"),
        test=("f3",),
    )
    splits = load_splits(config)
    folders = {
        use: {n for d in getattr(splits, use) for n in d.name.split("+")}
        for use in ("train", "validation", "test")
    }
    assert folders["validation"] == {"f1", "f2"}
    assert folders["test"] == {"f3"}
    assert len(folders["train"]) == 10
    assert [len(d.name.split("+")) for d in splits.train] == [4, 4, 2]
    assert splits.num_replaced == 1
    assert len(splits.describe()) == 5
    assert splits.describe()[2].startswith("validation: 1 documents, 0.0 MB (f")
    assert splits.fingerprint == load_splits(config).fingerprint
    (tmp_path / "f7" / "b.txt").write_bytes(b"\xff!\n")
    assert splits.fingerprint != load_splits(config).fingerprint


def test_excluded_documents_are_in_no_split(tmp_path):
    for name in ("alpha", "beta", "gamma", "beta_copy"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    config = DataConfig(corpus=f"files:{tmp_path}", test=("beta*",), exclude=("*_copy*",))
    splits = load_splits(config)
    assert [d.name for d in splits.train] == ["alpha.txt", "gamma.txt"]
    assert [d.name for d in splits.test] == ["beta.txt"]
    with pytest.raises(CorpusError, match=r"data.exclude names 'delta\*', which no document"):
        load_splits(DataConfig(corpus=f"files:{tmp_path}", exclude=("delta*",)))
