"""`memorizing serve`, as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib import resources
from typing import Any

from tests.cli.test_read import FP32


def test_what_cannot_be_served_is_refused_in_one_line(refuse, llama, memory, notes, tmp_path):
    assert "MEMORIZING_API_KEY" in refuse("serve", llama, "--host", "0.0.0.0")
    assert "printable" in refuse("serve", llama, "--api-key", "")
    assert "printable" in refuse("serve", llama, "--api-key", "schl\u00fcssel")
    assert "one name, 'notes'" in refuse(
        "serve", llama, "--memory", memory, "--memory", tmp_path / "notes"
    )
    assert "no manifest.json" in refuse("serve", llama, "--memory", notes, "--port", "0", *FP32)
    assert "another port" in refuse("serve", llama, "--host", "192.0.2.1", "--api-key", "a")
    assert "no +" in refuse("serve", llama, "--memory", tmp_path / "a+b")
    for name in ("--max-seconds", "--private-age", "--grace"):
        for value in ("inf", "nan", "0"):
            # Were it taken, there would be no memory to serve.
            assert name in refuse("serve", llama, name, value, "--memory", notes, "--port", "0")


def test_without_the_extra_it_says_what_to_install(refuse, llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "memorizing[serve]"' in refuse("serve", llama)


def test_a_wheel_has_the_page():
    assert (
        "<!doctype html>" in resources.files("memorizing.serving").joinpath("page.html").read_text()
    )


def start(*words: object) -> tuple[subprocess.Popen[str], str]:
    """A server, and where it listens."""
    command = [sys.executable, "-m", "memorizing", "serve", *map(str, words), "--port", "0", *FP32]
    # A shell's background jobs ignore SIGINT, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise AssertionError(f"it ended with {process.wait()}")


def complete(url: str, **body: Any) -> dict[str, Any]:
    content = json.dumps({"model": "llama+notes", "prompt": "alpha 3;", **body}).encode()
    for _ in range(100):
        try:
            with urllib.request.urlopen(url + "v1/completions", content) as response:
                return json.load(response)
        except urllib.error.URLError as error:
            # It says where it listens a moment before it does.
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.05)
    raise AssertionError("nobody listens")


def test_a_signal_ends_what_runs_then_the_server(llama, memory):
    process, url = start(llama, "--memory", memory, "--grace", "120")
    try:
        assert complete(url, max_tokens=2)["usage"]["completion_tokens"] == 2
        answers: list[dict[str, Any]] = []
        asking = threading.Thread(target=lambda: answers.append(complete(url, max_tokens=60)))
        asking.start()
        while json.load(urllib.request.urlopen(url + "health"))["running"] == 0:
            pass
        process.terminate()
        asking.join()
        assert answers[0]["usage"]["completion_tokens"] == 60
        assert process.wait(timeout=60) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_what_does_not_end_in_time_after_ctrl_c_is_given_up(llama, memory):
    words = ("--max-new-tokens", "1000000", "--grace", "1")
    process, url = start(llama, "--memory", memory, *words)
    try:
        complete(url, max_tokens=1)
        request = urllib.request.Request(
            url + "v1/completions",
            json.dumps(
                {
                    "model": "llama",
                    "memory": "notes",
                    "prompt": "a",
                    "stream": True,
                    "max_tokens": 10**6,
                }
            ).encode(),
        )
        with urllib.request.urlopen(request) as response:
            assert response.read(5) == b"data:"
            process.send_signal(signal.SIGINT)
            *_, last = response.read().strip().split(b"\n\n")
            assert process.wait(timeout=60) == 130
        # Its client is told, and whoever reads the log is not alarmed, not by transformers either.
        assert b"the server stops" in last
        assert process.stderr is not None
        assert "Traceback" not in (log := process.stderr.read())
        assert "maximum length" not in log
    finally:
        process.kill()
        process.communicate()
