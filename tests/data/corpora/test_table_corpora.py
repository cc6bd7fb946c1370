"""A row, a document: files of one's own; PG-19 and C4(4K+) as published, and as rows of the hub."""

import gzip
import itertools
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from memorizing.config import DataConfig
from memorizing.data import load_corpus, load_splits
from memorizing.errors import CorpusError


def read(corpus, **settings):
    loaded = load_corpus(DataConfig(corpus=corpus, **settings))
    return loaded, {document.name: document for document in loaded.documents()}


def write_tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_json_lines_are_documents_named_by_column_or_row(tmp_path):
    rows = [
        {"text": "one", "name": "first"},
        {"text": "two", "id": 17},
        {"text": "three"},
        {"text": " "},
        {"text": None},
    ]
    lines = (
        "\n".join(map(json.dumps, rows)).encode()
        + b'\n\n{"text": "bad \xff byte"}\n{"text": "half \\ud800"}\n'
    )
    write_tree(tmp_path, {"d/t.jsonl": lines, "d/other.txt": "ignored"})
    corpus, documents = read(f"jsonl:{tmp_path}/d")
    assert list(documents) == ["first", "17", "t.jsonl:3", "t.jsonl:7", "t.jsonl:8"]
    assert (documents["t.jsonl:7"].text, documents["t.jsonl:7"].num_bytes) == (
        "bad \ufffd byte",
        10,
    )
    documents["t.jsonl:8"].text.encode()
    assert corpus.num_replaced == 2
    assert corpus.skipped == ["t.jsonl:4: no text", "t.jsonl:5: no text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 2 of 't.jsonl' is not JSON"),
        ("[1, 2]", "line 2 of 't.jsonl' is a list"),
        ('{"txet": "x"}', "row 2 of 't.jsonl' has no column 'text'.* did you mean 'txet'"),
        ('{"text": 5}', "column 'text' of row 2 in 't.jsonl' is int"),
        ('{"text": "x", "name": "same"}', "two documents .* named 'same'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    write_tree(tmp_path, {"t.jsonl": '{"text": "good", "name": "same"}\n' + line})
    with pytest.raises(CorpusError, match=message):
        read(f"jsonl:{tmp_path}/t.jsonl")


def test_parquet_rows_are_documents(tmp_path):
    table = pa.table({"body": ["one", None, "three"], "id": ["a", "b", "c"], "other": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "p.parquet")
    raw = pa.array([b"caf\xe9", b"ok"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    parquet.write_table(pa.table({"body": strings}), tmp_path / "q.parquet")
    corpus, documents = read(f"parquet:{tmp_path}", text_column="body")
    assert {n: d.text for n, d in documents.items()} == {
        "a": "one",
        "c": "three",
        "q.parquet:1": "caf\ufffd",
        "q.parquet:2": "ok",
    }
    assert documents["q.parquet:1"].num_bytes == 4
    assert (corpus.skipped, corpus.num_replaced) == (["b: no text"], 1)
    with pytest.raises(CorpusError, match=r"no column 'text'.*known: body"):
        read(f"parquet:{tmp_path}")


def test_a_truncated_parquet_file_is_named(tmp_path):
    parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "p.parquet")
    content = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(content[:-9])
    with pytest.raises(CorpusError, match=r"cannot read 'p.parquet' as Parquet"):
        read(f"parquet:{tmp_path}")


@pytest.fixture
def published(tmp_path):
    """Books in the authors' layout."""
    for split, numbers in {"train": (101, 13, 7), "validation": (5,), "test": (11, 3)}.items():
        for number in numbers:
            path = tmp_path / "gutenberg" / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"Book {number} of {split}.\n")
    (tmp_path / "gutenberg" / "metadata.csv").write_text("7,A Title,1899,http://example.org/7\n")
    return tmp_path / "gutenberg"


def test_books_are_named_by_split_and_number_with_the_held_out_splits_first(published):
    _, documents = read(f"pg19:{published}")
    assert list(documents) == [
        "validation/5",
        "test/11",
        "test/3",
        "train/101",
        "train/13",
        "train/7",
    ]
    assert documents["train/7"].text == "Book 7 of train.\n"


def test_rows_of_the_hubs_schema_give_the_same_books(published, tmp_path):
    rows = tmp_path / "rows" / "data"
    rows.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        books = sorted((published / split).glob("*.txt"))
        table = {
            "short_book_title": [f"Title {book.stem}" for book in books],
            "publication_date": [1899] * len(books),
            "url": [f"http://www.gutenberg.org/ebooks/{book.stem}" for book in books],
            "text": [book.read_text() for book in books],
        }
        parquet.write_table(pa.table(table), rows / f"{split}-00000-of-00001-5263d.parquet")
    assert read(f"pg19:{tmp_path / 'rows'}")[1] == read(f"pg19:{published}")[1]


def test_the_official_splits_can_be_held_out(published):
    config = DataConfig(
        corpus=f"pg19:{published}",
        max_documents=4,
        validation=("validation/*",),
        test=("test/*",),
    )
    splits = load_splits(config)
    names = [[d.name for d in part] for part in (splits.train, splits.validation, splits.test)]
    assert names == [["train/101"], ["validation/5"], ["test/11", "test/3"]]


def test_a_missing_folder_of_books_says_what_to_download_and_how_large_it_is(tmp_path):
    for where in (tmp_path / "missing", tmp_path):
        with pytest.raises(CorpusError, match=r"PG-19 has 28,752 books, 11.5 GB.*deepmind-gutenb"):
            read(f"pg19:{where}")


def test_books_that_cannot_be_read_are_left_out_and_named(published):
    (published / "train" / "13.txt").write_bytes(b"\0\1")
    (published / "train" / "7.txt").write_bytes(b"caf\xe9")
    corpus, documents = read(f"pg19:{published}")
    assert "train/13" not in documents
    assert corpus.skipped == ["train/13: binary"]
    assert corpus.num_replaced == 1


def write_pages(folder, sizes, name="c4-train.00000-of-01024.json.gz"):
    """Pages of so many bytes; the last byte of each takes two to write."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "text": "é".rjust(size - 1, "w"),
            "timestamp": "2019-04-25T12:57:54Z",
            "url": f"http://example.org/{number % 2}",
        }
        for number, size in enumerate(sizes)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_bytes(gzip.compress(lines.encode()))
    return folder


def test_pages_too_short_for_4096_tokens_are_passed_over_and_counted(tmp_path):
    folder = write_pages(tmp_path, (4095, 4096, 17, 5003))
    corpus, documents = read(f"c4:{folder}")
    assert list(documents) == [
        "http://example.org/1 (c4-train.00000-of-01024:2)",
        "http://example.org/1 (c4-train.00000-of-01024:4)",
    ]
    assert [document.num_bytes for document in documents.values()] == [4096, 5003]
    assert corpus.skipped == ["2 pages of fewer than 4,096 bytes"]
    assert len(read(f"c4:{folder}", min_document_tokens=17)[1]) == 4
    assert len(read(f"c4:{folder}", min_document_tokens=5003)[1]) == 1


def test_pages_of_the_same_address_have_names_of_their_own(tmp_path):
    folder = write_pages(tmp_path, (4099, 4111, 4127))
    write_pages(tmp_path, (4099,), "c4-train.00001-of-01024.json.gz")
    assert len(read(f"c4:{folder}")[1]) == 4
    assert len(read(f"c4:{folder}/*00001*.json.gz")[1]) == 1


def test_reading_stops_before_a_file_that_is_not_needed(tmp_path):
    folder = write_pages(tmp_path, (4099, 4111))
    (folder / "c4-train.00001-of-01024.json.gz").write_bytes(b"\x1f\x8bbroken")
    corpus, documents = read(f"c4:{folder}", max_documents=2)
    assert (len(documents), corpus.skipped) == (2, [])
    corpus, documents = read(f"c4:{folder}", max_documents=3)
    assert len(documents) == 2
    assert corpus.skipped[0].startswith("c4-train.00001-of-01024.json.gz: cannot be read")


def test_documents_come_one_by_one(tmp_path):
    folder = write_pages(tmp_path, itertools.repeat(4099, 23))
    documents = load_corpus(DataConfig(corpus=f"c4:{folder}")).documents()
    assert next(documents).num_bytes == 4099
    (folder / "c4-train.00000-of-01024.json.gz").unlink()
    documents.close()


def test_missing_pages_say_what_to_download_and_how_large_it_is(tmp_path):
    for where in (tmp_path / "missing", tmp_path, tmp_path / "*.json.gz"):
        with pytest.raises(CorpusError, match=r"305 GB of gzip.*allenai/c4"):
            read(f"c4:{where}")
