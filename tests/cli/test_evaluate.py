import json
import math
import tomllib

import pytest


def test_evaluating_gives_a_line_per_memory_and_the_same_numbers_as_json(run, trained, tmp_path):
    path = tmp_path / "deep" / "result.json"
    outcome = run("evaluate", trained, "--capacity", "0,8,131", "--controls", "--json", path)
    assert outcome.status == 0
    values = json.loads(path.read_text())
    assert list(values["perplexity"]) == ["0", "8", "131", "off", "other_document", "shuffled"]
    for name, perplexity in values["perplexity"].items():
        assert f"{perplexity:.3f}" in outcome.out
        assert values["bits_per_byte"][name] > 0
    assert values["perplexity"]["off"] == values["perplexity"]["0"]
    assert values["use"] == "validation"
    assert {d["name"] for d in values["results"]["0"]["documents"]} == {"delta.txt", "epsilon.txt"}


def test_a_plot_is_a_png(run, trained, tmp_path):
    path = tmp_path / "pictures" / "perplexity.png"
    outcome = run("evaluate", trained, "--capacity", "0,8,131", "--plot", path)
    assert outcome.status == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_against_itself_differs_by_nothing(run, trained, tmp_path):
    path = tmp_path / "result.json"
    outcome = run("evaluate", trained, "--capacity", "128", "--against", trained, "--json", path)
    assert outcome.status == 0
    difference = json.loads(path.read_text())["differences"]["128"]
    assert difference["nats_per_token"] == 0
    assert "+0.0%" in outcome.out


def test_another_corpus_is_read_whole_or_in_part(run, trained, texts, tmp_path):
    path = tmp_path / "result.json"
    words = ("evaluate", trained, "--capacity", "0", "--corpus", f"files:{texts}", "--json", path)
    assert run(*words).status == 0
    assert len(json.loads(path.read_text())["results"]["0"]["documents"]) == 5
    outcome = run(*words, "--documents", "3", "--max-tokens", "41")
    assert outcome.status == 0
    result = json.loads(path.read_text())["results"]["0"]
    assert [document["tokens"] for document in result["documents"]] == [41] * 3
    bits = result["nats"] / math.log(2) / sum(d["bytes"] for d in result["documents"])
    assert json.loads(path.read_text())["bits_per_byte"]["0"] == pytest.approx(bits)
    assert "the first 41 of each" in outcome.out


def test_another_corpus_is_read_by_the_settings_of_the_run(run, trained, texts, tmp_path):
    path = tmp_path / "result.json"
    words = ("evaluate", trained, "--corpus", f"files:{texts}", "--json", path)
    assert run(*words).status == 0
    recipe = tomllib.loads((trained / "config.toml").read_text())["evaluation"]
    assert list(json.loads(path.read_text())["perplexity"]) == [
        str(n) for n in recipe["capacities"]
    ]
    # A checkpoint has no recipe.
    checkpoint = trained / "checkpoints" / "step-000003"
    assert run("evaluate", checkpoint, *words[2:]).status == 0
    assert "65536" in json.loads(path.read_text())["perplexity"]


def test_another_corpus_can_have_its_text_in_any_column(run, trained, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"{n} rows " * 17}) + "\n" for n in range(3)))
    words = ("evaluate", trained, "--capacity", "0", "--corpus", f"jsonl:{path}")
    assert run(*words).status == 2
    assert run(*words, "--text-column", "body").status == 0


def test_a_checkpoint_can_be_evaluated_on_a_corpus(run, trained, texts):
    checkpoint = trained / "checkpoints" / "step-000003"
    assert run("evaluate", checkpoint, "--corpus", f"files:{texts}", "--capacity", "0").status == 0


