"""arXiv: LaTeX of papers on Mathematics, from bulk archives and from rows."""

import gzip
import io
import json
import tarfile
import time
import tracemalloc
import zipfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from memorizing.config import DataConfig
from memorizing.data import load_corpus
from memorizing.data.corpora.arxiv import is_mathematics, order_sources
from memorizing.data.reading import archives
from memorizing.errors import CorpusError
from tests.data.reading.test_archives import make_header, write_tar

METADATA = {
    "2301.00001": "math.AG hep-th",
    "2301.00002": "hep-th math.AG",
    "math/0001003": "math.NT",
    "2301.00004": "math-ph math.MP",
    "2301.00005": "math.CO",
    "2301.00006": "math.PR stat.ME",
    "2301.00007": "math.PR",
    "2301.00008": "math.PR",
}
MAIN = (
    "\\documentclass{article}\n% \\input{old}\n\\begin{document}\n"
    "\\input{sec/one}\n\\include{two}\n"
)
SEVERAL = {
    "aaa.tex": b"% never used\nrest\n",
    "main.tex": MAIN.encode(),
    "old.tex": b"old\n",
    "sec/one.tex": b"one \\input{sec/inner}\n",
    "sec/inner.tex": b"inner",
    "two.tex": b"two\n",
    "figure.eps": b"%!PS",
    "paper.bbl": b"\\bibitem{x}",
}


