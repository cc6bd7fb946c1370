"""The page at /, in a real browser: Debian's Chromium, headless."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.tools import MODEL, NOTES, generate, load_tiny, serve, write_memory

CHROMIUM = shutil.which("chromium")
HOSTILE = "<img src=x onerror=alert(1)>.txt"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def errors() -> list[str]:
    return []


@pytest.fixture
def page(browser: Any, errors: list[str]) -> Iterator[Any]:
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append("dialog"))
    yield page
    page.close()


def ask(page: Any, prompt: str) -> None:
    page.get_by_label("Question, or a text").fill(prompt)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("tokens read").wait_for()


def test_asking_shows_the_answer_and_what_was_read(page, errors, served, model_folder, notes):
    page.goto(served.url)
    page.locator("#model option").first.wait_for(state="attached")
    assert page.locator("#model option").all_inner_texts() == [MODEL, f"{MODEL}+notes"]
    assert page.get_by_label("API key").is_hidden()
    # What there is to read and to fill in can be jumped to.
    assert page.get_by_role("banner").locator("h1").count() == 1
    assert page.get_by_role("form", name="Question").locator("#prompt").count() == 1
    page.get_by_label("Tokens").fill("11")
    ask(page, "why?")
    expected = generate(load_tiny(model_folder), "user: why?\nassistant: ", 11, notes)
    assert page.locator("#answer").text_content() == expected
    names = page.locator("#sources .where").all_inner_texts()
    assert {name.partition(", lines ")[0] for name in names} == set(NOTES)
    assert "%" in page.locator("#sources .weight").first.inner_text()
    text = page.locator("#sources pre").first.text_content()
    assert text in NOTES[names[0].partition(", lines ")[0]]
    page.get_by_label("Model and memory").select_option(MODEL)
    page.get_by_label("As").select_option("text")
    ask(page, "alpha 3; ")
    assert page.locator("#answer").text_content() == generate(
        load_tiny(model_folder), "alpha 3; ", 11
    )
    assert page.locator("#sources li").count() == 0
    assert page.get_by_text("answers without a memory").is_visible()
    assert errors == []


def test_what_others_wrote_is_text(page, errors, model_folder, tmp_path):
    text = "<script>alert(1)</script>\u202egnirts\x07 \N{GRINNING FACE} " + "x" * 300
    folder = write_memory(model_folder, tmp_path / "hostile.memory", {HOSTILE: text})
    with serve(model_folder, {"hostile": folder}) as served:
        page.goto(served.url)
        page.locator("#model option").first.wait_for(state="attached")
        page.get_by_label("Tokens").fill("3")
        ask(page, "<b>bold</b>")
        assert page.locator("#sources .where").first.inner_text() == f"{HOSTILE}, lines 1 to 1"
        width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert width <= 0
    assert errors == []


def test_errors_keys_and_stopping_are_shown(page, errors, model_folder, notes):
    limits = {"new_tokens": 10**6, "prompt_tokens": 99}
    with serve(model_folder, {"notes": notes}, api_key="key", **limits) as served:
        page.goto(served.url)
        page.get_by_text("API key is missing").wait_for()
        page.get_by_label("API key").fill("key")
        page.get_by_label("Tokens").fill("5")
        ask(page, "why?")
        page.get_by_label("Question, or a text").fill("long " * 99)
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("send a shorter one").wait_for()
        page.get_by_label("Tokens").fill("100000")
        page.get_by_label("Question, or a text").fill("why?")
        page.get_by_label("Question, or a text").press("Control+Enter")
        page.locator("#answer:not(:empty)").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped").wait_for()
        assert page.get_by_role("button", name="Ask").is_enabled()
    # The browser itself notes answers that are errors.
    assert all("status of 4" in error for error in errors), errors
