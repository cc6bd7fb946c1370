"""Isabelle: a document per session directory, theories in import order."""

import io
import logging
import random
import tarfile
import time

import pytest

from memorizing.config import DataConfig
from memorizing.data import load_corpus
from memorizing.data.corpora.isabelle import Session, read_imports, read_root, sort_by_imports
from memorizing.errors import CorpusError
from tests.data.reading.test_archives import make_header, write_tar

AFP = {
    "afp-2024-01-02/thys/ROOTS": "Lists\nTrees\n",
    "afp-2024-01-02/thys/Lists/ROOT": """
chapter AFP

session Lists (AFP) = "HOL-Library" +
  description \\<open>theories \\<open>nested\\<close> session Fake = HOL\\<close>
  options [timeout = 300]
  sessions "HOL-Algebra"
  directories "base"
  theories [document = false]
    Zed
  theories
    Main_Result (* the last: "comment" *)
  document_files (in "tex") "root.tex"

session Lists_Ex (AFP slow) in "ex" = Lists +
  theories Demo
""",
    "afp-2024-01-02/thys/Lists/Main_Result.thy": """
(* theory Wrong imports Nothing begin (* nested *) *)
section \\<open>theory too\\<close>
theory Main_Result
  imports "HOL-Library.FuncSet" Zed "base/Order" Lists.Alpha "HOL-Algebra.Alpha"
  keywords "foo" :: thy_decl
begin
end
""",
    "afp-2024-01-02/thys/Lists/Zed.thy": "theory Zed imports Order begin\nend\n",
    "afp-2024-01-02/thys/Lists/Alpha.thy": 'theory "Alpha" imports Main begin end',
    "afp-2024-01-02/thys/Lists/Unlisted.thy": "theory Unlisted imports Zed begin end\n",
    "afp-2024-01-02/thys/Lists/base/Order.thy": "theory Order\nimports Main\nbegin end\n",
    "afp-2024-01-02/thys/Lists/ex/Demo.thy": 'theory Demo imports "../Zed" Helper begin end\n',
    "afp-2024-01-02/thys/Lists/ex/Helper.thy": "theory Helper imports Main begin end\n",
    "afp-2024-01-02/thys/Lists/document/root.tex": "\\documentclass{article}",
    "afp-2024-01-02/thys/Trees/Deep/T.thy": "theory T imports U begin end\n",
    "afp-2024-01-02/thys/Trees/U.thy": "theory U imports Main begin end\n",
}
EXPECTED = {
    "Lists": ["base/Order", "Zed", "Alpha", "Main_Result", "Unlisted"],
    "Lists/ex": ["Helper", "Demo"],
    "Trees": ["U", "Deep/T"],
}


def read(where, **settings):
    corpus = load_corpus(DataConfig(corpus=f"isabelle:{where}", **settings))
    return corpus, {document.name: document for document in corpus.documents()}


def write_tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def list_theories(document):
    return [
        line.removeprefix("(* ").removesuffix(".thy *)")
        for line in document.text.splitlines()
        if line.startswith("(* ") and line.endswith(".thy *)")
    ]


def test_a_tarball_and_a_checkout_give_the_same_documents(tmp_path):
    tarball = write_tar(
        tmp_path / "afp-2024-01-02.tar.gz", {k: v.encode() for k, v in AFP.items()}, "w:gz"
    )
    folder = write_tree(tmp_path / "checkout", AFP)
    packed, unpacked = read(tarball)[1], read(folder / "afp-2024-01-02")[1]
    assert packed == unpacked
    assert {name: list_theories(document) for name, document in packed.items()} == EXPECTED
    text = packed["Lists"].text
    assert text.startswith("(* base/Order.thy *)\ntheory Order\n")
    assert packed["Lists"].num_bytes == len(text.encode())


def test_the_folder_of_the_theories_and_the_one_above_give_the_same_names(tmp_path):
    folder = write_tree(tmp_path, AFP)
    assert list(read(folder)[1]) == list(read(folder / "afp-2024-01-02" / "thys")[1])


def test_sessions_that_share_a_folder_are_one_document(tmp_path):
    root = "session Logic = Pure + theories Logic\nsession Logic_More = Logic + theories More\n"
    theories = {
        "src/Logic/ROOT": root,
        "src/Logic/Logic.thy": "theory Logic imports Pure begin end",
        "src/Logic/More.thy": "theory More imports Logic.Logic Logic_More.Extra begin end",
        "src/Logic/Extra.thy": "theory Extra imports Pure begin end",
    }
    _, documents = read(write_tree(tmp_path, theories))
    assert {name: list_theories(d) for name, d in documents.items()} == {
        "src/Logic": ["Logic", "Extra", "More"]
    }


