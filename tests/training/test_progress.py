from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from memorizing.training import LineDisplay, SilentDisplay, make_display
from memorizing.training.progress import BarDisplay


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
