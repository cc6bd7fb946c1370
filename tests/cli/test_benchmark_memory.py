"""`memorizing benchmark recall` and `completion`, with a tiny model of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.faults.tiny import save_llama
from memorizing.benchmark.memory_use import asking, running
from tests.benchmark.memory_use.tools import interrupt_at

MEMORY = ("--layers", "1", "--window", "61", "--precision", "fp32")
MEMORY += ("--set", "num_passages=2", "--set", "passage_len=16", "--set", "segment_len=61")
RECALL = ("--prompts", "4", "--prompt-len", "23", "--answer-len", "5", *MEMORY)
ARMS = ["nothing", "entries", "passages", "passages-1", "passages-entries"]
ARMS += ["bm25", "bm25-1", "bm25-entries", "whole"]
USUAL = [name for name in ARMS if not name.endswith("-entries")]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama", max_positions=251)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Two packages."""
    root = tmp_path_factory.mktemp("packages")
    for number, name in enumerate(("one", "two")):
        (root / name).mkdir()
        (root / name / "home.py").write_text("def area(width, height):\n    return width\n")
        calls = "".join(f"    area(width, {n + number})\n" for n in range(3))
        (root / name / "use.py").write_text(f"from .home import area\n\ndef use(width):\n{calls}")
        (root / name / "notes.md").write_text("area(1)\n")
    return root


@pytest.fixture(autouse=True)
def _time_little(monkeypatch):
    monkeypatch.setattr(asking, "_TIMED_TOKENS", 2)


def test_quotes_are_measured_in_every_arm_and_shown(run, reader, texts, tmp_path):
    path = tmp_path / "recall.json"
    words = ("--arms", ",".join(ARMS), "--json", path)
    outcome = run("benchmark", "recall", reader, texts, *RECALL, *words)
    assert outcome.status == 0, outcome.err
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["arms"]] == ARMS
    assert len(result["places"]) == 4
    for place in result["places"]:
        text = (texts / place["document"]).read_text()
        assert place["prompt"] + place["answer"] in text
        assert set(place["arms"]) == set(ARMS)
    given = {row["name"]: row["tokens_given"] for row in result["arms"]}
    assert given["passages"] == given["bm25"] == 3 * 16
    assert given["bm25-1"] == 2 * 16
    assert (given["nothing"], given["entries"]) == (0, 0)
    # Texts repeat themselves word by word: the place of a prompt is found by its words.
    by_name = {row["name"]: row for row in result["arms"]}
    assert by_name["bm25"]["found"]["among"]["8"] > 0
    assert by_name["nothing"]["found"] is None
    assert by_name["passages"]["bytes"] > by_name["bm25"]["bytes"] > 0
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in outcome.out  # nothing is cut off
    said = " ".join(outcome.out.split())
    for words in (
        "4 prompts of 23 tokens, the next 5 asked for",
        "right of 5",
        "the same less that of memory: passages",
        "passages: 2 of 16 tokens at most, found by layers 1",
        "what it costs",
    ):
        assert words in said
    assert any(line.lstrip().startswith("BM25, pasted") for line in lines)


def test_what_is_asked_for_decides_nothing_about_the_other_arms(run, reader, texts, tmp_path):
    found = []
    for arms in ("nothing,bm25", "bm25"):
        path = tmp_path / "recall.json"
        words = ("--arms", arms, "--json", path)
        assert run("benchmark", "recall", reader, texts, *RECALL, *words).status == 0
        found.append(json.loads(path.read_text())["places"])
    for place, again in zip(*found, strict=True):
        assert list(place["arms"]) == ["nothing", "bm25"]
        for key in ("num_right", "nats", "rank", "score", "num_given"):
            assert place["arms"]["bm25"][key] == again["arms"]["bm25"][key]


