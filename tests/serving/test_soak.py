"""The short version of experiments/faults/soak_server.py: many requests, none of them wrong."""

import importlib.util
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "experiments" / "faults"


@pytest.fixture
def soak_server(monkeypatch):
    monkeypatch.syspath_prepend(str(FAULTS))  # it imports a module beside it, as a script does
    spec = importlib.util.spec_from_file_location("soak_server", FAULTS / "soak_server.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    yield module
    sys.modules.pop("tiny", None)


def test_many_requests_are_answered_right_and_leave_nothing_behind(served, soak_server):
    address = served.url.removeprefix("http://")
    result = soak_server.soak(address, "tiny", num_requests=20, at_once=8)
    assert result["wrong"] == []
    assert len(result["requests_mib_files"]) == 10
    # Both ends of nine connections, which are open while they are counted.
    most = result["files_before"] + 2 * 9
    assert all(files <= most for *_, files in result["requests_mib_files"])
    served.wait_until("memorizing_running", 0)


def test_a_wrong_answer_is_noticed(served, soak_server, monkeypatch):
    real, calls = soak_server.ask, []

    def ask(*words, **named):
        calls.append(words)
        return real(*words, **named) if len(calls) != 15 else "another"

    monkeypatch.setattr(soak_server, "ask", ask)
    result = soak_server.soak(
        served.url.removeprefix("http://"), "tiny", num_requests=10, at_once=1
    )
    assert result["wrong"] == [(4, "another")]
