"""`memorizing serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from memorizing.cli.generate import choose_window
from memorizing.cli.options import (
    AdapterOption,
    DeviceOption,
    ModelArgument,
    ModelPrecisionOption,
    option,
)
from memorizing.cli.pretrained import load_model
from memorizing.errors import ConfigError, IndexUnavailableError
from memorizing.terminal import say

EXAMPLES = """\b
examples:
  memorizing serve runs/smollm2 --memory repo.memory
  memorizing serve runs/smollm2 --memory repo.memory --memory book.memory --name smollm2
  MEMORIZING_API_KEY=... memorizing serve runs/smollm2 --memory repo.memory --host 0.0.0.0
  curl localhost:8000/v1/completions -d '{"model": "smollm2+repo", "prompt": "def open_memory("}'
"""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MOST_S = 1e9
"""Thirty years. No timer takes infinity, nor does JSON."""


def run(
    model: ModelArgument,
    memory: Annotated[
        list[Path] | None,
        option("DIR", "Folder that `memorizing read` made. Repeatable.", "--memory"),
    ] = None,
    name: Annotated[
        str | None, option("NAME", "Of the model, for clients. Default: the last of its name.")
    ] = None,
    host: Annotated[
        str, option("ADDRESS", "To listen to. Others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, option("N", "0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        option(
            "KEY",
            "What clients must send. Others can see it here: better in the environment.",
            envvar="MEMORIZING_API_KEY",
        ),
    ] = None,
    max_waiting: Annotated[
        int, option("N", "Requests that wait; beyond that the answer is 429.", min=0)
    ] = 32,
    max_seconds: Annotated[
        float, option("S", "A request may run for.", min=0.1, max=_MOST_S)
    ] = 120.0,
    max_prompt_tokens: Annotated[int, option("N", "A prompt may have.", min=1)] = 16_384,
    max_new_tokens: Annotated[int, option("N", "An answer may have.", min=1)] = 1_024,
    max_private: Annotated[
        int, option("N", "Memories that requests make, at the same time.", min=0)
    ] = 8,
    max_private_characters: Annotated[
        int, option("N", "Of texts in one of them, and their names.", min=1)
    ] = 2**20,
    private_age: Annotated[
        float,
        option("S", "One of them ends when it was not used for so long.", min=1.0, max=_MOST_S),
    ] = 3600.0,
    grace: Annotated[
        float,
        option(
            "S", "After SIGTERM, what runs and waits is answered for so long.", min=1.0, max=_MOST_S
        ),
    ] = 30.0,
    adapter: AdapterOption = None,
    precision: ModelPrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Answer OpenAI's interface with a model that has read, and a page to ask it at /.

    Clients name a memory in the model (`smollm2+repo`) or beside it (`"memory": "repo"`); without
    one the model is itself. Answers say in `sources` what was retrieved.
    """
    check_access(host, api_key)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise IndexUnavailableError(
            f'serve needs {error.name}, which is not installed; pip install "memorizing[serve]"'
        ) from error
    from transformers.utils import logging

    from memorizing.data.text import clean_name
    from memorizing.huggingface.learning.adapter import load_adapter
    from memorizing.serving.app import Limits, Server
    from memorizing.serving.memories import Memories, PrivateLimits, name_memories
    from memorizing.serving.running import open_socket, run_server

    folders = name_memories(memory or [])
    listening = open_socket(host, port)
    with listening:
        loaded, tokenizer = load_model(model, precision, device)
        if adapter is not None:
            load_adapter(loaded, adapter)
        memories = Memories(
            loaded,
            tokenizer,
            folders,
            PrivateLimits(max_private, max_private_characters, private_age),
            window=choose_window(loaded),
        )
        limits = Limits(max_waiting, max_seconds, max_prompt_tokens, max_new_tokens)
        # What it says of lengths is not so: a model with a window reads past its own.
        logging.set_verbosity_error()
        called = clean_name(name or Path(model).name or model)
        server = Server(called, memories, limits, api_key)
        for known in server.list_names():
            say(f"model: {known}")
        shown = f"[{host}]" if ":" in host else host
        say(f"listening on http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
        run_server(server, listening, grace)


def check_access(host: str, api_key: str | None) -> None:
    """Refuse to answer others without a key.

    Raises:
        ConfigError: with what to do.
    """
    if api_key is None and host not in _LOOPBACK:
        raise ConfigError(
            f"--host is {host}, which others can reach, and there is no key; set "
            "MEMORIZING_API_KEY, or listen to 127.0.0.1"
        )
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ConfigError("the API key is empty, or has more than printable ASCII; choose another")