def test_a_file_that_is_not_in_memory_is_found_nowhere(run, reader, texts, tmp_path):
    path = tmp_path / "recall.json"
    words = ("--absent", "--rename", "--arms", "passages,bm25,whole", "--json", path)
    outcome = run("benchmark", "recall", reader, texts, *RECALL, *words)
    assert outcome.status == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "; names in the prompts changed; the file of a prompt not in memory" in said
    result = json.loads(path.read_text())
    for row in result["arms"][:2]:
        assert row["found"]["among"]["8"] == row["found"]["in_sight"] == 0
    assert result["arms"][2]["tokens_given"] == 0
    assert {place["arms"]["passages"]["rank"] for place in result["places"]} == {0}


def test_calls_are_completed_without_their_own_file(run, reader, python, tmp_path):
    path = tmp_path / "completion.json"
    folders = [python / "one", python / "two"]
    words = ("--places", "2", "--prompt-len", "37", *MEMORY, "--json", path)
    outcome = run("benchmark", "completion", reader, *folders, *words)
    assert outcome.status == 0, outcome.err
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["arms"]] == USUAL
    assert [package["documents"] for package in result["packages"]] == [2, 2]
    assert (result["drawn"], result["num_drawn"]) == ("packages", 2)
    for place in result["places"]:
        assert place["document"] == "use.py"
        assert place["prompt"].endswith("    area(")
        assert place["answer"].startswith("width, ")
        assert place["answer"].endswith(")")
        assert all(isinstance(arm["written"], str) for arm in place["arms"].values())
    home = len((python / "one" / "home.py").read_bytes())
    assert {row["name"]: row["tokens_given"] for row in result["arms"]}["whole"] == home
    said = " ".join(outcome.out.split())
    assert "2 packages of 4 files" in said
    assert "an embedder is left out: none was given with --embedder" in said
    assert "2 calls to complete, after up to 37 tokens of their file" in said
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in outcome.out


def test_an_interrupt_shows_what_is_there(run, reader, texts, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 6)
    path = tmp_path / "recall.json"
    words = ("--arms", "nothing,passages,bm25", "--json", path)
    outcome = run("benchmark", "recall", reader, texts, *RECALL, *words)
    assert outcome.status == 130
    assert "interrupted; the tables show what was asked until then" in outcome.err
    said = " ".join(outcome.out.split())
    assert "interrupted: memory: passages has 1 of 4 prompts" in said
    result = json.loads(path.read_text())
    assert result["interrupted"]
    assert [row["num_places"] for row in result["arms"]] == [4, 1]


def test_what_was_interrupted_goes_on_and_takes_other_arms(
    run, refuse, reader, texts, tmp_path, monkeypatch
):
    path, whole = tmp_path / "recall.json", tmp_path / "whole.json"
    command = ("benchmark", "recall", reader, texts, *RECALL)
    assert run(*command, "--arms", "nothing,passages,bm25", "--json", whole).status == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        words = ("--arms", "nothing,passages", "--json", path, "--resume")  # nothing is there yet
        assert run(*command, *words).status == 130
    asked = []
    monkeypatch.setattr(
        running,
        "ask",
        lambda *words, **named: asked.append(words[1]) or asking.ask(*words, **named),
    )
    outcome = run(*command, "--arms", "passages,bm25", "--json", path, "--resume")
    assert outcome.status == 0, outcome.err
    assert asked == [1, 2, 3, 0, 1, 2, 3]
    found, wanted = (json.loads(one.read_text()) for one in (path, whole))
    assert found["stored"] == wanted["stored"]
    assert not found["interrupted"]
    for row, other in zip(found["arms"], wanted["arms"], strict=True):
        for key in ("name", "num_places", "quality", "minus_passages", "found", "bytes"):
            assert row[key] == other[key]
    content = path.read_text()
    said = refuse(*command, "--arms", "bm25", "--json", path, "--resume", "--seed", "3")
    assert "seed was 0, and is 3 now" in said
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"num_right": ', '"num_right": "x", "other": ', "what was asked before is damaged"),
        ('"nats": ', '"nats": "x", "other": ', "what was asked before is damaged"),
        ('"prompt": "', '"prompt": "!', "place 0 was in "),
        ('"stored"', '"other"', "what was asked before is damaged"),
        ('"nothing": {', '"__class__": {', "what was asked before is damaged"),
        ('"places": [', '"places": [1, ', "what was asked before is damaged"),
        ('"verb"', '"verbs"', "verb was None, and is 'recall' now"),
        ("{", "[", "cannot be read, or is truncated or altered"),
    ],
)
def test_what_others_wrote_is_not_gone_on_with(
    run, refuse, reader, texts, tmp_path, old, new, expected
):
    path = tmp_path / "recall.json"
    command = ("benchmark", "recall", reader, texts, *RECALL, "--arms", "nothing", "--json", path)
    assert run(*command).status == 0
    content = path.read_text().replace(old, new)
    path.write_text(content)
    assert expected in refuse(*command, "--resume")
    assert path.read_text() == content