def pack(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            raw = b"" if isinstance(content, tarfile.TarInfo) else content
            info.name, info.size = name, len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return gzip.compress(file.getvalue())


PAPERS = {
    "2301/2301.00001.gz": pack(SEVERAL),
    "2301/2301.00002.gz": gzip.compress(b"physics"),
    "2301/2301.00003.pdf": b"%PDF",
    "2301/2301.00004.gz": gzip.compress(b"\\documentstyle{amsart} caf\xe9"),
    "2301/2301.00005.gz": gzip.compress(b"%auto-ignore\nwithdrawn"),
    "2301/2301.00006.gz": b"not gzip",
    "2301/2301.00007.gz": pack({"a.tex": b"x", "l.tex": make_header(tarfile.FIFOTYPE)}),
    "2301/2301.00008.gz": gzip.compress(b"%!PS-Adobe"),
}


def read(where, **settings):
    corpus = load_corpus(DataConfig(corpus=f"arxiv:{where}", **settings))
    return corpus, {document.name: document for document in corpus.documents()}


def write_metadata(path, raw):
    """As the ending of the name says: as it is, packed, or in an archive."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arxiv-metadata-oai-snapshot.json", raw)
    else:
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.fixture
def bulk(tmp_path):
    """A folder as downloaded."""
    (tmp_path / "src").mkdir()
    write_tar(tmp_path / "src" / "arXiv_src_2301_001.tar", PAPERS)
    old = {"0001/math0001003.gz": gzip.compress(b"\\magnification=1200 plain \\bye")}
    write_tar(tmp_path / "src" / "arXiv_src_0001_001.tar", old)
    lines = [json.dumps({"id": k, "categories": v, "title": "t"}) for k, v in METADATA.items()]
    text = "\n".join(lines) + "\n"
    (tmp_path / "arxiv-metadata-oai-snapshot.json").write_text(text, encoding="utf-8")
    return tmp_path


def test_papers_on_mathematics_are_read_from_bulk_archives(bulk):
    corpus, documents = read(bulk)
    assert list(documents) == ["math0001003", "2301.00001", "2301.00004"]
    expected = (
        f"% main.tex\n{MAIN}% sec/one.tex\none \\input{{sec/inner}}\n% sec/inner.tex\ninner\n"
        "% two.tex\ntwo\n% aaa.tex\n% never used\nrest\n% old.tex\nold\n"
    )
    assert documents["2301.00001"].text == expected
    assert documents["2301.00001"].num_bytes == len(expected.encode())
    assert documents["math0001003"].text == "\\magnification=1200 plain \\bye"
    assert corpus.num_replaced == 1
    skipped = corpus.skipped
    assert any(line.startswith("2301.00006: cannot be read") for line in skipped)
    assert any("2301.00007" in line and "neither a file nor a folder" in line for line in skipped)
    assert "1 papers that are not Mathematics" in skipped
    assert "2 papers without LaTeX source" in skipped
    assert "1 papers that were withdrawn" in skipped


@pytest.mark.parametrize("ending", [".json.gz", ".zip"])
def test_the_metadata_may_be_packed(bulk, ending):
    file = bulk / "arxiv-metadata-oai-snapshot.json"
    raw = file.read_bytes()
    file.unlink()
    write_metadata(bulk / ("archive.zip" if ending == ".zip" else f"arxiv-metadata{ending}"), raw)
    assert len(read(bulk)[1]) == 3


def test_missing_or_broken_metadata_is_said(bulk):
    file = bulk / "arxiv-metadata-oai-snapshot.json"
    text = file.read_text()
    file.write_text("{broken\n" + text)
    assert "arxiv-metadata-oai-snapshot.json:1: not a paper's id" in "\n".join(
        read(bulk)[0].skipped
    )
    file.write_text('{"id": "1", "categories": "cs.LG"}\n')
    with pytest.raises(CorpusError, match="has no papers on Mathematics"):
        read(bulk)
    file.unlink()
    with pytest.raises(CorpusError, match=r"has no arxiv-metadata-oai-snapshot.json.*kaggle.com"):
        read(bulk)
    (bulk / "arxiv-metadata-oai-snapshot.json.gz").write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(CorpusError, match=r"cannot read 'arxiv-metadata.* download it again"):
        read(bulk)


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".zip"])
def test_metadata_of_one_endless_line_is_refused_and_not_held_in_memory(bulk, ending):
    file = bulk / "arxiv-metadata-oai-snapshot.json"
    file.unlink()
    path = write_metadata(bulk / f"arxiv-metadata{ending}", b'{"id": "' + bytes(11 * 2**20))
    tracemalloc.start()
    try:
        with pytest.raises(CorpusError, match=f"line 1 of '{path.name}' .*download it again"):
            read(bulk)
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", [".json.gz", ".zip"])
def test_metadata_that_expand_too_far_are_refused(bulk, ending, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    (bulk / "arxiv-metadata-oai-snapshot.json").unlink()
    path = write_metadata(bulk / f"arxiv-metadata{ending}", (b" " * 1023 + b"\n") * 3 * 2**10)
    with pytest.raises(CorpusError, match=f"'{path.name}' expands to more than"):
        read(bulk)


def test_metadata_in_a_zip_file_that_cannot_be_unpacked_are_named(bulk):
    (bulk / "arxiv-metadata-oai-snapshot.json").unlink()
    path = write_metadata(bulk / "archive.zip", b"{}\n")
    raw = path.read_bytes()
    central = raw.index(b"PK\x01\x02")
    for place, value, problem in ((8, 1, "is encrypted"), (10, 12, "not compressed by deflate")):
        path.write_bytes(raw[: central + place] + bytes([value]) + raw[central + place + 1 :])
        with pytest.raises(CorpusError, match=f"cannot read 'archive.zip' .*{problem}"):
            read(bulk)


def test_of_many_bad_lines_the_first_are_named_and_the_others_counted(bulk):
    file = bulk / "arxiv-metadata-oai-snapshot.json"
    file.write_text("[" * 100_003 + "\n" + "{}\n" * 22 + file.read_text())
    corpus, documents = read(bulk)
    assert len(documents) == 3
    assert f"{file.name}:10: not a paper's id and categories" in corpus.skipped
    assert f"13 more lines of {file.name} that are not a paper's id and categories" in (
        corpus.skipped
    )


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"main.tex": b"\\begin{document}", "._main.tex": b"\0\5" * 99}, "\\begin{document}"),
        ({"a.tex": b"here", "l.tex": make_header(tarfile.SYMTYPE, "/etc/x")}, "here"),
        ({"paper": b"\\documentstyle{x}", "fig.eps": b"%!PS"}, "\\documentstyle{x}"),
        ({"paper.txt": b"\\magnification=1000 x \\bye", "00README": b"no"}, None),
        ({"9901001.1": b"\\input amstex", "x.jpg": b"\xff\xd8"}, "\\input amstex"),
    ],
)
def test_a_paper_is_found_among_what_is_beside_it(bulk, members, text):
    papers = {"2301/2301.00001.gz": pack(members)}
    write_tar(bulk / "src" / "arXiv_src_2301_001.tar", papers)
    _, documents = read(bulk)
    assert documents["2301.00001"].text == (text or members["paper.txt"].decode())


def test_a_paper_that_is_unpacked_already_is_read(bulk):
    papers = {"2301/2301.00001.gz": b"\\documentclass{a} one", "2301/2301.00004.gz": b"\x00\x01"}
    write_tar(bulk / "src" / "arXiv_src_2301_001.tar", papers)
    corpus, documents = read(bulk)
    assert documents["2301.00001"].text == "\\documentclass{a} one"
    assert any(line.startswith("2301.00004: cannot be read") for line in corpus.skipped)


def test_a_paper_that_is_there_twice_is_read_once(bulk):
    again = {"2302/2301.00004.gz": gzip.compress(b"\\begin{document} again")}
    write_tar(bulk / "src" / "arXiv_src_2302_001.tar", again)
    corpus, documents = read(bulk)
    assert documents["2301.00004"].text.startswith("\\documentstyle")
    assert any("arXiv_src_2302_001.tar: the paper was there before" in x for x in corpus.skipped)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"a \\% \input{b}", []),
        (r"a \\\% \input{b}", ["b.tex"]),
        (r"50\% \input{b}", ["b.tex"]),
        (r"\input{ b }", ["b.tex"]),
        (r"\import{ . }{ b }", ["b.tex"]),
        (r"\input{   }\input b", ["b.tex"]),
    ],
)
def test_what_follows_a_percent_sign_is_a_comment_unless_it_is_escaped(text, found):
    files = {"main.tex": "\\documentclass{x}" + text, "a.tex": "", "b.tex": ""}
    assert order_sources(files) == [
        "main.tex",
        *found,
        *(n for n in ("a.tex", "b.tex") if n not in found),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "\\input{" + " " * 99_991,
        "\\input" + " " * 99_991,
        "\\" * 99_991,
        "\\import{a}{" + "\n " * 49_999,
    ],
)
def test_latex_takes_time_in_proportion_to_its_length(text):
    start_s = time.perf_counter()
    assert order_sources({"a.tex": text, "b.tex": ""}) == ["a.tex", "b.tex"]
    assert time.perf_counter() - start_s < 2


def test_a_missing_folder_says_what_to_download_and_how_large_it_is(tmp_path):
    for where in (tmp_path / "missing", tmp_path):
        with pytest.raises(CorpusError, match=r"about 3 TB.*s3://arxiv/src.*proof-pile.*10 GB"):
            read(where)


def test_a_bulk_archive_that_is_not_safe_is_refused_before_a_paper_is_given(bulk):
    members = {**PAPERS, "2301/up.gz": make_header(tarfile.BLKTYPE)}
    path = write_tar(bulk / "src" / "arXiv_src_0001_001.tar", members)
    documents = load_corpus(DataConfig(corpus=f"arxiv:{bulk}")).documents()
    with pytest.raises(CorpusError, match=f"'{path.name}' has the member '2301/up.gz', which is"):
        next(documents)


def test_a_truncated_bulk_archive_is_read_as_far_as_it_goes_and_named(bulk):
    path = bulk / "src" / "arXiv_src_2301_001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"2301/2301.00004.gz") + 530])
    corpus, documents = read(bulk)
    assert list(documents) == ["math0001003", "2301.00001"]
    assert any(
        line.startswith(f"{path.name}: cannot be read to its end") for line in corpus.skipped
    )


def test_a_paper_that_is_a_bomb_is_left_out_and_named(bulk, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    bomb = {"2301/2301.00007.gz": gzip.compress(bytes(3 * 2**20))}
    write_tar(bulk / "src" / "arXiv_src_2301_001.tar", bomb)
    corpus, documents = read(bulk)
    assert list(documents) == ["math0001003"]
    assert "2301.00007: archive '2301.00007.gz' expands to more than" in corpus.skipped[0]


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ("math.AG", True),
        ("math.AG cs.IT", True),
        ("cs.IT math.IT", False),
        ("math-ph hep-th math.MP", True),
        ("alg-geom math.AG", True),
        ("mathematics", False),
        ("", False),
    ],
)
def test_a_paper_is_mathematics_by_its_primary_category(categories, expected):
    assert is_mathematics(categories) is expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"b.tex": "\\input a", "a.tex": "x"}, ["b.tex", "a.tex"]),
        ({"z.tex": MAIN, "two.tex": "2", "sec/one.tex": "1"}, ["z.tex", "sec/one.tex", "two.tex"]),
        ({"a.tex": "\\input{b}", "b.tex": "\\input{a}"}, ["a.tex", "b.tex"]),
        (
            {"p/m.tex": MAIN + "\\subimport{x/}{y}", "p/x/y.tex": "y", "a.tex": "a"},
            ["p/m.tex", "p/x/y.tex", "a.tex"],
        ),
        ({"supplement.tex": MAIN, "ms.tex": MAIN}, ["ms.tex", "supplement.tex"]),
        ({"short.tex": "a", "long.tex": "aaa"}, ["long.tex", "short.tex"]),
        (
            {"m.tex": MAIN + "50\\% \\input{x.ltx}", "x.ltx": "x", "w.tex": ""},
            ["m.tex", "x.ltx", "w.tex"],
        ),
    ],
)
def test_the_main_file_comes_first_and_what_it_brings_in_after_it(files, expected):
    assert order_sources(files) == expected


def test_rows_of_proof_pile_are_brought_together_by_paper(tmp_path):
    files = {
        "2301.00001/v2 arxiv/sec/one.tex": "one\n",
        "2301.00001/v1 arxiv/main.tex": "first version",
        "math0211159/v1 arxiv/all.tex": "all of it",
        "2301.00001/v2 arxiv/main.tex": MAIN,
    }
    rows = [{"text": t, "meta": {"config": "arxiv", "file": f}} for f, t in files.items()]
    rows.insert(1, {"text": "lemma", "meta": {"config": "formal", "file": "a.lean", "more": [1]}})
    rows.append({"text": "?", "meta": {"config": "arxiv", "file": "nothing"}})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "proofpile_dev.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    corpus, documents = read(tmp_path)
    assert {name: document.text for name, document in documents.items()} == {
        "2301.00001": f"% main.tex\n{MAIN}% sec/one.tex\none\n",
        "math0211159": "all of it",
    }
    assert corpus.skipped == [
        "nothing: not the path of a paper's file",
        "1 rows that are not papers of arXiv",
    ]


def test_rows_that_are_papers_are_taken_by_their_category(tmp_path):
    table = pa.table(
        {
            "arxiv_id": ["1", "2", "3", "4"],
            "latex": ["\\one", "\\two", "\\three", None],
            "categories": ["math.AG", "cs.LG math.ST", "['math.NT', 'cs.IT']", "math.AG"],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    corpus, documents = read(tmp_path, text_column="latex")
    assert list(documents) == ["1", "3"]
    assert corpus.skipped == ["4: no text", "1 papers that are not Mathematics"]
