"""What `memorizing serve` adds to the first token and to each token, beside the library itself.

    python experiments/pretrained/serving_times.py MODEL FILE... [--heads 18:6,7] [--rounds 5]

Reads the files into a memory of passages, then asks the same prompt in turn of the server, with
and without the memory, and of the library, with and without: for one token, and for 17. Prints
medians over the rounds of the processor time of this process, client and server: the machine may
be shared.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import uvicorn

from memorizing import add_memory, open_memory
from memorizing.huggingface.loading import load_pretrained
from memorizing.serving.app import Limits, Server
from memorizing.serving.memories import Memories, PrivateLimits
from memorizing.serving.running import open_socket

NUM_TOKENS = 17
PROMPT_CHARACTERS = 200
ARMS = ("server", "server with memory", "library", "library with memory")


@contextmanager
def serve(server: Server) -> Iterator[str]:
    """Run a server in a thread; gives where it listens."""
    listening = open_socket("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(server.build(), log_level="error", access_log=False))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        listening.close()


def measure(call: Callable[[int], int]) -> tuple[float, float]:
    """Processor seconds of the first token, and of each one after it."""
    times = []
    for count in (1, NUM_TOKENS):
        start = time.process_time()
        written = call(count)
        if written != count:
            raise RuntimeError(f"{written} tokens were written, not {count}; use another prompt")
        times.append(time.process_time() - start)
    return times[0], (times[1] - times[0]) / (NUM_TOKENS - 1)


def main() -> None:
    """Measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--heads", default="18:6,7")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = load_pretrained(arguments.model, dtype=torch.float32)
    layer, _, heads = arguments.heads.partition(":")
    add_memory(model, heads={int(layer): [int(head) for head in heads.split(",")]}, read="passages")
    prompt = arguments.files[0].read_text()[:PROMPT_CHARACTERS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repo.memory"
        session = open_memory(model, path)
        session.read(tokenizer, [(str(file), file.read_text()) for file in arguments.files])
        memories = Memories(model, tokenizer, {"repo": path}, PrivateLimits(), window=512)
        server = Server("model", memories, Limits(seconds=3600.0))
        inputs = tokenizer(prompt, return_tensors="pt")

        def run_library(count: int, *, has_memory: bool) -> int:
            with session.use() if has_memory else nullcontext():
                tokens = model.generate(
                    **inputs, max_new_tokens=count, do_sample=False, pad_token_id=0
                )
            return tokens.shape[1] - inputs["input_ids"].shape[1]

        with serve(server) as address:

            def run_server(count: int, *, has_memory: bool) -> int:
                connection = http.client.HTTPConnection(address)
                body: dict[str, Any] = {
                    "model": "model+repo" if has_memory else "model",
                    "prompt": prompt,
                    "max_tokens": count,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                connection.request("POST", "/v1/completions", json.dumps(body))
                *_, last, _ = connection.getresponse().read().decode().strip().split("\n\n")
                connection.close()
                return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]

            found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
            for number in range(arguments.rounds + 1):
                for arm in ARMS:
                    run = run_server if arm.startswith("server") else run_library
                    has_memory = arm.endswith("memory")
                    times = measure(
                        lambda count, run=run, has=has_memory: run(count, has_memory=has)
                    )
                    # The first round warms up.
                    if number:
                        found[arm].append(times)
                print(number, {arm: found[arm][-1:] for arm in ARMS}, flush=True)
    medians = {
        arm: [round(1000 * statistics.median(part), 1) for part in zip(*times, strict=True)]
        for arm, times in found.items()
    }
    costs = {
        kind: statistics.median(
            memory[1] / plain[1]
            for plain, memory in zip(found[kind], found[f"{kind} with memory"], strict=True)
        )
        for kind in ("server", "library")
    }
    first_ms = [
        1000 * (one[0] - other[0])
        for one, other in zip(
            found["server with memory"], found["library with memory"], strict=True
        )
    ]
    result = {
        "cpu_ms_first_and_each": medians,
        "a token with memory / without": {name: round(cost, 3) for name, cost in costs.items()},
        "server adds to the first, ms": round(statistics.median(first_ms), 1),
        "rounds": arguments.rounds,
        "entries": session.num_entries,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
