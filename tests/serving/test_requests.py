"""What is asked, checked field by field."""

from __future__ import annotations

from typing import Any

import pytest

from memorizing.serving.requests import RequestError, parse_ask, parse_body, parse_text

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "why?"}]}
TEXT = {"model": "tiny", "prompt": "alpha"}


def refuse(call: Any, *words: Any, **named: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*words, **named)
    assert caught.value.to_dict()["error"]["type"] == "invalid_request_error"
    return caught.value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN,", b"nul"])
def test_what_is_not_json_is_refused(content: bytes):
    assert "not JSON" in str(refuse(parse_body, content))


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"[1]", "array"), (b'"a"', "string"), (b"3", "number"), (b"null", "null")],
)
def test_a_body_is_an_object(content: bytes, kind: str):
    assert f"JSON {kind}" in str(refuse(parse_body, content))


def test_what_is_not_said_has_the_defaults_of_the_interface():
    ask = parse_ask(TEXT, is_chat=False)
    assert (ask.prompt, ask.memory, ask.max_new_tokens) == ("alpha", None, 16)
    assert (ask.temperature, ask.top_p, ask.seed, ask.stop) == (0.0, 1.0, None, ())
    assert not ask.is_streamed
    assert not ask.is_chat
    chat = parse_ask(CHAT, is_chat=True)
    assert chat.prompt == ({"role": "user", "content": "why?"},)
    assert chat.max_new_tokens is None
    assert chat.is_chat


def test_what_is_said_is_taken():
    body = TEXT | {
        "prompt": ["beta"],
        "memory": "repo",
        "max_tokens": 7,
        "temperature": 1,
        "top_p": 0.5,
        "seed": -3,
        "stop": ["a", "bc"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "somebody",
        "n": 1,
        "presence_penalty": 0.0,
        "logit_bias": None,
    }
    ask = parse_ask(body, is_chat=False)
    assert (ask.prompt, ask.memory, ask.max_new_tokens) == ("beta", "repo", 7)
    assert (ask.temperature, ask.top_p, ask.seed) == (1.0, 0.5, -3)
    assert ask.stop == ("a", "bc")
    assert ask.is_streamed
    assert ask.has_usage
    newer = CHAT | {"max_tokens": 5, "max_completion_tokens": 11, "stop": "x"}
    chat = parse_ask(newer, is_chat=True)
    assert (chat.max_new_tokens, chat.stop) == (11, ("x",))


def test_contents_may_be_parts_and_developers_are_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "c"}, {"role": "user", "content": parts}]
    ask = parse_ask(CHAT | {"messages": messages}, is_chat=True)
    assert ask.prompt == ({"role": "system", "content": "c"}, {"role": "user", "content": "ab"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("model", 3),
        ("memory", ["repo"]),
        ("prompt", None),
        ("prompt", ""),
        ("prompt", [1, 2]),
        ("prompt", ["a", "b"]),
        ("prompt", "half \ud800"),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 1.1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["a"] * 5),
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", []),
        ("n", 2),
        ("best_of", 3),
        ("echo", True),
        ("suffix", "end"),
        ("logprobs", 5),
        ("logprobs", 0),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(field: str, value: Any):
    error = refuse(parse_ask, TEXT | {field: value}, is_chat=False)
    assert error.param == field
    assert error.status == 400
    assert field in str(error)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ({}, "messages"),
        ("hi", "messages"),
        ([3], "messages[0]"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "user\n", "content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ],
)
def test_messages_that_cannot_be_are_refused_by_their_place(messages: Any, param: str):
    assert refuse(parse_ask, CHAT | {"messages": messages}, is_chat=True).param == param


def test_a_long_value_is_not_sent_back():
    error = refuse(parse_ask, TEXT | {"temperature": "x" * 9999}, is_chat=False)
    assert str(error).startswith("temperature is a string; allowed")
    error = refuse(parse_ask, TEXT | {"temperature": [1] * 9999}, is_chat=False)
    assert str(error).startswith("temperature is an array; allowed")


def test_what_asks_for_nothing_is_taken_in_any_way_that_numbers_are_written():
    neutral = {"n": 1.0, "presence_penalty": 0.0, "frequency_penalty": -0.0, "logprobs": False}
    assert parse_ask(TEXT | neutral, is_chat=False) == parse_ask(TEXT, is_chat=False)


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"text": " \n"}, {"text": 3}, {"text": ["a"]}])
def test_a_text_to_read_is_a_text(body: Any):
    assert refuse(parse_text, body).param == "text"


def test_a_text_to_read_may_have_a_name():
    assert parse_text({"text": "a"}).name == "text"
    named = parse_text({"text": "a", "name": "notes.txt", "memory": "private-1"})
    assert (named.name, named.memory) == ("notes.txt", "private-1")
    assert named.num_characters == len("notes.txt") + 1
