from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from memorizing.terminal import BarDisplay, escape, make_console, say, show, show_progress
from memorizing.training import LineDisplay, SilentDisplay, make_display


def test_lines_come_every_few_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay(interval_s=1000.0)
    display.start(0, 7)
    for step in range(1, 8):
        display.update(step, {"loss": f"{1 / step:.2f}", "tokens/s": "1,234"})
    display.stop()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 1/7, loss 1.00, tokens/s 1,234, ")
    assert lines[1] == "step 7/7, loss 0.14, tokens/s 1,234, 0:00:00 left"


def test_without_a_terminal_there_is_no_bar() -> None:
    assert isinstance(make_display(), LineDisplay)
    assert isinstance(make_display(enabled=False), SilentDisplay)


def test_a_bar_shows_facts_and_messages_as_they_are() -> None:
    output = io.StringIO()
    display = BarDisplay(Console(file=output, force_terminal=True, width=120))
    display.start(3, 13)
    display.update(11, {"loss": "2.345", "memory": "85%"})
    display.say("read [bold]names[/bold] as they are")
    display.stop()
    text = output.getvalue()
    assert "11/13" in text
    assert "loss 2.345, memory 85%" in text
    assert "[bold]names[/bold]" in text


def test_messages_are_logged_from_before_the_log_was_there(tmp_path: Path) -> None:
    display = SilentDisplay()
    display.say("first")
    display.open_log(tmp_path / "log.txt")
    display.say("second")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["first", "second"]


STEERING = {
    "a line break": "a\nb",
    "a return": "a\rb",
    "an escape sequence": "a\x1b[2Jb",
    "C1 control": "a\x9b31mb",
    "a bidi override": "a\u202eb",
    "a separator of lines": "a\u2028b",
    "no UTF-8": "a\udcffb",
    "an invisible tag": "a\U000e0041b",
}


@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_nothing_that_is_shown_steers_the_terminal(text, capsys) -> None:
    escaped = escape(text)
    assert escaped.isprintable()
    assert escaped.encode().decode("unicode_escape") == text
    show(text)
    say(text)
    assert capsys.readouterr() == (f"{escaped}\n", f"{escaped}\n")


@pytest.mark.parametrize(
    "text", ["plain", "naïve", "日本語", "a\u3000b", "می\u200cخواهم", "👩\u200d💻"]
)
def test_words_of_all_languages_are_shown_as_they_are(text) -> None:
    assert escape(text) == text


@pytest.mark.parametrize("text", [text for text in STEERING.values() if "\n" not in text])
def test_tables_and_bars_show_data_escaped(text) -> None:
    from rich.table import Table

    output = io.StringIO()
    console = make_console(file=output, force_terminal=True, width=120)
    table = Table()
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    display = BarDisplay(console)
    display.start(3, 13)
    display.update(11, {"reading": text})
    display.say(text)
    display.stop()
    assert text not in output.getvalue()
    # Rich itself takes returns out.
    assert escape(text.replace("\r", "")) in output.getvalue()


def test_a_log_holds_messages_escaped(tmp_path: Path) -> None:
    display = SilentDisplay()
    display.open_log(tmp_path / "log.txt")
    display.say("a\x1bb\udcff")
    assert (tmp_path / "log.txt").read_text().endswith(" a\\x1bb\\udcff\n")


def test_lines_of_what_has_no_known_end_come_only_where_it_takes_long(capsys) -> None:
    with show_progress("reading") as progress:
        for done in range(7):
            progress(done, 7)
    assert capsys.readouterr().err == ""
    display = LineDisplay(interval_s=0.0, is_patient=True)
    display.start(0, None, "tokens")
    display.update(1234, {"reading": "a"})
    assert capsys.readouterr().err == "tokens 1,234, reading a\n"
