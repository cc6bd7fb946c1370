"""Many requests to `memorizing serve`, several at a time: none wrong, memory and files flat.

    python experiments/faults/soak_server.py --requests 10000 --at-once 8

Serves a tiny random model with one memory, asks for 8 tokens of each of a few prompts, with the
memory and without, whole and streamed, and compares every answer with that of the request alone.
Some clients go away in the middle. Prints counts, the server's processor time for a request, and
its resident memory and open files after every tenth of the requests.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny import WORDS, save_llama, write_texts

NUM_TOKENS = 8
_AWAY = 97
"""Every so many requests the client goes away at once."""


@contextlib.contextmanager
def serve(folder: Path, *words: str) -> Iterator[str]:
    """A server of a tiny model that has read five texts; gives where it listens."""
    save_llama(folder / "llama")
    write_texts(folder / "texts")
    program = [sys.executable, "-m", "memorizing"]
    memory = ["--memory", str(folder / "notes.memory"), "--precision", "fp32"]
    settings = ["--layers", "1", "--window", "17", "--keep-text"]
    places = [str(folder / "llama"), str(folder / "texts")]
    subprocess.run([*program, "read", *places, *memory, *settings], check=True, capture_output=True)
    command = [*program, "serve", places[0], *memory, "--port", "0", *words]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            while True:
                found = re.search(r"http://(\S+)/", (folder / "log").read_text())
                with contextlib.suppress(OSError):
                    if found:
                        urllib.request.urlopen(f"http://{found[1]}/health").close()
                        break
                if process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text())
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()
            process.wait()


def ask(
    connection: http.client.HTTPConnection,
    model: str,
    number: int,
    reopened: list[int],
    *,
    goes_away: bool = False,
) -> str:
    """The text of an answer; the request depends on the number alone.

    A connection that the server has closed, since nothing was asked for some seconds (this process
    was paused), is opened again, and the number of the request kept in `reopened`.
    """
    body: dict[str, Any] = {
        "model": model if number % 3 == 0 else f"{model}+notes",
        "prompt": f"{WORDS[number % len(WORDS)]} {number % 7}; ",
        "max_tokens": NUM_TOKENS,
        "stream": number % 2 == 0,
    }
    words = ("POST", "/v1/completions", json.dumps(body))
    try:
        connection.request(*words)
        if goes_away:
            connection.close()
            return ""
        response = connection.getresponse()
    except ConnectionError:
        reopened.append(number)
        connection.close()
        connection.request(*words)
        response = connection.getresponse()
    content = response.read().decode()
    if response.status != 200:
        return f"status {response.status}"
    if not body["stream"]:
        return json.loads(content)["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in content.splitlines() if line]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def read_metrics(address: str) -> dict[str, float]:
    """What the server counts."""
    with urllib.request.urlopen(f"http://{address}/metrics") as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def soak(address: str, model: str, num_requests: int, at_once: int) -> dict[str, Any]:
    """Ask, compare, and measure."""
    period = 2 * 3 * 5 * 7
    connection, reopened = http.client.HTTPConnection(address), list[int]()
    expected = {
        number: ask(connection, model, number, reopened)
        for number in range(min(period, num_requests))
    }
    connection.close()
    numbers, wrong, samples = itertools.count(), [], []
    start, lock = read_metrics(address), threading.Lock()
    every = max(1, num_requests // 10)

    def go_on() -> None:
        connection = http.client.HTTPConnection(address)
        while (number := next(numbers)) < num_requests:
            goes_away = number % _AWAY == _AWAY - 1
            text = ask(connection, model, number, reopened, goes_away=goes_away)
            with lock:
                if not goes_away and text != expected[number % period]:
                    wrong.append((number, text))
                if (number + 1) % every == 0:
                    now = read_metrics(address)
                    mib = now["process_resident_memory_bytes"] / 2**20
                    samples.append((number + 1, round(mib, 1), int(now["process_open_fds"])))
                    print(*samples[-1], flush=True)
        connection.close()

    threads = [threading.Thread(target=go_on) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end = read_metrics(address)
    cpu_s = end["process_cpu_seconds_total"] - start["process_cpu_seconds_total"]
    return {
        "requests": num_requests,
        "at_once": at_once,
        "wrong": wrong,
        "reopened": len(reopened),
        "files_before": int(start["process_open_fds"]),
        "cpu_ms_per_request": round(1000 * cpu_s / num_requests, 2),
        "requests_mib_files": samples,
    }


def main() -> None:
    """Run it; the exit status is 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as address:
        result = soak(address, "llama", arguments.requests, arguments.at_once)
    print(json.dumps(result))
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