def test_a_cycle_of_imports_does_not_stop_the_reading(tmp_path):
    theories = {
        "x/A.thy": "theory A imports B begin end",
        "x/B.thy": "theory B imports A begin end",
    }
    _, documents = read(write_tree(tmp_path, theories))
    assert list_theories(documents["x"]) == ["B", "A"]


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ("theory A imports B C begin", ["B", "C"]),
        (
            'theory A\nimports\n  "~~/src/HOL/Library/Multiset"\n  "$AFP/X/Y"\nbegin',
            ["~~/src/HOL/Library/Multiset", "$AFP/X/Y"],
        ),
        ("(* c (* d *) theory X imports Y begin *) theory A imports B begin", ["B"]),
        ('header {* theory X imports Y *} theory A imports B uses "x.ML" begin', ["B"]),
        ('text ‹theory X ‹imports› Y begin› theory A imports B abbrevs "x" = "y" begin', ["B"]),
        ('theory A imports B (* "no" *) keywords "k" :: thy_decl begin', ["B"]),
        ("theory A imports HOL-Library.Multiset begin", ["HOL-Library.Multiset"]),
        ('theory Pure keywords "a" begin', []),
        ("no header at all", []),
        ("(* never closed theory A imports B begin", []),
    ],
)
def test_imports_are_read_from_the_header_alone(text, imports):
    assert read_imports(text) == imports


def test_a_root_file_gives_its_sessions_with_their_folders():
    text = AFP["afp-2024-01-02/thys/Lists/ROOT"]
    assert read_root(text) == [
        Session("Lists", ".", ("base",), ("Zed", "Main_Result")),
        Session("Lists_Ex", "ex", (), ("Demo",)),
    ]
    assert read_root(
        'session "HOL-Library" (main) in Library = HOL + theories A (global) "B/C"'
    ) == [Session("HOL-Library", "Library", (), ("A", "B/C"))]
    assert read_root("chapter Nothing (* session X = Y *)") == []


def test_an_archive_that_is_not_safe_is_refused_before_a_document_is_given(tmp_path):
    members = {name: text.encode() for name, text in AFP.items()}
    members["afp-2024-01-02/thys/Evil.thy"] = make_header(tarfile.CHRTYPE)
    path = write_tar(tmp_path / "afp.tar.gz", members, "w:gz")
    documents = load_corpus(DataConfig(corpus=f"isabelle:{path}")).documents()
    with pytest.raises(CorpusError, match=r"'afp.tar.gz' has the member '.*Evil.thy', which is"):
        next(documents)


def test_a_truncated_tarball_says_to_download_it_again(tmp_path):
    path = write_tar(tmp_path / "afp.tar.gz", {k: v.encode() for k, v in AFP.items()}, "w:gz")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(CorpusError, match=r"'afp.tar.gz' to its end .*download it again"):
        read(path)


def test_a_missing_archive_says_what_to_download_and_how_large_it_is(tmp_path):
    for where in (tmp_path / "afp.tar.gz", tmp_path / "no" / "where"):
        with pytest.raises(CorpusError, match=r"does not exist.*isa-afp.org/download.*100 MB"):
            read(where)
    write_tree(tmp_path, {"notes.txt": "x"})
    with pytest.raises(CorpusError, match=r"neither a folder nor a tar archive.*isa-afp.org"):
        read(tmp_path / "notes.txt")
    with pytest.raises(CorpusError, match=r"names nothing after 'isabelle:'.*isa-afp.org"):
        load_corpus(DataConfig(corpus="isabelle"))


def test_broken_theories_are_left_out_and_named(tmp_path):
    theories = {
        **AFP,
        "afp-2024-01-02/thys/Trees/Bin.thy": b"\0\1\2",
        "thys/Latin/L.thy": b"theory L caf\xe9",
    }
    members = {k: v if isinstance(v, bytes) else v.encode() for k, v in theories.items()}
    tarball = write_tar(tmp_path / "afp.tar", members)
    for where in (write_tree(tmp_path / "folder", theories), tarball):
        corpus, documents = read(where)
        assert corpus.skipped == ["afp-2024-01-02/thys/Trees/Bin.thy: binary"]
        assert corpus.num_replaced == 1
        assert documents["Latin"].text == "(* L.thy *)\ntheory L caf\ufffd\n"