def test_an_interrupt_before_the_first_answer_says_so(run, reader, texts, monkeypatch):
    def interrupt(*words, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "ask", interrupt)
    outcome = run("benchmark", "recall", reader, texts, *RECALL, "--arms", "nothing")
    assert outcome.status == 130
    assert "nothing to show" in outcome.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--arms", "passage"), "unknown arm 'passage'; did you mean 'passages'?"),
        (("--arms", "embedder"), "add --embedder"),
        (("--heads", "1"), "--heads is '1'; write a layer and its heads"),
        (("--calibrate", "src"), "--calibrate finds layers and heads; leave out --layers"),
        (("--heads", "1:7"), "7"),
        (("--set", "read=entries"), "--set has read, and every way is measured here"),
        (("--set", "passage_length=3"), "did you mean 'passage_len'?"),
        (("--answer-len", "9000"), "need a file of 9223 tokens"),
        (("--set", "passage_len=200"), "601 positions for passages"),
        (("--prompt-len", "200"), "the model reads 251; ask for shorter prompts"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(refuse, reader, texts, words, expected):
    assert expected in refuse("benchmark", "recall", reader, texts, *RECALL, *words)


def test_files_that_are_none_are_refused(refuse, reader, python, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\0\1")
    said = refuse("benchmark", "recall", reader, tmp_path, *MEMORY)
    assert "there is no text in" in said
    assert "missing" in refuse("benchmark", "recall", reader, tmp_path / "missing", *MEMORY)
    said = refuse("benchmark", "completion", reader, python / "one" / "home.py", *MEMORY)
    assert "is no folder; a package is a folder of Python files" in said
    said = refuse("benchmark", "completion", reader, python / "one", "--exclude", "use.py")
    assert "has 1 Python files" in said


def test_what_was_learned_for_passages_is_measured(run, refuse, reader, texts, tmp_path):
    corpus = ("--corpus", f"files:{texts}", "--steps", "3", "--rate", "0.1", "--lora-rank", "3")
    finetune = ("finetune", reader, *corpus, "--layers", "1", "--window", "61")
    finetune += ("--precision", "fp32", "--set", "memory.passage_len=16")
    for read in ("passages", "entries"):
        assert run(*finetune, "--read", read, "--out", tmp_path / read).status == 0
    path, command = tmp_path / "recall.json", ("benchmark", "recall", reader, texts, *RECALL)
    command += ("--arms", "nothing,passages", "--json", path)
    found = []
    for words in ((), ("--adapter", tmp_path / "passages" / "adapter")):
        assert run(*command, *words).status == 0
        result = json.loads(path.read_text())
        found.append([[one["nats"] for one in each["arms"].values()] for each in result["places"]])
    assert result["adapter"] == str(tmp_path / "passages" / "adapter")
    assert all(mine != theirs for mine, theirs in zip(*found, strict=True))
    assert "adapter was" in refuse(*command, "--resume")
    entries = tmp_path / "entries" / "adapter"
    assert "--read passages" in refuse(*command, "--adapter", entries)
