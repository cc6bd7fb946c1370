"""Corpora of every kind, and what is said about those that cannot be read."""

import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from memorizing.config import DataConfig
from memorizing.data import CORPUS_KINDS, Corpus, load_corpus
from memorizing.data.corpora.folders import join_files
from memorizing.data.text import ReadLog, shuffle_tree
from memorizing.errors import ConfigError, CorpusError


def read(spec, **settings):
    corpus = load_corpus(DataConfig(corpus=spec, **settings))
    return corpus, {d.name: d for d in corpus.documents()}


def write_tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_distribution_is_one_document_of_its_sources():
    _, documents = read("python:pytest,pluggy")
    assert list(documents) == ["pytest", "pluggy"]
    text = documents["pluggy"].text
    assert "# pluggy/_manager.py\n" in text
    assert "class PluginManager" in text
    assert documents["pluggy"].num_bytes == len(text.encode())


def test_the_order_of_files_follows_the_seed():
    (first, again, other) = (read("python:pluggy", seed=s)[1]["pluggy"].text for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first.splitlines()) == sorted(other.splitlines())


def test_the_standard_library_has_no_tests_and_no_installed_packages():
    _, documents = read("python:stdlib")
    lines = documents["stdlib"].text.splitlines()
    assert "# argparse.py" in lines
    assert "# json/decoder.py" in lines
    assert not any(
        line.startswith(("# test/", "# site-packages/", "# unittest/test", "# idlelib/idle_test/"))
        for line in lines
    )


def test_a_distribution_without_sources_is_an_empty_corpus(monkeypatch, tmp_path):
    info = tmp_path / "hollow-1.0.dist-info"
    write_tree(
        info,
        {"METADATA": "Name: hollow\nVersion: 1.0\n", "RECORD": "hollow-1.0.dist-info/METADATA,,\n"},
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CorpusError, match="hollow: no text"):
        read("python:hollow")


def test_an_unknown_distribution_names_the_nearest():
    with pytest.raises(CorpusError, match="'numpi' is not installed; did you mean 'numpy'"):
        read("python:numpi")


