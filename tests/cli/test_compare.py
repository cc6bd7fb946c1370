"""`compare`: runs on one page, with the numbers of `evaluate`, and charts for papers."""

import json
import re
import shutil


def test_runs_are_compared_with_the_numbers_of_evaluate(run, trained, tmp_path):
    other = tmp_path / "<b>$x_1$</b>"
    shutil.copytree(trained, other)
    page, result = tmp_path / "out" / "runs.html", tmp_path / "result.json"
    outcome = run("compare", trained, other, "--capacity", "0,16,128", "--out", page)
    assert outcome.status == 0, outcome.err
    assert run("evaluate", trained, "--capacity", "0,16,128", "--json", result).status == 0
    text = page.read_text()
    values = [float(value) for value in re.findall(r'<data value="([^"]+)"', text)]
    expected = list(json.loads(result.read_text())["perplexity"].values())
    assert values[:3] == expected[:3]
    assert values[3:] == values[:3]
    assert "<b>" not in text
    names = {path.name for path in page.parent.iterdir()}
    for chart in ("train", "size", "position"):
        assert {f"runs_{chart}.svg", f"runs_{chart}.png"} <= names
        assert (page.parent / f"runs_{chart}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("<svg") >= 3


def test_what_cannot_be_compared_is_said_in_a_line(refuse, trained, tmp_path):
    page = tmp_path / "page.html"
    assert "give two or more" in refuse("compare", trained, "--out", page)
    assert ".html file" in refuse("compare", trained, trained, "--out", tmp_path / "page.png")
    assert "nowhere" in refuse("compare", trained, tmp_path / "nowhere", "--out", page)
    assert not page.exists()


def test_runs_that_read_other_texts_or_other_parts_are_not_compared(
    run, refuse, trained, texts, tmp_path
):
    """Texts of the same names, and settings that cut them."""
    page, others = tmp_path / "page.html", tmp_path / "others"
    shutil.copytree(texts, others)
    (others / "delta.txt").write_text((texts / "delta.txt").read_text().swapcase())
    edits = {
        "texts": (str(texts), str(others)),
        "parts": ("max_tokens_per_document = 0", "max_tokens_per_document = 101"),
    }
    for name, (old, new) in edits.items():
        shutil.copytree(trained, tmp_path / name)
        config = tmp_path / name / "config.toml"
        assert config.read_text().count(old) == 1
        config.write_text(config.read_text().replace(old, new))
    assert "on different documents" in refuse("compare", trained, tmp_path / "texts", "--out", page)
    words = ("compare", trained, tmp_path / "parts", "--out", page)
    assert "0 and 101 tokens" in refuse(*words)
    assert not page.exists()
    assert run(*words, "--max-tokens", "97").status == 0
    assert "the first 97 tokens of each." in page.read_text()
