"""Every kind of corpus, on what nobody means to be read."""

import os

import pytest

from memorizing.config import DataConfig
from memorizing.data import CORPUS_KINDS, load_corpus
from memorizing.errors import CorpusError
from tests.data.reading.test_files import make_odd_files

ODD_PLACES = {
    "files": (".", ".txt"),
    "repositories": ("one", ".txt"),
    "jsonl": (".", ".jsonl"),
    "parquet": (".", ".parquet"),
    "pg19": ("train", ".txt"),
    "c4": (".", ".json.gz"),
    "arxiv": (".", ".tar"),
    "github": ("one", ".py"),
    "isabelle": ("session", ".thy"),
}
"""Kind -> the folder in which it looks for files of which suffix."""


def test_every_kind_that_reads_a_place_is_tried():
    assert {*ODD_PLACES, "python", "subpackages"} == set(CORPUS_KINDS)


@pytest.mark.parametrize("kind", ODD_PLACES)
def test_no_corpus_waits_for_a_pipe_or_follows_a_loop(kind, tmp_path):
    folder, suffix = ODD_PLACES[kind]
    (tmp_path / folder).mkdir(exist_ok=True)
    make_odd_files(tmp_path / folder, suffix)
    os.symlink("..", tmp_path / folder / "up")
    with pytest.raises(CorpusError, match="pipe|no plain file|no document with text|holds no"):
        list(load_corpus(DataConfig(corpus=f"{kind}:{tmp_path}")).documents())


@pytest.mark.parametrize("kind", ODD_PLACES)
@pytest.mark.parametrize("name", ["pipe", "loop", "x" * 4099, "caf\udce9", "a\0b", "~no-body/x"])
def test_a_place_that_is_no_file_is_refused_in_one_sentence(kind, name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("loop", tmp_path / "loop")
    where = name if name.startswith("~") else f"{tmp_path}/{name}"
    with pytest.raises(CorpusError) as caught:
        list(load_corpus(DataConfig(corpus=f"{kind}:{where}")).documents())
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("kind", ["files", "repositories", "github"])
def test_files_and_folders_of_names_that_are_not_utf8_are_read(kind, tmp_path):
    folder = tmp_path / "caf\udce9" if kind != "files" else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "d\udcff.txt").write_text("text\n")
    corpus = load_corpus(DataConfig(corpus=f"{kind}:{tmp_path}"))
    (document,) = corpus.documents()
    assert document.name == ("d\\udcff.txt" if kind == "files" else "caf\\udce9")
    assert document.text.endswith("text\n")
    document.text.encode()