def test_subfolders_of_a_package_are_documents_and_none_is_imported(monkeypatch, tmp_path):
    write_tree(
        tmp_path / "heavy",
        {
            "__init__.py": "raise SystemExit",
            "models/__init__.py": "raise SystemExit",
            "models/a/m.py": "A = 1\n",
            "models/b/sub/n.py": "B = 2\n",
            "models/c/data.txt": "no Python",
            "models/__pycache__/x.py": "no",
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    corpus, documents = read("subpackages:heavy.models")
    assert {n: d.text for n, d in documents.items()} == {
        "a": "# a/m.py\nA = 1\n",
        "b": "# b/sub/n.py\nB = 2\n",
    }
    assert corpus.skipped == ["c: no text"]
    assert "heavy" not in sys.modules
    with pytest.raises(CorpusError, match="did you mean 'models'"):
        read("subpackages:heavy.modles")
    with pytest.raises(CorpusError, match="not installed"):
        read("subpackages:surely_not_there.models")


def test_transformers_is_read_without_being_imported():
    code = (
        "import sys; from memorizing.config import DataConfig; "
        "from memorizing.data import load_corpus; "
        "corpus = load_corpus(DataConfig(corpus='subpackages:transformers.models', "
        "max_documents=3)); names = [d.name for d in corpus.documents()]; "
        "assert len(names) == 3; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_files_are_documents_by_their_relative_path(tmp_path):
    write_tree(
        tmp_path,
        {
            "b.txt": "bee",
            "sub/a.txt": "ay\r\n",
            "sub/blank.txt": "\n",
            "bad.txt": b"caf\xe9",
            "i.png": b"\x89P\0",
        },
    )
    corpus, documents = read(f"files:{tmp_path}")
    assert list(documents) == ["b.txt", "bad.txt", "sub/a.txt"]
    assert documents["sub/a.txt"].text == "ay\r\n"
    assert (documents["bad.txt"].text, documents["bad.txt"].num_bytes) == ("caf\ufffd", 4)
    assert corpus.num_replaced == 1
    assert corpus.skipped == ["i.png: binary", "sub/blank.txt: no text"]


def test_a_pattern_names_files_from_where_it_begins(tmp_path):
    write_tree(tmp_path, {"x/one.txt": "1", "x/deep/two.txt": "2", "x/three.md": "3"})
    assert list(read(f"files:{tmp_path}/x/*.txt")[1]) == ["one.txt"]
    assert list(read(f"files:{tmp_path}/**/*.txt")[1]) == ["x/deep/two.txt", "x/one.txt"]
    assert list(read(f"files:{tmp_path}/x/three.md")[1]) == ["three.md"]
    with pytest.raises(CorpusError, match="matches no file"):
        read(f"files:{tmp_path}/x/*.rst")


def test_a_repository_is_one_document_with_its_folders_together(tmp_path):
    write_tree(
        tmp_path,
        {
            "r1/a.c": "int a;\n",
            "r1/lib/b.c": "int b;\n",
            "r1/lib/c.c": "int c;\n",
            "r1/.git/HEAD": "ref",
            "r1/z.bin": b"\0\1",
            "r2/readme": "hello\n",
            "loose.txt": "not in a repository",
        },
    )
    corpus, documents = read(f"repositories:{tmp_path}")
    assert set(documents) == {"r1", "r2"}
    heads = [line for line in documents["r1"].text.splitlines() if line.startswith("#")]
    assert sorted(heads) == ["# a.c", "# lib/b.c", "# lib/c.c"]
    assert heads != ["# lib/b.c", "# a.c", "# lib/c.c"]
    assert heads != ["# lib/c.c", "# a.c", "# lib/b.c"]
    assert corpus.skipped == ["z.bin in r1: binary"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pyhton:stdlib", "unknown kind of corpus 'pyhton'; did you mean 'python'"),
        ("stdlib", "has no kind; write kind:where"),
        ("files", "names nothing after 'files:'; write files:PATH"),
        ("github", "names nothing after 'github:'; write github:PATH.*git clone"),
        ("files:", "names nothing after 'files:'; write files:PATH"),
        ("files:/surely/not/there", "does not exist"),
        ("repositories:/surely/not/there", "does not exist"),
    ],
)
def test_a_wrong_specification_says_what_to_write(spec, message):
    with pytest.raises(CorpusError, match=message) as caught:
        load_corpus(DataConfig(corpus=spec))
    assert "\n" not in str(caught.value)


def test_a_missing_path_names_its_neighbor(tmp_path):
    write_tree(tmp_path, {"books/a.txt": "x"})
    with pytest.raises(CorpusError, match="did you mean 'books'"):
        load_corpus(DataConfig(corpus=f"files:{tmp_path}/boks"))


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="holds no visible files"):
        load_corpus(DataConfig(corpus=f"files:{tmp_path}"))
    write_tree(tmp_path, {"blank.txt": ""})
    with pytest.raises(CorpusError, match=r"no document with text \(blank.txt: no text\)"):
        read(f"files:{tmp_path}")


def test_reading_stops_after_so_many_documents(tmp_path):
    write_tree(tmp_path, {f"{number}.txt": "x" for number in range(7)})
    for limit, expected in ((0, 7), (1, 1), (6, 6), (7, 7), (8, 7)):
        corpus, documents = read(f"files:{tmp_path}", max_documents=limit)
        assert list(documents) == [f"{number}.txt" for number in range(expected)]
    assert str(corpus) == f"files:{tmp_path}, 7 files, the first 8 documents"
    with pytest.raises(ConfigError, match=r"data.max_documents is -1; allowed: 0 or more"):
        DataConfig(max_documents=-1)


def test_only_folders_can_be_joined(tmp_path):
    write_tree(tmp_path, {"a.txt": "x"})
    with pytest.raises(CorpusError, match="set it to 1"):
        load_corpus(DataConfig(corpus=f"files:{tmp_path}", folders_per_document=2))


def test_a_corpus_prints_its_description_and_can_be_read_twice(tmp_path):
    write_tree(tmp_path, {"a.txt": "x", "b.txt": " "})
    corpus, first = read(f"files:{tmp_path}")
    assert isinstance(corpus, Corpus)
    assert str(corpus) == corpus.description == f"files:{tmp_path}, 2 files"
    assert [d.name for d in corpus.documents()] == list(first)
    assert corpus.skipped == ["b.txt: no text"]
    assert list(CORPUS_KINDS) == [
        "python",
        "subpackages",
        "files",
        "repositories",
        "jsonl",
        "parquet",
        "pg19",
        "c4",
        "arxiv",
        "github",
        "isabelle",
    ]


def test_joined_files_follow_their_path_and_count_raw_bytes(tmp_path):
    write_tree(
        tmp_path,
        {
            "one.py": b"x = 1",
            "empty.py": b"\n",
            "two.py": b"y = '\xff'\n",
            "image.png": b"\x89PNG\0",
        },
    )
    log = ReadLog()
    names = ("one.py", "empty.py", "image.png", "two.py", "gone.py")
    files = {PurePosixPath("pkg") / name: tmp_path / name for name in names}
    document = join_files("pkg", files, 5, log)
    assert document is not None
    texts = {"one": "# pkg/one.py\nx = 1\n", "two": "# pkg/two.py\ny = '\ufffd'\n"}
    order = [path.stem for path in shuffle_tree(files, 5) if path.stem in texts]
    assert document.text == "".join(texts[name] for name in order)
    assert document.num_bytes == len(document.text.encode()) - 2
    assert log.num_replaced == 1
    assert sorted(log.lines)[1] == "pkg/image.png in pkg: binary"
    assert sorted(log.lines)[0].startswith("pkg/gone.py in pkg: cannot be read")


def test_line_ends_are_kept_as_they_are(tmp_path):
    write_tree(tmp_path, {"dos.py": b"a\r\nb\r\n"})
    document = join_files("d", {PurePosixPath("dos.py"): tmp_path / "dos.py"}, 0, ReadLog())
    assert document is not None
    assert document.text == "# dos.py\na\r\nb\r\n"
