"""`memorizing corpus`."""

import json

import pytest


def test_the_first_documents_are_listed_with_their_sizes(run, texts, tmp_path):
    path = tmp_path / "list.json"
    outcome = run("corpus", f"files:{texts}", "--documents", "3", "--json", path)
    assert outcome.status == 0
    assert outcome.out.splitlines()[0] == f"files:{texts}, 5 files"
    assert "bytes  alpha.txt" in outcome.out
    assert "gamma.txt" not in outcome.out
    assert "the first 3 documents; --stats reads them all" in outcome.out
    assert [d["name"] for d in json.loads(path.read_text())["documents"]] == [
        "alpha.txt",
        "beta.txt",
        "delta.txt",
    ]


def test_what_is_left_out_is_counted_and_named(run, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for number in range(13):
        (tmp_path / f"b{number:02}.bin").write_bytes(b"\0")
    outcome = run("corpus", f"files:{tmp_path}")
    assert outcome.status == 0
    assert "b00.bin: binary" in outcome.out
    assert "b12.bin" not in outcome.out
    assert "and 3 more" in outcome.out


def test_statistics_are_printed_written_and_drawn(run, texts, tmp_path):
    path, picture = tmp_path / "deep" / "s.json", tmp_path / "s.png"
    words = ("--set", "tokenizer.vocab_size=307", "--json", path, "--plot", picture)
    outcome = run("corpus", f"files:{texts}", "--stats", *words)
    assert outcome.status == 0
    values = json.loads(path.read_text())
    total = sum(file.stat().st_size for file in texts.iterdir())
    assert (values["num_documents"], values["num_bytes"]) == (5, total)
    assert f"5 documents, {total:,} bytes, {values['num_tokens']:,} tokens" in outcome.out
    assert "tokenizer: bpe, " in outcome.out
    assert sum(item["num_documents"] for item in values["histogram"]) == 5
    assert "█" in outcome.out
    assert all(
        f"  {d['num_tokens']:,} tokens  {d['name']}" in outcome.out for d in values["longest"]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, outcome.out.splitlines()[:-1])) <= 80 or str(texts) in outcome.out


def test_a_recipe_and_a_trained_tokenizer_can_be_named(run, trained, texts, tmp_path):
    recipe, path = tmp_path / "mine.toml", tmp_path / "s.json"
    recipe.write_text(f'[data]\ncorpus = "files:{texts}"\nmax_documents = 2\n')
    outcome = run("corpus", recipe, "--stats", "--tokenizer", trained, "--json", path)
    assert outcome.status == 0
    values = json.loads(path.read_text())
    assert values["num_documents"] == 2
    assert values["tokenizer"].startswith(str(trained))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("pg91",), "corpus 'pg91' has no kind"),
        (("pg91:x",), "unknown kind of corpus 'pg91'; did you mean 'pg19'"),
        (("pg19:missing",), "PG-19 has 28,752 books, 11.5 GB of text"),
        (("c4:missing",), "C4 in English is 305 GB of gzip"),
        (("arxiv:missing",), "arXiv's sources are about 3 TB"),
        (("github:missing",), "give a folder of checkouts"),
        (("isabelle:missing",), "isa-afp.org/download"),
        (("files:.", "--set", "model.num_layers=2"), "allowed: data.* and tokenizer.*"),
        (("files:.", "--set", "data.max_document=2"), "did you mean 'data.max_documents'?"),
        (("files:.", "--plot", "x.png"), "--plot is given without --stats"),
        (("files:.", "--tokenizer", "x"), "--tokenizer is given without --stats"),
        (("files:.", "--stats", "--tokenizer", "./no.json"), "'./no.json' does not exist"),
        (("missing.toml",), "cannot read recipe file 'missing.toml'"),
    ],
)
def test_bad_input_gives_one_clear_line(run, words, expected):
    outcome = run("corpus", *words)
    assert outcome.status == 2
    *before, line = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not before
