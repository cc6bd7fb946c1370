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


def test_the_splits_of_a_recipe_are_those_that_training_says(run, texts, tmp_path):
    from memorizing.config import DataConfig
    from memorizing.data import load_splits

    recipe, path = tmp_path / "mine.toml", tmp_path / "s.json"
    recipe.write_text(
        f'[data]\ncorpus = "files:{texts}"\nvalidation = ["alpha*"]\ntest = ["beta*", "gamma*"]\n'
        'exclude = ["*eps*"]\n'
    )
    said = load_splits(
        DataConfig(
            corpus=f"files:{texts}",
            validation=("alpha*",),
            test=("beta*", "gamma*"),
            exclude=("*eps*",),
        )
    ).describe()
    outcome = run("corpus", recipe, "--documents", "2", "--json", path)
    assert outcome.status == 0
    assert set(said[1:4]) <= set(outcome.out.splitlines())
    assert "excluded: 1 documents, 0.0 MB (epsilon.txt)" in outcome.out
    assert "the first 2 documents\n" in outcome.out
    assert "gamma.txt" not in outcome.out.partition("the first")[0]
    words = ("--stats", "--set", "tokenizer.vocab_size=307", "--json", path)
    outcome = run("corpus", recipe, *words)
    assert outcome.status == 0
    values = json.loads(path.read_text())
    sizes = {split["use"]: split for split in values["splits"]}
    assert {use: size["num_documents"] for use, size in sizes.items()} == {
        "train": 1,
        "validation": 1,
        "test": 2,
        "excluded": 1,
    }
    for count in ("num_tokens", "num_bytes"):
        assert sum(size[count] for size in sizes.values()) == values[count]
    tokens = sizes["test"]["num_tokens"]
    assert f"test: 2 documents, 0.0 MB, {tokens:,} tokens (beta.txt, gamma.txt)" in outcome.out


def test_a_share_that_is_held_out_is_shown_after_folders_were_joined(run, tmp_path):
    from memorizing.config import DataConfig
    from memorizing.data import load_splits

    for number in range(13):
        (tmp_path / f"f{number}").mkdir()
        (tmp_path / f"f{number}" / "a.txt").write_text(f"body {number}\n")
    corpus = f"repositories:{tmp_path}"
    config = DataConfig(corpus=corpus, folders_per_document=3, held_out_share=0.5)
    words = ("--set", "data.folders_per_document=3", "--set", "data.held_out_share=0.5")
    outcome = run("corpus", corpus, *words)
    assert set(load_splits(config).describe()[1:4]) <= set(outcome.out.splitlines())


def test_a_pattern_that_holds_out_nothing_is_named(run, texts):
    outcome = run("corpus", f"files:{texts}", "--set", "data.exclude=alpa.txt")
    assert outcome.status == 2
    assert "data.exclude names 'alpa.txt', which no document matches" in outcome.err


def test_a_recipe_for_another_folder_says_where_its_corpus_is_looked_for(
    run, tmp_path, monkeypatch
):
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for where in ("corpora/proofs/*.txt", "corpora/books", "there/books/*.txt"):
        recipe = tmp_path / "mine.toml"
        recipe.write_text(f'[data]\ncorpus = "files:{where}"\n')
        outcome = run("corpus", recipe)
        assert outcome.status == 2
        assert repr(where) in outcome.err
        missing = "there/books" if where.startswith("there") else "corpora"
        assert (
            f"relative to the working directory '.', where there is no '{missing}'" in outcome.err
        )
    assert f"there is no '{tmp_path / 'x'}'" in run("corpus", f"files:{tmp_path}/x/*/y").err
    assert "the folder 'there' is there" in run("corpus", "files:there/*.txt").err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("smal",), "or give a recipe: a file that ends in .toml, or a name (did you mean 'small'"),
        (("tinny:x",), "or give a recipe: a file that ends in .toml, or a name (did you mean"),
        (("github:hub",), "names no dataset of the hub; write hub:OWNER/NAME"),
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


def test_names_that_are_not_utf8_are_printed_and_written(run, tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    for name in ("d\udcff.txt", "new\nline.txt", "plain.txt"):
        (folder / name).write_text("some text\n" * 31)
    (folder / "b\udcfe.bin").write_bytes(b"\0")
    path = tmp_path / "list.json"
    outcome = run("corpus", f"files:{folder}", "--json", path)
    assert outcome.status == 0
    values = json.loads(path.read_text(encoding="utf-8"))
    assert [d["name"] for d in values["documents"]][0] == "d\\udcff.txt"
    assert values["skipped"] == ["b\\udcfe.bin: binary"]
    words = ("--stats", "--set", "tokenizer.vocab_size=307", "--json", path)
    assert run("corpus", f"files:{folder}", *words).status == 0
    assert run("corpus", f"files:{folder}/nothing\udcff").status == 2
