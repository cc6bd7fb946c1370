"""What is asked in OpenAI's interface, checked, and the errors that it knows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant")
MOST_STOPS = 4
DEFAULT_NEW_TOKENS = 16
"""Of a completion that does not say how many; an answer in a chat is as long as the limit."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""What would change an answer and is not built, with the values that ask for nothing."""


class RequestError(Exception):
    """What is answered in the place of what was asked for."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        """Take the status of HTTP, and what the interface's error object says."""
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def to_dict(self) -> dict[str, Any]:
        """The interface's error object."""
        kinds = {429: "requests", 401: "authentication_error", 403: "permission_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kinds.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class Ask:
    """A text to go on from, or a chat to answer."""

    model: str
    """As it was named, perhaps with a memory."""
    memory: str | None
    """As it was named beside the model."""
    prompt: str | tuple[dict[str, str], ...]
    """A text, or messages with `role` and `content`."""
    max_new_tokens: int | None
    """None is as many as the server allows."""
    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    is_streamed: bool
    has_usage: bool
    """A stream ends with the number of tokens."""

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is messages."""
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class Text:
    """A text to be read into a private memory."""

    name: str
    text: str
    memory: str | None
    """A private memory that is there; None makes one."""

    @property
    def num_characters(self) -> int:
        """Of the text and its name, both of which are kept."""
        return len(self.name) + len(self.text)


def parse_body(content: bytes) -> dict[str, Any]:
    """The object in the body of a request.

    Raises:
        RequestError: it is none.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError(
            400, "the body is not JSON; send an object, with Content-Type: application/json"
        ) from None
    if not isinstance(body, dict):
        raise RequestError(400, f"the body is a JSON {_name(body)}; send an object")
    return body


def parse_ask(body: dict[str, Any], *, is_chat: bool) -> Ask:
    """A completion, or an answer in a chat.

    Raises:
        RequestError: with the field, what it may be, and what was sent.
    """
    for name, neutral in _NEUTRAL.items():
        value = body.get(name)
        # 0 is no False: log probabilities of 0 others are those of the tokens themselves.
        is_neutral = any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
        )
        if value is not None and not is_neutral:
            raise RequestError(
                400, f"{name} is not built; leave it out", param=name, code="unsupported_parameter"
            )
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    count = _take_int(body, limit, 1, None)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _refuse("stream_options", "an object", options)
    return Ask(
        model=_take_text(body, "model"),
        memory=_take_text(body, "memory", is_needed=False) or None,
        prompt=_take_messages(body) if is_chat else _take_prompt(body),
        max_new_tokens=DEFAULT_NEW_TOKENS if count is None and not is_chat else count,
        temperature=_take_float(body, "temperature", 0.0, 2.0, 0.0),
        top_p=_take_float(body, "top_p", 0.0, 1.0, 1.0),
        seed=_take_int(body, "seed", -(2**63), 2**63 - 1),
        stop=_take_stops(body),
        is_streamed=_take_bool(body, "stream"),
        has_usage=_take_bool(options or {}, "include_usage"),
    )


def parse_text(body: dict[str, Any]) -> Text:
    """A text for a private memory.

    Raises:
        RequestError: as in `parse_ask`.
    """
    name = _take_text(body, "name", is_needed=False) or "text"
    text = _take_text(body, "text")
    if not text.strip():
        raise RequestError(400, "text is empty; send one to be read", param="text")
    return Text(name, text, _take_text(body, "memory", is_needed=False) or None)


def _take_text(body: dict[str, Any], name: str, *, is_needed: bool = True) -> str:
    value = body.get(name)
    if value is None and not is_needed:
        return ""
    if value is None:
        raise RequestError(400, f"{name} is missing", param=name, code="missing_required_parameter")
    return _check_text(name, value)


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refuse(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(
            400, f"{name} has half of a surrogate pair, which is no text", param=name
        ) from None
    return value


def _take_bool(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise _refuse(name, "true or false", value)
    return bool(value)


def _take_int(body: dict[str, Any], name: str, low: int, high: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or value < low or (high is not None and value > high):
        most = "" if high is None else f" to {high}"
        raise _refuse(name, f"a whole number from {low}{most}", value)
    return value


def _take_float(body: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high or math.isnan(value):
        raise _refuse(name, f"a number from {low:g} to {high:g}", value)
    return float(value)


def _take_prompt(body: dict[str, Any]) -> str:
    value = body.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, list):
        raise _refuse("prompt", "one string", value)
    text = _take_text(body | {"prompt": value}, "prompt")
    if not text:
        raise RequestError(400, "prompt is empty; send a text to go on from", param="prompt")
    return text


def _take_messages(body: dict[str, Any]) -> tuple[dict[str, str], ...]:
    messages = body.get("messages")
    if messages is None:
        raise RequestError(
            400, "messages is missing", param="messages", code="missing_required_parameter"
        )
    if not isinstance(messages, list) or not messages:
        raise _refuse("messages", "a list of one or more messages", messages)
    taken = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _refuse(where, "an object with role and content", message)
        role = message.get("role")
        if role not in ROLES:
            raise _refuse(f"{where}.role", f"one of {', '.join(ROLES)}", role)
        # The word for the first role in newer versions of the interface.
        role = "system" if role == "developer" else role
        content = _join_parts(f"{where}.content", message.get("content"))
        taken.append({"role": role, "content": content})
    return tuple(taken)


def _join_parts(where: str, content: object) -> str:
    """A content as a text; it may be a list of texts."""
    if not isinstance(content, list):
        return _check_text(where, content)
    texts = []
    for number, part in enumerate(content):
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text:
            raise _refuse(f"{where}[{number}]", 'a {"type": "text", "text": ...}', part)
        texts.append(_check_text(f"{where}[{number}].text", part.get("text")))
    return "".join(texts)


def _take_stops(body: dict[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops: Sequence[Any] = [] if value is None else value if isinstance(value, list) else [value]
    is_right: Callable[[Any], bool] = lambda one: isinstance(one, str) and one != ""  # noqa: E731
    if len(stops) > MOST_STOPS or not all(map(is_right, stops)):
        raise _refuse("stop", f"a string, or up to {MOST_STOPS} of them, none empty", value)
    return tuple(stops)


def _refuse(name: str, allowed: str, value: object) -> RequestError:
    seen = json.dumps(value)
    if len(seen) > 40:
        kind = _name(value)
        seen = f"{'an' if kind[0] in 'ao' else 'a'} {kind}"
    return RequestError(400, f"{name} is {seen}; allowed: {allowed}", param=name)


def _name(value: object) -> str:
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
