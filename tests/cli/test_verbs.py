import json
import math
import shlex
import shutil

import pytest

import memorizing
from memorizing.cli.train import describe_resuming
from memorizing.config import load_config


def test_training_says_what_it_did_and_where(run, settings, tmp_path):
    outcome = run(
        "train", "tiny", "--run", tmp_path / "run", *settings, "--json", tmp_path / "a.json"
    )
    assert outcome.status == 0
    assert "trained after 3 steps, " in outcome.out
    assert f"run folder: {tmp_path / 'run'}" in outcome.out
    values = json.loads((tmp_path / "a.json").read_text())
    assert (values["steps"], values["interrupted"]) == (3, False)
    assert values["run_dir"] == str(tmp_path / "run")


def test_a_loaded_run_evaluates_to_what_training_measured(run, settings, tmp_path):
    trained, evaluated = tmp_path / "trained.json", tmp_path / "evaluated.json"
    words = ("--set", "training.evaluate_every=3", "--set", "training.evaluate_tokens=1000000")
    start = ("train", "tiny", "--run", tmp_path / "run", "--json", trained)
    assert run(*start, *settings, *words).status == 0
    words = ("--capacity", "128", "--json", evaluated)
    assert run("evaluate", tmp_path / "run", *words).status == 0
    perplexity = json.loads(evaluated.read_text())["perplexity"]["128"]
    measured = math.exp(json.loads(trained.read_text())["validation_nats"])
    assert perplexity == pytest.approx(measured, rel=1e-6)


def test_resuming_a_finished_run_with_more_steps_goes_on(run, settings, tmp_path):
    words = ("train", "tiny", "--run", tmp_path / "run", *settings)
    assert run(*words).status == 0
    outcome = run(*words, "--set", "training.steps=5", "--resume")
    assert outcome.status == 0
    assert "trained after 5 steps" in outcome.out


def test_the_command_that_is_shown_after_ctrl_c_resumes_the_run(run, trained, settings, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "a folder")
    command = shlex.split(describe_resuming("tiny", folder, settings[1::2]))
    outcome = run(*command[1:])
    assert outcome.status == 0
    assert "resumed from step-000003" in outcome.err
    assert "another setting" not in outcome.err


def test_overwriting_replaces_the_run(run, settings, tmp_path):
    words = ("train", "tiny", "--run", tmp_path / "run", *settings)
    assert run(*words).status == 0
    outcome = run(*words, "--set", "training.steps=1", "--overwrite")
    assert outcome.status == 0
    assert "trained after 1 steps" in outcome.out


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
    assert json.loads(path.read_text())["bits_per_byte"]["0"] is None
    assert "the first 41 of each" in outcome.out


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


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("recipes", "paper_200m"),
        ("corpora", "repositories:PATH"),
        ("indexes", "num_probes=32"),
        ("machine", memorizing.__version__),
        ("paper_8b", "6,573,691,968"),
    ],
)
def test_info_describes_what_there_is(run, what, expected, tmp_path):
    path = tmp_path / "info.json"
    outcome = run("info", what, "--json", path)
    assert outcome.status == 0
    assert expected in outcome.out
    assert json.loads(path.read_text())


def test_info_describes_a_recipe_file_whatever_its_ending(run, tmp_path):
    path = tmp_path / "mine.recipe"
    path.write_text(load_config("tiny").replace(["model.ffn_dim=67"]).to_toml())
    outcome = run("info", path)
    assert outcome.status == 0
    assert "67" in outcome.out


def test_info_describes_a_run(run, trained, tmp_path):
    path = tmp_path / "info.json"
    outcome = run("info", trained, "--json", path)
    assert outcome.status == 0
    values = json.loads(path.read_text())
    assert values["checkpoints"] == ["step-000002", "step-000003"]
    assert values["training"]["steps"] == 3
    assert "step-000002, step-000003" in outcome.out


def test_the_benchmark_compares_with_the_step_without_memory(run, tmp_path):
    path = tmp_path / "step.json"
    words = ("--recipe", "tiny", "--entries", "11,37", "--pairs", "2", "--json", path)
    outcome = run("benchmark", "step", *words)
    assert outcome.status == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["entries"] for row in rows] == [0, 11, 37]
    for row in rows:
        assert {"name", "entries", "seconds", "compared_with", "ratio", "added_s"} <= set(row)
    assert rows[0]["ratio"] == 1


def test_the_version_is_shown(run):
    assert run("--version") == (0, f"memorizing {memorizing.__version__}\n", "")


def test_no_word_at_all_shows_the_help(run):
    outcome = run()
    assert outcome.status == 0
    assert "Usage: memorizing" in outcome.out


def test_searching_says_every_ratio_that_it_writes(run, tmp_path):
    path, picture = tmp_path / "deep" / "search.json", tmp_path / "search.png"
    shape = ("--heads", "2", "--queries", "19", "--head-dim", "13", "--neighbors", "3")
    words = ("--entries", "53,97", "--pairs", "2", "--json", path, "--plot", picture)
    outcome = run("benchmark", "search", *shape, *words)
    assert outcome.status == 0
    values = json.loads(path.read_text())
    assert values["shape"] == {
        "num_heads": 2,
        "num_queries": 19,
        "head_dim": 13,
        "num_neighbors": 3,
    }
    assert {row["entries"] for row in values["rows"]} == {53, 97}
    for row in values["rows"]:
        assert {"name", "entries", "seconds", "compared_with", "ratio", "recall"} <= set(row)
        if row["compared_with"] == "product":
            assert f"{row['ratio']:.2f}" in outcome.out
        else:
            assert f"{1 / row['ratio']:.2f} times as fast as {row['compared_with']}" in outcome.out
    assert "random keys, 97 entries" in outcome.out
    assert f"threads: {values['threads']}" in outcome.out.replace("\n", " ")
    *lines, written = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert written == f"written: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_a_run_searches_for_is_recorded_and_then_searched(run, trained, texts, tmp_path):
    file, path = tmp_path / "deep" / "tiny.recorded", tmp_path / "search.json"
    outcome = run("benchmark", "record", trained, "--entries", "1013", "--out", file)
    assert outcome.status == 0
    assert "1,013 keys and 512 queries of 2 heads" in outcome.out
    assert "no document is long enough; read as one stream: 2 documents (epsilon" in outcome.out
    words = ("--corpus", f"files:{texts}", "--queries", "19", "--out", file)
    outcome = run("benchmark", "record", trained, "--entries", "131", *words)
    assert outcome.status == 0
    assert "read: epsilon.txt" in outcome.out
    words = ("--no-random", "--neighbors", "5", "--pairs", "1", "--json", path)
    outcome = run("benchmark", "search", "--recorded", file, "--entries", "131", *words)
    assert outcome.status == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(row["data"], row["entries"]) for row in rows} == {("recorded", 131)}