def test_evaluation_does_not_depend_on_the_rows(run, trained, tmp_path):
    values = []
    for rows in (1, 2):
        path = tmp_path / f"{rows}.json"
        words = ("--capacity", "131", "--rows", rows, "--json", path)
        assert run("evaluate", trained, *words).status == 0
        values.append(json.loads(path.read_text())["perplexity"]["131"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_run_can_be_evaluated_with_another_index(run, trained, tmp_path):
    perplexity = {}
    for index in ("exact", "int8", "buckets:num_buckets=8"):
        path = tmp_path / f"{index[:4]}.json"
        words = ("--capacity", "131", "--index", index, "--json", path)
        assert run("evaluate", trained, *words).status == 0
        values = json.loads(path.read_text())
        assert values["index"] == index
        perplexity[index] = values["perplexity"]["131"]
    assert perplexity["int8"] == pytest.approx(perplexity["exact"], rel=1e-3)
    # Eight survivors of eight buckets are far from the eight nearest.
    assert perplexity["buckets:num_buckets=8"] != pytest.approx(perplexity["exact"], rel=1e-5)


def test_evaluating_measures_the_controls_that_the_recipe_names(run, trained, settings, tmp_path):
    path = tmp_path / "result.json"
    words = ("--capacity", "131", "--json", path)

    def list_results(folder, *more) -> list[str]:
        outcome = run("evaluate", folder, *words, *more)
        assert outcome.status == 0, outcome.err
        return list(json.loads(path.read_text())["perplexity"])

    assert list_results(trained) == ["131"]
    assert list_results(trained, "--controls") == ["131", "off", "other_document", "shuffled"]
    folder = tmp_path / "run"
    named = ("--set", "evaluation.controls=other_document,shuffled", "--set", "training.steps=1")
    assert run("train", "tiny", "--run", folder, *settings, *named).status == 0
    assert list_results(folder) == ["131", "other_document", "shuffled"]
    assert list_results(folder, "--controls") == ["131", "other_document", "shuffled"]
    assert list_results(folder, "--no-controls") == ["131"]
    assert list_results(folder, "--documents", "1") == ["131", "shuffled"]
    assert list_results(folder, "--capacity", "0") == ["0"]


PASSAGES = ("--set", "read=passages", "--set", "num_passages=2", "--set", "passage_len=11")
MODEL = ("--layers", "1", "--window", "17", "--documents", "2", "--max-tokens", "61")


def test_what_is_checked_before_a_model_is_loaded_has_the_defaults_of_add_memory(
    run, llama, texts, tmp_path
):
    path = tmp_path / "result.json"
    words = ("--corpus", f"files:{texts}", *MODEL, "--set", "keep=entries", "--json", path)
    outcome = run("evaluate", llama, *words)
    assert outcome.status == 0, outcome.err
    settings = json.loads(path.read_text())["settings"]
    assert (settings["read"], settings["keep"]) == ("passages", "entries")


def test_a_model_of_transformers_is_measured_beside_its_window_and_its_rival(
    run, llama, texts, tmp_path
):
    pytest.importorskip("bm25s")
    path = tmp_path / "result.json"
    words = ("--corpus", f"files:{texts}", *MODEL, *PASSAGES, "--set", "segment_len=17")
    rival = ("--retrieval", "bm25", "--stride", "9")
    outcome = run("evaluate", llama, *words, "--controls", *rival, "--json", path)
    assert outcome.status == 0, outcome.err
    values = json.loads(path.read_text())
    names = ["0", "65536", "off", "other_document", "shuffled"]
    assert list(values["perplexity"]) == names
    perplexity = values["perplexity"]
    assert len(set(perplexity.values())) == len(names) - 1
    assert perplexity["off"] == perplexity["0"]
    for value in (*perplexity.values(), values["rival"]["perplexity"]):
        assert f"{value:.3f}" in outcome.out
    assert values["settings"]["read"] == "passages"
    assert values["retrieval"] == {"by": "bm25", "stride": 9, "query_len": 32}
    assert "BM25, stride 9" in outcome.out
    assert [one["tokens"] for one in values["rival"]["documents"]] == [61, 61]


def test_a_model_reads_a_memory_that_was_kept(run, llama, notes, memory, tmp_path):
    path = tmp_path / "result.json"
    words = ("--corpus", f"files:{notes}", "--memory", memory, "--json", path)
    outcome = run("evaluate", llama, *words)
    assert outcome.status == 0, outcome.err
    values = json.loads(path.read_text())
    assert values["memory"] == str(memory)
    assert values["settings"]["window"] == 17
    assert values["perplexity"]["0"] != values["perplexity"]["65536"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "say what it reads: --corpus"),
        (("--corpus", "files:x", "--use", "test"), "--use is given, and "),
        (("--corpus", "files:x", "--rows", "2"), "--rows is given, and "),
        (("--corpus", "files:x", "--stride", "2"), "add --retrieval bm25"),
        (("--corpus", "files:x", "--memory", "m", "--window", "9"), "window of the memory are"),
        (("--corpus", "files:x", "--set", "reed=passages"), "reed"),
        (("--corpus", "files:x", "--set", "read=text"), "memory.read"),
        (("--corpus", "files:nothing-there"), "nothing-there"),
        (("--corpus", "files:x", "--memory", "nothing-there"), "nothing-there"),
    ],
)
def test_what_a_model_cannot_be_asked_says_what_to_do(refuse, llama, words, says):
    assert says in refuse("evaluate", llama, *words)


def test_options_of_a_model_are_refused_for_a_run(refuse, trained):
    for words in (("--memory", "m"), ("--layers", "1"), ("--retrieval", "bm25")):
        assert f"{words[0]} is given, and" in refuse("evaluate", trained, *words)


def test_the_controls_of_one_document_say_what_is_missing(refuse, llama, texts):
    words = ("--corpus", f"files:{texts}", "--documents", "1", "--controls")
    assert "needs two documents" in refuse("evaluate", llama, *words)
