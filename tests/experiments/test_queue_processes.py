"""Processes of the queue: workers, signals, and its command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.test_queue import QUEUE


def start_queue_of(code: str, folder: Path) -> subprocess.Popen[str]:
    """Two workers that do some code instead of jobs."""
    (folder / "worker.py").write_text(code)
    start = (
        f"import sys, runpy; sys.path.insert(0, {str(QUEUE)!r})\n"
        f"main = runpy.run_path({str(QUEUE / '__main__.py')!r}, run_name='queue_main')\n"
        f"sys.argv = [{str(folder / 'worker.py')!r}]\n"
        "main['start_workers'](2)"
    )
    return subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 3)])
def test_a_signal_goes_to_every_worker(number: int, status: int, tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "try:\n"
        "    os.write(1, b'up.'); time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    raise SystemExit(3)"
    )
    with start_queue_of(code, tmp_path) as queue:
        assert queue.stdout is not None
        assert queue.stdout.read(6) == "up.up."
        queue.send_signal(number)
        assert queue.wait(timeout=20) == status


def test_a_worker_that_is_killed_is_no_success(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal\n"
        f"pathlib.Path({str(tmp_path)!r}, 'one').mkdir()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The second worker finds the folder there, and ends with status 1.
    with start_queue_of(code, tmp_path) as queue:
        assert queue.wait(timeout=20) == 128 + signal.SIGKILL


def test_a_worker_stops_when_the_queue_is_killed(tmp_path: Path) -> None:
    said = tmp_path / "said"
    worker = (
        "import runpy, signal, sys, time\n"
        f"main = runpy.run_path({str(QUEUE / '__main__.py')!r})\n"
        "def stop(*_):\n"
        f"    open({str(said)!r}, 'w').write('stopped')\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "main['stop_when_orphaned']()\n"
        "print('works', flush=True)\n"
        "time.sleep(60)"
    )
    queue = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)\n"
        "time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(QUEUE)}
    said.touch()
    with subprocess.Popen(
        [sys.executable, "-c", queue], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "works\n"
        parent.kill()
    deadline = time.monotonic() + 20
    while not said.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert said.read_text() == "stopped"


def test_the_queue_says_its_status_from_the_command_line(tmp_path: Path) -> None:
    source = str(QUEUE.parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "COLUMNS": "200"}
    command = [sys.executable, str(QUEUE), "--status", "main/web", "--runs", str(tmp_path)]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "main/web-memory-seed0" in done.stdout
    assert "6 waiting" in done.stdout
