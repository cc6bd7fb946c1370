"""Rows of others: marks, damage and depth are read, counted or named, in every kind of file."""

import gzip
import json
import lzma

import pytest

from memorizing.data.reading.tables import find_rows, find_text, read_rows
from memorizing.data.text import ReadLog, decode_text
from memorizing.errors import CorpusError

PACK = {
    "t.jsonl": bytes,
    "t.json.gz": gzip.compress,
    "t.ndjson": gzip.compress,
    "t.jsonl.gz": lzma.compress,
    "t.json": bytes,
}
"""Names lie about what packs a file, if anything does."""


def read(folder, name, lines):
    (folder / name).write_bytes(PACK[name](lines))
    log = ReadLog()
    rows = list(read_rows(find_rows(str(folder), log, "give others"), log))
    return [decode_text(find_text(row, ("text",)), log) for row in rows], rows, log


@pytest.fixture(params=PACK)
def name(request):
    return request.param


def test_a_byte_order_mark_belongs_to_no_row(tmp_path, name):
    lines = b'\xef\xbb\xbf{"text": "one"}\r\n\n\xef\xbb\xbf{"text": "two"}\n{"text": "three"}'
    texts, rows, log = read(tmp_path, name, lines)
    assert texts == ["one", "two", "three"]
    assert [row.number for row in rows] == [1, 3, 4]
    assert (log.num_replaced, log.items) == (0, [])


def test_a_byte_that_is_not_utf8_costs_one_character_and_is_counted(tmp_path, name):
    lines = b"".join(
        b'{"text": "%d caf%s"}\n' % (i, b"\xe9" if i == 311 else b"e") for i in range(701)
    )
    texts, _, log = read(tmp_path, name, lines)
    assert texts == [f"{i} caf\ufffd" if i == 311 else f"{i} cafe" for i in range(701)]
    assert (log.num_replaced, log.items) == (1, [])


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_003,
        b'{"text": ' * 100_003,
        b'{"text": "x", "number": ' + b"9" * 5003 + b"}",
        b"\0\0",
        b"17",
        b'{"text": "cut',
    ],
)
def test_a_line_that_is_no_object_is_named_and_the_next_is_read(tmp_path, line):
    texts, _, log = read(tmp_path, "t.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert texts == ["a", "b"]
    assert log.lines == ["t.jsonl:2: not a JSON object"]
    files = find_rows(str(tmp_path), ReadLog(), "")
    with pytest.raises(CorpusError, match=r"line 2 of 't.jsonl' .*; each line must be one JSON"):
        list(read_rows(files, ReadLog(), strict=True))


def test_a_packed_file_that_is_cut_off_gives_what_stands_before(tmp_path):
    lines = "".join(json.dumps({"text": f"row {i}" * 97}) + "\n" for i in range(509)).encode()
    whole = gzip.compress(lines)
    for damaged in (whole[:-9], whole[: len(whole) // 2], whole + b"junk", whole[:11]):
        (tmp_path / "t.json.gz").write_bytes(damaged)
        log = ReadLog()
        files = find_rows(str(tmp_path), log, "")
        texts = [find_text(row, ("text",)) for row in read_rows(files, log)]
        assert texts == [f"row {i}".encode() * 97 for i in range(len(texts))]
        assert len(log.items) == 1
        assert log.items[0][1].startswith(f"cannot be read after row {len(texts)} (")
        with pytest.raises(CorpusError, match="cannot be read after row .*give a whole file"):
            list(read_rows(files, ReadLog(), strict=True))


def test_a_packed_file_that_expands_without_end_is_refused(tmp_path):
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(bytes(2**21) * 40))
    with pytest.raises(CorpusError, match=r"'t.json.gz' .*(expands to more than|a bomb)"):
        list(read_rows(find_rows(str(tmp_path), ReadLog(), ""), ReadLog()))