def test_reading_stops_after_so_many_documents(tmp_path):
    corpus, documents = read(write_tree(tmp_path, AFP), max_documents=2)
    assert list(documents) == ["Lists", "Lists/ex"]
    assert str(corpus).endswith(", the first 2 documents")


@pytest.mark.parametrize("root", ["", " \n", "(* nothing *)", "chapter", "session", "session A ="])
def test_a_root_that_says_nothing_leaves_its_folder_a_document(tmp_path, root):
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "ROOT").write_text(root)
    (tmp_path / "A" / "T.thy").write_text("theory T imports Main begin end")
    (document,) = load_corpus(DataConfig(corpus=f"isabelle:{tmp_path}")).documents()
    assert "theory T" in document.text


@pytest.mark.parametrize(
    "text",
    [
        "\\<open>" * 9973,
        "‹" * 29_989,
        '"' + '\\"' * 29_989,
        "`" + "\\`" * 29_989,
        "(*" * 29_989,
        "\\<a" * 9973,
    ],
    ids=["cartouche", "short cartouche", "string", "alternative string", "comment", "symbol"],
)
def test_what_is_not_closed_takes_time_in_proportion_to_its_length(text):
    start_s = time.perf_counter()
    assert read_imports(f"theory T imports A begin {text}") == ["A"]
    assert read_imports(text) == []
    assert read_root(text) == []
    assert time.perf_counter() - start_s < 3


def test_of_members_of_one_name_the_last_counts_as_where_it_is_unpacked(tmp_path):
    path = tmp_path / "afp.tar"
    with tarfile.open(path, "w") as archive:
        for text in (b"theory T imports A begin end", b"theory T imports B begin end"):
            info = tarfile.TarInfo("A/T.thy")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    (document,) = load_corpus(DataConfig(corpus=f"isabelle:{path}")).documents()
    assert "imports B" in document.text
    assert "imports A" not in document.text


def test_what_is_imported_comes_before_what_imports_it():
    imports = {"main": ["lists", "sets"], "lists": ["order"], "sets": ["order", "lists"]}
    assert sort_by_imports(["main", "sets", "order", "lists"], imports) == [
        "order",
        "lists",
        "sets",
        "main",
    ]


def test_every_import_of_a_random_graph_precedes_it_and_each_name_comes_once():
    random.seed(7)
    names = [f"n{number}" for number in range(97)]
    imports = {name: random.sample(names[:i], min(i, 5)) for i, name in enumerate(names)}
    shuffled = random.sample(names, len(names))
    ordered = sort_by_imports([*shuffled, *shuffled[:11]], imports)
    assert sorted(ordered) == sorted(names)
    place = {name: number for number, name in enumerate(ordered)}
    assert all(place[needed] < place[name] for name in names for needed in imports[name])
    assert ordered == sort_by_imports(shuffled, imports)


def test_names_that_import_nothing_keep_their_order():
    assert sort_by_imports(["c", "a", "b"], {}) == ["c", "a", "b"]
    assert sort_by_imports([], {"a": ["b"]}) == []


def test_imports_from_elsewhere_are_passed_over(caplog):
    assert sort_by_imports(["b", "a"], {"b": ["HOL.Main", "a"], "HOL.Main": ["b"]}) == ["a", "b"]
    assert not caplog.records


def test_a_cycle_ends_in_the_name_that_is_reached_first_and_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "memorizing.data.corpora.isabelle"):
        ordered = sort_by_imports(["a", "b", "c", "d"], {"a": ["b"], "b": ["c"], "c": ["a", "d"]})
    assert ordered == ["d", "c", "b", "a"]
    assert [record.getMessage() for record in caplog.records] == [
        "c imports a, which imports it: a cycle"
    ]


def test_a_name_that_imports_itself_is_no_cycle(caplog):
    assert sort_by_imports(["a"], {"a": ["a"]}) == ["a"]
    assert not caplog.records


def test_a_chain_longer_than_the_stack_is_sorted():
    names = [str(number) for number in range(50_021)]
    imports = {name: [before] for before, name in zip(names, names[1:], strict=False)}
    assert sort_by_imports(reversed(names), imports) == names
