"""What is answered, as OpenAI's interface has it: objects, and pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from memorizing.serving.requests import Ask
from memorizing.serving.writing import Written

DONE = b"data: [DONE]\n\n"


class Answer:
    """The answer to one request, whole or in pieces.

    `sources` is a field besides those of the interface, which clients keep or ignore.
    """

    def __init__(self, ask: Ask) -> None:
        """Give it an id and a time."""
        self._ask = ask
        self._kind = "chat.completion" if ask.is_chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if ask.is_chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": ask.model,
        }

    def _make(self, choices: list[dict[str, Any]], *, is_piece: bool, **more: Any) -> Any:
        kind = self._kind + (".chunk" if is_piece and self._ask.is_chat else "")
        return {**self._head, "object": kind, "choices": choices, **more}

    def make_whole(self, text: str, written: Written) -> dict[str, Any]:
        """Everything at once."""
        said = {"message": {"role": "assistant", "content": text}}
        choice = said if self._ask.is_chat else {"text": text}
        return self._make(
            [{"index": 0, **choice, "logprobs": None, "finish_reason": written.finish_reason}],
            is_piece=False,
            usage=count_tokens(written),
            **_list_sources(written),
        )

    def begin(self) -> list[bytes]:
        """The first pieces of a stream."""
        if not self._ask.is_chat:
            return []
        return [self._write_piece({"delta": {"role": "assistant", "content": ""}})]

    def go_on(self, text: str) -> bytes:
        """A piece of text."""
        return self._write_piece(
            {"delta": {"content": text}} if self._ask.is_chat else {"text": text}
        )

    def end(self, written: Written) -> list[bytes]:
        """The last pieces of a stream."""
        empty = {"delta": {}} if self._ask.is_chat else {"text": ""}
        pieces = [self._write_piece(empty, written.finish_reason, **_list_sources(written))]
        if self._ask.has_usage:
            usage = count_tokens(written)
            pieces.append(write_event(self._make([], is_piece=True, usage=usage)))
        return [*pieces, DONE]

    def _write_piece(self, said: Any, reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return write_event(self._make([choice], is_piece=True, **more))


def write_event(value: Any) -> bytes:
    """A piece of a stream of server-sent events."""
    return f"data: {json.dumps(value)}\n\n".encode()


def count_tokens(written: Written) -> dict[str, int]:
    """What the interface calls usage."""
    return {
        "prompt_tokens": written.prompt_tokens,
        "completion_tokens": written.new_tokens,
        "total_tokens": written.prompt_tokens + written.new_tokens,
    }


def list_models(base: str, memories: Sequence[str], separator: str, created: int) -> list[Any]:
    """The model without memory, and with each."""
    names = [base, *(f"{base}{separator}{name}" for name in memories)]
    return [
        {"id": name, "object": "model", "created": created, "owned_by": "memorizing"}
        for name in names
    ]


def _list_sources(written: Written) -> dict[str, Any]:
    return {} if written.sources is None else {"sources": written.sources}
