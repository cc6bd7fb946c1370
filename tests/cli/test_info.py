"""`memorizing info`."""

import json

import pytest

import memorizing
from memorizing.cli.info import print_values
from memorizing.config import load_config


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


def test_lists_of_all_kinds_are_printed(capsys):
    values = {"tables": [{"a": 1}, {"a": 2}], "mixed": [{"a": 1}, "x", None], "none": [], "n": 1234}
    print_values(values)
    assert capsys.readouterr().out.splitlines() == [
        "tables 1 of 2",
        "  a  1",
        "tables 2 of 2",
        "  a  2",
        "mixed   {'a': 1}, x, -",
        "none    -",
        "n       1,234",
    ]
