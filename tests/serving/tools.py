"""A tiny model behind a real socket, in a thread of this process."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memorizing import add_memory, open_memory, remove_memory
from memorizing.huggingface.loading import load_pretrained

MODEL = "tiny"
NOTES = {
    "alpha.txt": "".join(f"alpha {number * 3 % 89};\n" for number in range(17)),
    "beta.txt": "".join(f"beta {number * 5 % 89};\n" for number in range(13)),
}
OTHERS = {"gamma.txt": "".join(f"gamma {number * 7 % 83};\n" for number in range(19))}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
)


class Served:
    """A server, and the model and memories that it answers from."""

    def __init__(self, url: str, server: Any, loaded: Any, folders: dict[str, Path]) -> None:
        self.url, self.server, self.folders = url, server, folders
        self.model, self.tokenizer = loaded

    def call(
        self, path: str, body: Any = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """Status and object of an answer."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, named, method=method)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def complete(self, **body: Any) -> dict[str, Any]:
        status, answer = self.call("/v1/completions", {"model": MODEL, **body})
        assert status == 200, answer
        return answer

    def read_metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(self.url + "/metrics") as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def wait_until(self, name: str, value: float) -> None:
        """Until a metric is so large."""
        deadline = time.monotonic() + 60
        while self.read_metrics()[name] != value:
            assert time.monotonic() < deadline, f"{name} never was {value}"
            time.sleep(0.01)


def load_tiny(folder: Path) -> tuple[Any, Any]:
    """The model, its tokenizer with a template of chats."""
    model, tokenizer = load_pretrained(str(folder))
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def generate(loaded: tuple[Any, Any], prompt: str, count: int, memory: Path | None = None) -> str:
    """What the library generates, in a model of its own."""
    model, tokenizer = loaded
    inputs = tokenizer(prompt, return_tensors="pt")
    words = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    if memory is None:
        tokens = model.generate(**inputs, **words)
    else:
        with open_memory(model, memory, tokenizer=tokenizer):
            tokens = model.generate(**inputs, **words)
        remove_memory(model)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_memory(model_folder: Path, folder: Path, documents: dict[str, str]) -> Path:
    model, tokenizer = load_tiny(model_folder)
    add_memory(model, layers=[1], window=17, read="entries")
    with open_memory(model, folder, keep_text=True) as memory:
        memory.read(tokenizer, documents, progress=False)
    return folder


@contextmanager
def serve(
    model_folder: Path,
    folders: dict[str, Path],
    *,
    api_key: str | None = None,
    private: dict[str, Any] | None = None,
    **limits: Any,
) -> Iterator[Served]:
    """A server that ends with the block."""
    import uvicorn

    from memorizing.serving.app import Limits, Server
    from memorizing.serving.memories import Memories, PrivateLimits
    from memorizing.serving.running import open_socket

    loaded = load_tiny(model_folder)
    memories = Memories(*loaded, folders, PrivateLimits(**private or {}), window=17)
    server = Server(MODEL, memories, Limits(**limits), api_key)
    listening = open_socket("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    running = uvicorn.Server(uvicorn.Config(server.build(), log_level="error", access_log=False))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield Served(url, server, loaded, folders)
    finally:
        running.should_exit = True
        thread.join()
        listening.close()
