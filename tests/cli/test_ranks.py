import pytest

from memorizing.cli import main


def test_a_verb_that_processes_do_not_share_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["info", "recipes"]) == 0  # nobody launched this process
    monkeypatch.setenv("RANK", "1")
    assert main(["info", "recipes"]) == 2
    assert "info was started in 3 processes" in capsys.readouterr().err
