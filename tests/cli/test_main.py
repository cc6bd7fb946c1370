"""The command line as a whole: its help, and how it ends when something goes wrong."""

import errno

import pytest

import memorizing
from memorizing.cli import main
from memorizing.cli.main import explain_failure
from memorizing.errors import CorpusError


def test_the_version_is_shown(run):
    assert run("--version") == (0, f"memorizing {memorizing.__version__}\n", "")


def test_no_word_at_all_shows_the_help(run):
    outcome = run()
    assert outcome.status == 0
    assert "Usage: memorizing" in outcome.out


def test_a_message_of_several_lines_becomes_one():
    assert explain_failure(CorpusError("first\n  second")) == "first second"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_with_the_place(number):
    line = explain_failure(OSError(number, "No space left on device", "runs/log.txt"))
    assert (
        line == "no space left on the disk for 'runs/log.txt'; free some, or choose another folder"
    )


def test_a_file_that_may_not_be_written_is_one_line_with_the_place():
    line = explain_failure(PermissionError(errno.EACCES, "Permission denied", "runs/log.txt"))
    assert line == "Permission denied: 'runs/log.txt'; check the path and its permissions"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 8 bytes")],
)
def test_memory_that_runs_out_is_one_line(error):
    assert str(explain_failure(error)).startswith("not enough memory; lower ")


def test_a_bug_of_ours_is_not_made_to_look_like_bad_input():
    assert explain_failure(KeyError("x")) is None
    assert explain_failure(RuntimeError("shape mismatch")) is None


def test_ctrl_c_ends_with_the_status_that_shells_expect(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("memorizing.config.load_config", interrupt)
    assert main(["info", "tiny"]) == 130
    assert "Traceback" not in capsys.readouterr().err
