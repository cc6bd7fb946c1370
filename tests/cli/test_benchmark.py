"""`memorizing benchmark`: what its verbs write is what they say."""

import json


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
