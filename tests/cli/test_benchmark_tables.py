"""`memorizing benchmark step`, `decode` and `read`: what they print and write."""

import json

import pytest

from memorizing.cli.benchmark.tables import print_steps


@pytest.fixture
def measure(run, tmp_path):
    """Run a benchmark of the tiny recipe; gives what it printed and what it wrote."""

    def run_benchmark(*words):
        path = tmp_path / "result.json"
        outcome = run("benchmark", *words, "--recipe", "tiny", "--pairs", "2", "--json", path)
        assert outcome.status == 0, outcome.err
        # The last words of every table: on what it was measured.
        for word in (" thread", "torch", "commit", "medians of 2 pairs"):
            assert word in " ".join(outcome.out.split())
        assert max(map(len, outcome.out.splitlines())) <= 80
        return outcome.out, json.loads(path.read_text())

    return run_benchmark


def test_a_step_is_shown_with_its_products_and_its_limit(measure):
    printed, result = measure("step", "--entries", "11,37")
    assert [row["entries"] for row in result["rows"]] == [0, 11, 37]
    assert all(row["product_s"] > 0 for row in result["rows"][1:])
    assert result["limit"]["share_of_limit"] > 0
    assert "no memory" in printed
    assert "limit" in printed
    assert "peak" not in printed


def test_peaks_have_a_column_where_they_were_measured(measure, capsys):
    _, result = measure("step", "--entries", "262144")
    result["rows"][0]["beyond_entries_mib"] = 0.0
    result["rows"][1]["beyond_entries_mib"] = 1234.4
    print_steps(result)
    printed = capsys.readouterr().out
    assert "+1,234" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_decoded_token_is_shown_with_the_recall_of_its_search(measure):
    printed, result = measure("decode", "--entries", "37")
    assert [row["name"] for row in result["rows"]] == ["no_memory", "memory", "search"]
    assert f"{result['rows'][1]['recall']:.3f}" in printed


def test_reading_is_shown_in_tokens_a_second(measure):
    printed, result = measure("read", "--entries", "11,37")
    assert len(result["rows"]) == 5
    assert "tokens/s" in printed


@pytest.mark.parametrize("verb", ["step", "decode", "read"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--entries", "3"), "at least num_neighbors = 8"),
        (("--index", "exactly"), "did you mean 'exact'?"),
        (("--recipe", "tinny"), "did you mean 'tiny'?"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_one_line(run, verb, words, expected):
    outcome = run("benchmark", verb, "--recipe", "tiny", *words)
    assert outcome.status == 2
    assert expected in outcome.err


def test_a_recording_that_does_not_exist_is_named(run):
    outcome = run("benchmark", "decode", "--recipe", "tiny", "--recorded", "missing.recorded")
    assert outcome.status == 2
    assert "missing.recorded" in outcome.err
