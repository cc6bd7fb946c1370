"""What the verbs share: settings as words, and files that are written."""

import sys

import pytest

from memorizing.cli.options import parse_heads, parse_settings
from memorizing.errors import ConfigError


def test_settings_are_those_of_one_of_the_tables():
    tables = ("memory", "finetune", "data")
    settings = ["memory.combine=gate", "finetune.clip_norm=0", "data.seed=3"]
    assert parse_settings(settings, "TABLE.KEY=VALUE", tables) == {
        "memory.combine": "gate",
        "finetune.clip_norm": 0,
        "data.seed": 3,
    }
    with pytest.raises(ConfigError, match=r"'model\.layers=3'; write TABLE\.KEY=VALUE"):
        parse_settings(["model.layers=3"], "TABLE.KEY=VALUE", tables)


def test_heads_are_given_per_layer():
    assert parse_heads(None) is None
    assert parse_heads([]) is None
    assert parse_heads(["18:6,7", " 3 : 0"]) == {18: [6, 7], 3: [0]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("18", "--heads is '18'; write a layer and its heads, such as 18:6,7"),
        (":6", "write a layer"),
        ("-1:6", "write a layer"),
        ("\N{SUPERSCRIPT TWO}:6", "write a layer"),
        ("18:", "--heads is ''; allowed: whole numbers"),
        ("18:6,x", "--heads is '6,x'; allowed"),
        ("18:6:7", "--heads is '6:7'; allowed"),
        ("18:-1", "--heads is '-1'; allowed"),
    ],
)
def test_what_is_no_layer_with_heads_is_refused(given, said):
    with pytest.raises(ConfigError) as refused:
        parse_heads([given])
    assert said in str(refused.value)
    with pytest.raises(ConfigError, match="layer 2 twice"):
        parse_heads(["2:0", "02:1"])


def test_a_place_for_json_that_cannot_be_written_is_said_before_the_work(refuse, trained, tmp_path):
    (tmp_path / "file").write_text("")
    line = refuse("evaluate", trained, "--json", tmp_path / "file" / "result.json")
    assert "result.json': Not a directory" in line
    assert "is a folder" in refuse("evaluate", trained, "--json", tmp_path)


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    refuse, trained, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refuse("evaluate", trained, "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json")
    assert 'pip install "memorizing[plots]"' in line
    assert not (tmp_path / "a.json").exists()


ROUND = "Too many levels of symbolic links"


@pytest.mark.parametrize(
    "words",
    [
        ("info", "recipes"),
        ("memory", "list", "M"),
        ("memory", "info", "M"),
        ("memory", "verify", "M"),
        ("memory", "forget", "M", "alpha.txt"),
        ("memory", "merge", "M", "--out", "merged.memory"),
        ("corpus", "files:C"),
        ("train", "tiny", "--run", "run"),
        ("finetune", "L", "--corpus", "files:C", "--out", "run"),
        ("read", "L", "C", "--memory", "new.memory"),
        ("generate", "L", "--prompt", "x"),
        ("benchmark", "search"),
        ("benchmark", "step"),
        ("benchmark", "decode"),
        ("benchmark", "read"),
        ("demo", "--run", "demo"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_verb_refuses_a_place_for_json_before_it_prints_or_changes_anything(
    run, words, memory, llama, notes, tmp_path, monkeypatch
):
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "loop" / "result.json")
    places = {"M": memory, "L": llama, "C": notes, "files:C": f"files:{notes}"}
    before = (memory / "manifest.json").read_bytes()
    for place in ("loop", "link", "loop/result.json"):
        outcome = run(*(places.get(word, word) for word in words), "--json", tmp_path / place)
        assert (outcome.status, outcome.out) == (2, "")
        assert ROUND in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert (memory / "manifest.json").read_bytes() == before
    assert not list((tmp_path / "away").iterdir())
