"""`inspect`: its page in a real browser, with the numbers of `evaluate`, for any text."""

import json
import shutil
import sys
from inspect import signature
from pathlib import Path

import pytest

from memorizing.cli import evaluate
from memorizing.cli import inspect as cli

CHROMIUM = shutil.which("chromium")
HOSTILE = (
    "<b>bold</b></script><script>window.hacked = 1</script> &amp; <!-- --> {{ 7 * 7 }} {% raw %}\n"
    "<img src=x onerror='window.hacked = 2'> ' \" ` \\u003c \N{GRINNING FACE} \N{WOMAN}\u200d"
    "\N{GIRL} e\u0301 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd\n"
    "\u202eevil\u202c \x1b[31m \x07 \x7f \u2028 tab\there\r\n" + "a" * 1201 + "\n"
)


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, through playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a page from disk; in the end nothing may have been said on its console."""
    said, pages = [], []

    def open_page(path: Path, **options):
        page = browser.new_page(**options)
        page.set_default_timeout(120_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: said.append(request.url) if "file:" not in request.url else None,
        )
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


@pytest.fixture(scope="module")
def python_text(tmp_path_factory) -> Path:
    """Functions that are defined and called, and words that come again."""
    path = tmp_path_factory.mktemp("python") / "module.py"
    lines = (
        f"def make_{word}(first, second):\n    return first + {number}\n\n\nmake_{word}(2, 3)\n"
        for number, word in enumerate(("alpha", "beta", "gamma", "alpha", "delta", "beta"))
    )
    path.write_text("".join(lines), encoding="utf-8")
    return path


SEEN = {
    "\r": "",
    "\x1b": "\u241b",
    "\x07": "\u2407",
    **{c: f"\u27e8U+{ord(c):04X}\u27e9" for c in "\x7f\u2028\u202e\u202c"},
}
"""What would steer the page, and what is shown instead."""


def inspect(run, tmp_path, *words):
    """The page, and the data beside it."""
    page = tmp_path / "out" / "report.html"
    outcome = run("inspect", *words, "--out", page)
    assert outcome.status == 0, outcome.err
    return page, json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


def test_the_numbers_of_the_page_are_those_of_evaluate(run, trained, python_text, tmp_path, visit):
    path, data = inspect(run, tmp_path, trained, "--text", python_text, "--capacity", "131")
    result = tmp_path / "result.json"
    words = ("--corpus", f"files:{python_text}", "--capacity", "0,131", "--max-tokens", "0")
    assert run("evaluate", trained, *words, "--json", result).status == 0
    evaluated = json.loads(result.read_text())
    page = visit(path)
    shown = float(page.locator("#perplexity").get_attribute("value"))
    assert shown == pytest.approx(evaluated["perplexity"]["131"], rel=1e-4)
    without = float(page.locator("#baseline-perplexity").get_attribute("value"))
    assert without == pytest.approx(evaluated["perplexity"]["0"], rel=1e-4)
    bits = float(page.locator("#bits").get_attribute("value"))
    assert bits == pytest.approx(evaluated["bits_per_byte"]["131"], rel=1e-4)
    sums = page.evaluate("[nats, baseline].map((part) => part.reduce((a, b) => a + b, 0))")
    totals = [evaluated["results"][name]["nats"] for name in ("131", "0")]
    assert sums == pytest.approx(totals, rel=1e-4)
    assert sum(data["tokens"]["nats"]) == pytest.approx(totals[0], rel=1e-4)
    assert "".join(data["tokens"]["text"]) == python_text.read_text()


def test_a_pretrained_model_reads_as_it_does_for_evaluate(run, llama, memory, notes, tmp_path):
    """Also without options: bf16 would change the third digit."""
    text, result = notes / "beta.txt", tmp_path / "result.json"
    words = ("--memory", memory)
    _, data = inspect(run, tmp_path, llama, "--text", text, *words)
    assert run("evaluate", llama, "--corpus", f"files:{text}", *words, "--json", result).status == 0
    expected = list(json.loads(result.read_text())["perplexity"].values())
    assert [data["baseline_perplexity"], data["perplexity"]] == pytest.approx(expected, rel=1e-4)
    defaults = {signature(one.run).parameters["precision"].default for one in (evaluate, cli)}
    assert defaults == {"fp32"}


def test_every_token_can_be_heard_and_read(run, trained, tmp_path, visit):
    text = tmp_path / "blanks.txt"
    text.write_bytes(b"def f():\r\n\treturn 1\n\n\n    x = 2 \xf0\x9f\x98\x80\n" * 3)
    path, _ = inspect(run, tmp_path, trained, "--text", text)
    for scheme in ("light", "dark"):
        page = visit(path, color_scheme=scheme)
        heard = page.evaluate(
            "tokens.map((e) => (e.getAttribute('aria-label') ?? e.textContent).trim())"
        )
        assert all(heard)
        spoken = page.evaluate("['\\n', '\\n\\n    ', '\\r\\n\\t', '', 'a\\n'].map(spoken)")
        assert spoken == [
            "line break",
            "2 line breaks, 4 spaces",
            "carriage return, line break, tab",
            "part of a character",
            "",
        ]
        # On the deepest shades.
        for gain in (9, -9):
            shade, card, ink = page.evaluate(
                f"""() => {{
                  color(tokens[0], {gain});
                  const read = (e, name) => getComputedStyle(e)[name].match(/[\\d.]+/g).map(Number);
                  return [read(tokens[0], "backgroundColor"), read(reader, "backgroundColor"),
                    read(reader, "color")];
                }}"""
            )
            *tone, deep = shade
            mixed = [deep * a + (1 - deep) * b for a, b in zip(tone, card, strict=True)]
            lights = sorted((measure_light(mixed), measure_light(ink)))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5


def measure_light(color):
    """Relative luminance (WCAG 2) of sRGB from 0 to 255."""
    parts = [c / 255 for c in color[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_words_of_a_table_are_whole_beside_a_long_name(run, trained, python_text, tmp_path, visit):
    path, _ = inspect(run, tmp_path, trained, "--text", python_text)
    page = visit(path, viewport={"width": 360, "height": 640})
    lines = page.evaluate(
        """() => {
          const table = document.querySelector("#where ~ .pair table");
          table.querySelector("tbody th").textContent = "long_name".repeat(30);
          const word = document.createRange();
          word.selectNodeContents(table.querySelectorAll("thead th")[1]);
          return [word.toString(), word.getClientRects().length];
        }"""
    )
    assert lines == ["tokens", 1]
    # No two elements are called alike.
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(set(ids)) == len(ids)


def test_a_click_shows_what_was_retrieved_and_a_link_leads_there(
    run, trained, python_text, tmp_path, visit
):
    path, data = inspect(run, tmp_path, trained, "--text", python_text)
    page = visit(path)
    token = len(data["tokens"]["nats"]) - 2
    page.locator(f"#t{token}").click()
    detail = page.locator("#detail")
    assert f"token {token}," in detail.inner_text()
    layer, head = data["retrieved"]["heads"][0]
    assert f"layer {layer}, head {head}" in detail.inner_text()
    places = {place for head in data["retrieved"]["places"][token] for place in head}
    framed = page.evaluate(
        "[...document.querySelectorAll('#text .hit')].map((e) => +e.id.slice(1))"
    )
    assert framed
    assert set(framed) <= places
    links = detail.locator("a").evaluate_all("all => all.map((a) => +a.hash.slice(7))")
    assert set(links) == set(framed)
    at = page.evaluate("scrollY")
    detail.locator("a").first.click()
    assert page.evaluate("now") == links[0]
    assert page.evaluate("scrollY") == at
    page.go_back()
    page.wait_for_function(f"now === {token}")


def test_the_keyboard_is_enough(run, trained, python_text, tmp_path, visit):
    page = visit(inspect(run, tmp_path, trained, "--text", python_text)[0])
    text = page.locator("#text")
    text.focus()
    for key, expected in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        text.press(key)
        assert page.evaluate("now") == expected
    assert text.get_attribute("aria-activedescendant") == "t1"
    assert page.locator("#t1").get_attribute("aria-selected") == "true"
    text.press("ArrowDown")
    assert page.evaluate("tokens[now].offsetTop > tokens[1].offsetTop")
    text.press("ArrowUp")
    assert page.evaluate("now") == 1
    text.press("End")
    assert page.evaluate("now === count - 1")
    text.press("Enter")
    assert page.evaluate("document.activeElement.hash.startsWith('#token-')")


def test_hostile_text_is_text(run, trained, tmp_path, visit):
    path = tmp_path / "<i onload=x>$a^b$ \N{PILE OF POO}.txt"
    path.write_bytes(HOSTILE.encode())
    size = {"width": 360, "height": 640}
    page = visit(
        inspect(run, tmp_path, trained, "--text", path)[0], color_scheme="dark", viewport=size
    )
    assert page.evaluate("window.hacked") is None
    shown = page.evaluate("tokens.map((e) => e.textContent).join('')")
    assert shown == "".join(SEEN.get(c, c) for c in HOSTILE)
    assert page.locator("#text img, #text b, #text script, h1 i").count() == 0
    assert path.name in page.locator("header").inner_text()
    for token in range(0, page.evaluate("count"), 101):
        page.evaluate(f"select({token}, false)")
    # Nothing is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_lines_may_end_in_any_of_three_ways(run, trained, tmp_path, visit):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"one\rtwo\r\nthree\nfour\r\r\nfive" * 3)
    page = visit(inspect(run, tmp_path, trained, "--text", path)[0])
    shown = page.evaluate("tokens.map((e) => e.textContent).join('')")
    assert shown == "one\ntwo\nthree\nfour\n\nfive" * 3
    assert page.evaluate("line(text, count)") == 1 + 3 * 5
    assert page.locator("#text").inner_text().splitlines()[:3] == ["one", "two", "three"]


def test_entries_of_a_memory_folder_are_shown_with_their_document(
    run, llama, memory, notes, tmp_path, visit
):
    text = tmp_path / "text.txt"
    text.write_text("alpha 3\nbeta 7\ngamma 11\nalpha 3\n")
    words = (llama, "--text", text, "--memory", memory, "--precision", "fp32")
    path, data = inspect(run, tmp_path, *words)
    assert {source["name"] for source in data["sources"]} >= {"text.txt", "alpha.txt"}
    page = visit(path)
    page.locator("#t20").click()
    shown = page.locator("#detail").inner_text()
    assert ".txt, line" in shown
    assert "from memory" in shown
    # What stands on the page is what stands in the document.
    stored = page.locator("#detail .stored").first.inner_text()
    assert stored.strip() == "" or any(stored.strip() in one.read_text() for one in notes.iterdir())


def test_passages_in_sight_are_shown_with_their_lines(run, llama, notes, tmp_path, visit):
    folder, text = tmp_path / "notes.passages", tmp_path / "text.txt"
    words = ("--layers", "1", "--window", "17", "--precision", "fp32", "--set", "read=passages")
    more = ("--set", "passage_len=16", "--set", "num_passages=2")
    assert run("read", llama, notes, "--memory", folder, *words, *more).status == 0
    text.write_text("alpha 3\nbeta 7\ngamma 11\nalpha 3\nbeta 7\ngamma 11\nalpha 3\n")
    path, data = inspect(
        run, tmp_path, llama, "--text", text, "--memory", folder, "--precision", "fp32"
    )
    assert data["passages"]
    page = visit(path)
    page.locator("#t50").click()
    shown = page.locator("#detail").inner_text()
    assert "passage 1" in shown
    assert ".txt, lines" in shown
    assert page.evaluate("found.places") is None
    rows = {row["name"]: row["tokens"] for row in data["by_passage"]}
    assert sum(rows.values()) == len(data["tokens"]["nats"])
    assert rows.keys() <= {
        "this text",
        "no passage in sight",
        *(one.name for one in notes.iterdir()),
    }
    assert "best passage is of" in page.locator("#where ~ .pair").inner_text()
    # To what was retrieved, also where no link leads away from it.
    page.evaluate("detail.querySelectorAll('a').forEach((link) => link.remove())")
    page.locator("#text").press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"


def test_a_passage_is_marked_where_it_says_what_the_text_says(run, llama, notes, tmp_path, visit):
    folder, text = tmp_path / "notes.passages", tmp_path / "text.txt"
    words = ("--layers", "1", "--window", "17", "--precision", "fp32", "--set", "passage_len=23")
    assert run("read", llama, notes, "--memory", folder, *words).status == 0
    text.write_text("".join(one.read_text() for one in sorted(notes.iterdir())))
    words = (llama, "--text", text, "--memory", folder, "--precision", "fp32")
    path, data = inspect(run, tmp_path, *words)
    page = visit(path)
    marked = page.evaluate(
        """Array.from(tokens.keys()).filter((token) => token % 7 === 3).map((token) => {
          select(token, false);
          const quotes = [...detail.querySelectorAll(".quote")];
          const find = (kind) => (quote) => quote.querySelector(kind)?.textContent;
          return quotes.map((quote) => [find("b")(quote), find(".same")(quote)]);
        })"""
    )
    pieces = data["tokens"]["text"]
    for number, passages in enumerate(marked):
        token = 7 * number + 3
        for word, before in passages:
            assert word in (None, pieces[token])
            assert "".join(pieces[:token]).endswith(before or "")
    assert any(before for passages in marked for _, before in passages)


def test_two_sizes_of_a_memory_are_compared(run, trained, python_text, tmp_path):
    words = (trained, "--text", python_text, "--capacity", "131", "--against", "16")
    path, data = inspect(run, tmp_path, *words)
    assert (data["memory"], data["baseline"]) == ("with 131 entries", "with 16 entries")
    assert "with 16 entries" in path.read_text()


def test_an_approximate_index_says_its_recall(run, trained, python_text, tmp_path):
    words = (trained, "--text", python_text, "--capacity", "131", "--index", "buckets")
    path, data = inspect(run, tmp_path, *words)
    assert 0.5 < data["recall"] <= 1
    assert "The search is approximate (buckets)" in path.read_text()


def test_an_index_that_a_pretrained_model_has_says_its_recall(
    run, llama, notes, tmp_path, python_text
):
    folder, index = tmp_path / "notes.memory", "buckets:num_buckets=37"
    words = ("--layers", "1", "--window", "17", "--precision", "fp32", "--set", "read=entries")
    more = ("--set", "num_neighbors=31", "--set", f"index={index}")
    assert run("read", llama, notes, "--memory", folder, *words, *more).status == 0
    words = (llama, "--text", python_text, "--precision", "fp32", "--memory", folder)
    path, data = inspect(run, tmp_path, *words)
    # One of each bucket is found: where two of the nearest share one, the other is missed.
    assert 0.3 < data["recall"] < 0.95
    assert f"The search is approximate ({index})" in path.read_text()
    assert "leave it out" in run("inspect", *words, "--index", "exact").err


def test_only_the_first_tokens_are_read_where_that_is_asked(run, trained, python_text, tmp_path):
    path, data = inspect(run, tmp_path, trained, "--text", python_text, "--max-tokens", "41")
    assert len(data["tokens"]["nats"]) == 41
    assert data["bits_per_byte"] is None
    assert "The first 41 tokens" in path.read_text()


def test_a_text_of_one_token_has_a_page(run, trained, tmp_path, visit):
    text = tmp_path / "one.txt"
    text.write_text("x")
    page = visit(inspect(run, tmp_path, trained, "--text", text)[0])
    assert "Nothing was retrieved" in page.locator("#detail").inner_text()


def test_without_matplotlib_it_says_what_to_install(refuse, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refuse("inspect", trained, "--text", __file__, "--out", tmp_path / "page.html")
    # It has no option of this name.
    assert 'pip install "memorizing[plots]"' in line
    assert "--plot" not in line


def test_what_cannot_be_inspected_is_said_in_a_line(refuse, trained, memory, tmp_path):
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("alpha 3\n")
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary"
    empty.write_text(" \n")
    binary.write_bytes(b"\0\1\2")
    words = ("inspect", trained, "--out", page)
    assert "give one file" in refuse(*words, "--text", tmp_path)
    assert "empty.txt: no text" in refuse(*words, "--text", empty)
    assert "binary" in refuse(*words, "--text", binary)
    assert "missing.txt" in refuse(*words, "--text", tmp_path / "missing.txt")
    assert "leave them out" in refuse(*words, "--text", text, "--memory", memory)
    assert "a smaller one" in refuse(*words, "--text", text, "--against", "9999999")
    assert ".html file" in refuse(
        "inspect", trained, "--text", text, "--out", tmp_path / "page.pdf"
    )
    assert "no folder" in refuse("inspect", tmp_path / "nowhere", "--text", text, "--out", page)
    assert not page.exists()
