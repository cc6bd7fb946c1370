"""`memorizing demo`: what it refuses before any work; `tests/demo` runs it."""

import pytest


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--seed", "-1"), "--seed"),
        (("--steps-factor", "0"), "--steps-factor is 0.0; allowed: above 0"),
        (("--steps-factor", "1000"), "--steps-factor is 1000.0; allowed: above 0 and below 1,000"),
        (("--steps-factor", "nan"), "--steps-factor is nan"),
        (("--steps-factor", "many"), "--steps-factor"),
    ],
)
def test_a_number_that_cannot_be_is_refused(words, expected, refuse, tmp_path):
    assert expected in refuse("demo", "--run", tmp_path / "demo", *words)
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_another_origin_is_left_as_it_is(refuse, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    line = refuse("demo", "--run", tmp_path)
    assert "not made by a demo" in line
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_for_the_result_that_cannot_be_written_is_said_before_the_work(refuse, tmp_path):
    line = refuse("demo", "--run", tmp_path / "demo", "--json", tmp_path)
    assert "is a folder" in line
    assert not (tmp_path / "demo").exists()
