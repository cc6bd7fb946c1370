"""The server as clients see it: the `openai` client, curl, and what is wrong on purpose."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from memorizing import add_memory, open_memory
from memorizing.serving.memories import name_memories
from memorizing.serving.requests import RequestError
from tests.serving.tools import (
    MODEL,
    NOTES,
    OTHERS,
    Served,
    generate,
    load_tiny,
    serve,
    write_memory,
)

PROMPT = "alpha 3; alpha 6; alp"
WITH_NOTES = f"{MODEL}+notes"
ASSISTANT = "user: why?\nassistant: "


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(model_folder: Path, notes: Path) -> dict[str | None, str]:
    """What the library generates for PROMPT, by memory."""
    return {
        None: generate(load_tiny(model_folder), PROMPT, 23),
        "notes": generate(load_tiny(model_folder), PROMPT, 23, notes),
    }


def test_models_are_the_model_and_the_model_with_every_memory(client):
    assert [model.id for model in client.models.list()] == [MODEL, WITH_NOTES]
    assert client.models.retrieve(WITH_NOTES).owned_by == "memorizing"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_the_library_generates(client, expected):
    assert expected[None] != expected["notes"]
    ask = {"prompt": PROMPT, "max_tokens": 23}
    plain = client.completions.create(model=MODEL, **ask)
    assert plain.choices[0].text == expected[None]
    assert "sources" not in plain.model_extra
    named = client.completions.create(model=WITH_NOTES, **ask)
    assert named.choices[0].text == expected["notes"]
    assert named.choices[0].finish_reason == "length"
    assert named.usage.model_dump(
        include={"prompt_tokens", "completion_tokens", "total_tokens"}
    ) == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 23,
        "total_tokens": len(PROMPT) + 23,
    }
    beside = client.completions.create(model=MODEL, extra_body={"memory": "notes"}, **ask)
    assert beside.choices[0].text == expected["notes"]
    for answer in (named, beside):
        sources = answer.model_extra["sources"]
        assert {one["document"] for one in sources} == set(NOTES)
        weights = [one["weight"] for one in sources]
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) <= 1
        for one in sources:
            text = NOTES[one["document"]]
            first, last = one["lines"]
            # A place is a token, with what stands around it.
            assert first == last
            assert one["text"] in text
            assert text.splitlines()[first - 1] in one["text"]


def test_a_stream_says_the_same_piece_by_piece(client, expected):
    pieces = list(
        client.completions.create(
            model=WITH_NOTES,
            prompt=PROMPT,
            max_tokens=23,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *texts, usage = pieces
    assert "".join(piece.choices[0].text for piece in texts) == expected["notes"]
    assert [piece.choices[0].finish_reason for piece in texts] == [None] * (len(texts) - 1) + [
        "length"
    ]
    assert {one["document"] for one in texts[-1].model_extra["sources"]} == set(NOTES)
    assert (usage.choices, usage.usage.completion_tokens) == ([], 23)
    assert len(texts) > 5


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_chat_is_put_as_the_model_was_taught(client, model_folder, notes, is_streamed):
    asked = client.chat.completions.create(
        model=WITH_NOTES,
        messages=[{"role": "user", "content": "why?"}],
        max_completion_tokens=11,
        stream=is_streamed,
    )
    expected = generate(load_tiny(model_folder), ASSISTANT, 11, notes)
    if not is_streamed:
        assert asked.choices[0].message.role == "assistant"
        assert asked.choices[0].message.content == expected
        assert asked.object == "chat.completion"
        return
    pieces = list(asked)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert pieces[-1].choices[0].finish_reason == "length"
    assert pieces[-1].model_extra["sources"]
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}


def test_curl_gets_an_answer_and_a_stream(served, expected):
    body = json.dumps({"model": WITH_NOTES, "prompt": PROMPT, "max_tokens": 23})
    words = ["curl", "-sS", "-N", served.url + "/v1/completions", "-d"]
    whole = subprocess.run([*words, body], capture_output=True, check=True).stdout
    assert json.loads(whole)["choices"][0]["text"] == expected["notes"]
    streamed = json.dumps(json.loads(body) | {"stream": True})
    lines = subprocess.run([*words, streamed], capture_output=True, check=True).stdout.splitlines()
    events = [line.removeprefix(b"data: ") for line in lines if line]
    assert events.pop() == b"[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(texts) == expected["notes"]


def test_several_at_once_get_what_each_gets_alone(served, client):
    asks = [
        {"prompt": PROMPT[number:], "max_tokens": 3 + number, "model": model}
        for number in range(6)
        for model in (MODEL, WITH_NOTES)
    ]
    alone = [client.completions.create(**ask).choices[0].text for ask in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda ask: served.complete(**ask), asks))
    assert [answer["choices"][0]["text"] for answer in together] == alone
    assert len(set(alone)) > 6


def test_sampling_follows_its_seed(served):
    ask = {"prompt": PROMPT, "max_tokens": 13, "temperature": 1.5}
    texts = [served.complete(**ask, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = served.complete(prompt=PROMPT, max_tokens=13)["choices"][0]["text"]
    for almost in ({"temperature": 1e-30}, {"temperature": 1.0, "top_p": 0.0}):
        assert (
            served.complete(prompt=PROMPT, max_tokens=13, **almost)["choices"][0]["text"] == greedy
        )


def test_an_answer_ends_before_a_string_to_stop_at(served, expected):
    text = expected["notes"]
    stop = text[7:9]
    answer = served.complete(prompt=PROMPT, max_tokens=23, memory="notes", stop=[stop])
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 23


def test_an_end_of_text_stops_and_is_no_text(served, expected):
    ends, text = served.model.generation_config.eos_token_id, expected[None]
    place, character = next(pair for pair in enumerate(text) if pair[1].isascii())
    (end,) = served.tokenizer(character)["input_ids"]
    served.model.generation_config.eos_token_id = [ends, end]
    try:
        answer = served.complete(prompt=PROMPT, max_tokens=23)
    finally:
        served.model.generation_config.eos_token_id = ends
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == text[:place]
    assert answer["usage"]["completion_tokens"] < 23


def test_a_private_memory_is_read_asked_and_deleted(served, client, model_folder, tmp_path):
    status, made = served.call("/v1/memories", {"text": OTHERS["gamma.txt"], "name": "gamma.txt"})
    assert status == 201
    assert made["documents"] == ["gamma.txt"]
    assert made["entries"] == len(OTHERS["gamma.txt"]) - 4
    folder = write_memory(model_folder, tmp_path / "others.memory", OTHERS)
    expected = generate(load_tiny(model_folder), PROMPT, 13, folder)
    ask = {"model": MODEL, "prompt": PROMPT, "max_tokens": 13}
    answer = client.completions.create(**ask, extra_body={"memory": made["id"]})
    assert answer.choices[0].text == expected
    sources = answer.model_extra["sources"]
    assert {one["document"] for one in sources} == {"gamma.txt"}
    assert all(one["text"] in OTHERS["gamma.txt"] for one in sources)
    more = {"text": NOTES["beta.txt"], "name": "beta.txt", "memory": made["id"]}
    assert served.call("/v1/memories", more)[1]["documents"] == ["gamma.txt", "beta.txt"]
    # A name that is there with another text.
    assert served.call("/v1/memories", more | {"text": "another"})[0] == 400
    # Nobody else is told of it, nor can it be named as a shared one.
    assert [model.id for model in client.models.list()] == [MODEL, WITH_NOTES]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**ask | {"model": f"{MODEL}+{made['id']}"})
    deleted = served.call(f"/v1/memories/{made['id']}", method="DELETE")
    assert deleted == (200, {"id": made["id"], "object": "memory", "deleted": True})
    for path, body, method in (
        ("/v1/completions", ask | {"memory": made["id"]}, None),
        ("/v1/memories", more, None),
        (f"/v1/memories/{made['id']}", None, "DELETE"),
        ("/v1/memories/notes", None, "DELETE"),
    ):
        status, answer = served.call(path, body, method=method)
        assert (status, answer["error"]["code"]) == (404, "memory_not_found")
        assert "private" not in answer["error"]["message"].replace(made["id"], "")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions", b"{", 400, None),
        ("/v1/completions", {"model": "gpt-4", "prompt": "a"}, 404, "model_not_found"),
        ("/v1/completions", {"model": MODEL + "+", "prompt": "a"}, 404, "model_not_found"),
        ("/v1/completions", {"model": MODEL + "x", "prompt": "a"}, 404, "model_not_found"),
        ("/v1/completions", {"model": MODEL + "+none", "prompt": "a"}, 404, "model_not_found"),
        (
            "/v1/completions",
            {"model": MODEL, "prompt": "a", "memory": "x"},
            404,
            "memory_not_found",
        ),
        ("/v1/completions", {"model": WITH_NOTES, "prompt": "a", "memory": "x"}, 400, None),
        ("/v1/completions", {"model": MODEL, "prompt": ["a", "b"]}, 400, None),
        ("/v1/completions", {"model": MODEL, "prompt": "a" * 119}, 400, "context_length_exceeded"),
        (
            "/v1/completions",
            {"model": WITH_NOTES, "prompt": "a" * 16_385},
            400,
            "context_length_exceeded",
        ),
        ("/v1/completions", {"model": MODEL, "prompt": "a" * 2**22}, 413, None),
        ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400, None),
        ("/v1/memories", {"text": "a" * (2**20 + 1)}, 413, None),
        ("/v1/memories", {}, 400, "missing_required_parameter"),
        ("/v1/embeddings", {"model": MODEL, "input": "a"}, 404, None),
        ("/health", {}, 405, None),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_is_wrong_is_answered_by_an_error_object(
    served, path, body, status, code, is_streamed
):
    if is_streamed and isinstance(body, dict):
        body = body | {"stream": True}
    found, answer = served.call(path, body)
    assert found == status
    assert set(answer) == {"error"}
    error = answer["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 200


def test_a_template_says_what_it_refuses(served):
    roles = ("user", "system")
    messages = [{"role": role, "content": "a"} for role in roles]
    status, answer = served.call("/v1/chat/completions", {"model": MODEL, "messages": messages})
    assert status == 400
    assert "system comes first" in answer["error"]["message"]


def test_a_body_without_a_length_is_refused_when_it_is_too_long(served):
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    pieces = (b" " * 2**20 for _ in range(5))
    connection.request(
        "POST", "/v1/completions", pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_without_end_is_not_waited_for(model_folder):
    with serve(model_folder, {}, body_bytes=1000) as served:
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", "1000000")
        connection.endheaders(b" " * 16_001)
        assert connection.getresponse().status == 413
        connection.close()


def test_pages_of_other_places_and_other_names_of_this_machine_are_refused(served):
    own = {"Origin": served.url}
    assert served.call("/v1/models", **own)[0] == 200
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Host": "evil.example"},
    ):
        status, answer = served.call("/v1/models", **headers)
        assert (status, answer["error"]["type"]) == (403, "permission_error")


def test_with_a_key_only_those_who_send_it_are_answered(model_folder, notes):
    with serve(model_folder, {"notes": notes}, api_key="a key") as served:
        assert served.call("/health")[0] == 200
        # Names are anybody's where there is a key.
        assert (
            served.call("/v1/models", Host="there.example", Authorization="Bearer a key")[0] == 200
        )
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "a key"}):
            for path in ("/v1/models", "/metrics"):
                status, answer = served.call(path, **headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        with openai.OpenAI(base_url=served.url + "/v1", api_key="a key") as client:
            answer = client.completions.create(model=WITH_NOTES, prompt="a", max_tokens=1)
        assert answer.usage.completion_tokens == 1


def start_long(served: Served, **more: Any) -> http.client.HTTPConnection:
    """A request that takes long, of which nothing was read."""
    body = {"model": WITH_NOTES, "prompt": PROMPT, "max_tokens": 10**6, **more}
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection


@pytest.fixture(scope="module")
def strict(model_folder: Path, notes: Path) -> Any:
    """A server of narrow limits."""
    limits = {"waiting": 1, "new_tokens": 10**6, "prompt_tokens": 10**6, "seconds": 600.0}
    with serve(
        model_folder, {"notes": notes}, **limits, private={"most": 1, "characters": 200}
    ) as served:
        yield served


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"prompt": "alpha " * 10**5}])
def test_a_client_that_goes_away_ends_its_request(strict, more):
    connection = start_long(strict, **more)
    if more.get("stream"):
        assert connection.getresponse().read(6) == b"data: "
    strict.wait_until("memorizing_running", 1)
    connection.close()
    strict.wait_until("memorizing_running", 0)


def test_beyond_those_that_may_wait_the_answer_is_429_and_who_goes_away_waits_no_more(strict):
    running = start_long(strict)
    strict.wait_until("memorizing_running", 1)
    waiting = start_long(strict)
    strict.wait_until("memorizing_waiting", 1)
    with (
        openai.OpenAI(base_url=strict.url + "/v1", api_key="any", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        client.completions.create(model=MODEL, prompt="a")
    assert caught.value.response.headers["retry-after"] == "1"
    waiting.close()
    strict.wait_until("memorizing_waiting", 0)
    running.close()
    strict.wait_until("memorizing_running", 0)
    assert strict.complete(prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_private_memories_are_so_many_and_so_large(strict):
    assert strict.call("/v1/memories", {"text": "a" * 197, "name": "long"})[0] == 413
    assert strict.call("/v1/memories", {"text": "a", "name": "n" * 200})[0] == 413
    made = strict.call("/v1/memories", {"text": "a" * 146, "name": "long"})[1]["id"]
    assert strict.call("/v1/memories", {"text": "b"})[0] == 429
    assert strict.call("/v1/memories", {"text": "b" * 50, "name": "b", "memory": made})[0] == 413
    assert strict.call("/v1/memories", {"text": "b" * 49, "name": "b", "memory": made})[0] == 201
    strict.call(f"/v1/memories/{made}", method="DELETE")
    assert strict.call("/v1/memories", {"text": "b"})[0] == 201


def test_a_request_may_take_so_long(model_folder, notes):
    with serve(model_folder, {"notes": notes}, new_tokens=10**6, seconds=0.5) as served:
        start = time.monotonic()
        answer = served.complete(prompt=PROMPT, memory="notes", max_tokens=10**6)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] < 10**5
        assert time.monotonic() - start >= 0.5
        status, answer = served.call("/v1/memories", {"text": "many words " * 50_000})
        assert (status, answer["error"]["code"]) == (400, "time_limit_exceeded")
        assert served.server.memories.num_private == 0


def test_a_private_memory_ends_when_it_was_not_used_for_long(model_folder):
    with serve(model_folder, {}, private={"age_s": 0.05}) as served:
        made = served.call("/v1/memories", {"text": "alpha beta"})[1]["id"]
        assert served.server.memories.knows(made)
        time.sleep(0.06)
        served.server.memories.expire()
        assert not served.server.memories.knows(made)


def test_a_private_memory_that_is_deleted_while_a_text_is_read_stays_deleted(model_folder):
    with serve(model_folder, {}) as served, ThreadPoolExecutor() as pool:
        made = served.call("/v1/memories", {"text": "alpha"})[1]["id"]
        more = {"text": "many words " * 5_000, "name": "more", "memory": made}
        reading = pool.submit(served.call, "/v1/memories", more)
        served.wait_until("memorizing_running", 1)
        assert served.call(f"/v1/memories/{made}", method="DELETE")[0] == 200
        status, answer = reading.result()
        assert (status, answer["error"]["code"]) == (404, "memory_not_found")
        assert served.server.memories.num_private == 0


def test_a_memory_in_a_folder_whose_name_is_not_utf8_is_listed_and_asked(model_folder, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9.memory")
    write_memory(model_folder, folder, NOTES)
    folders = name_memories([folder])
    with serve(model_folder, folders) as served:
        names = [one["id"] for one in served.call("/v1/models")[1]["data"]]
        assert names == [MODEL, f"{MODEL}+caf\\udce9"]
        assert served.complete(model=names[1], prompt=PROMPT)["sources"]


def test_a_folder_that_is_replaced_added_to_or_removed_is_followed(model_folder, tmp_path):
    loaded = load_tiny(model_folder)
    folder = write_memory(model_folder, tmp_path / "my.memory", NOTES)
    with serve(model_folder, {"my": folder}) as served:

        def list_documents() -> set[str]:
            answer = served.complete(prompt=PROMPT, memory="my", max_tokens=2)
            return {one["document"] for one in answer["sources"]}

        assert list_documents() == set(NOTES)
        # Another process adds to it.
        model, tokenizer = loaded
        add_memory(model, layers=[1], window=17, read="entries")
        with open_memory(model, folder, keep_text=True) as memory:
            memory.read(tokenizer, OTHERS, progress=False)
            assert list_documents() == {*NOTES, *OTHERS}
            memory.forget("alpha.txt")
        assert list_documents() == {"beta.txt", *OTHERS}
        # Another one takes its place.
        other = write_memory(model_folder, tmp_path / "other.memory", OTHERS)
        folder.rename(tmp_path / "old")
        status, answer = served.call(
            "/v1/completions", {"model": MODEL, "prompt": "a", "memory": "my"}
        )
        assert (status, answer["error"]["type"]) == (503, "server_error")
        other.rename(folder)
        assert list_documents() == set(OTHERS)
        before = {path: path.read_bytes() for path in sorted(folder.rglob("*"))}
        served.complete(prompt=PROMPT, memory="my", max_tokens=2)
        assert {path: path.read_bytes() for path in sorted(folder.rglob("*"))} == before
        shutil.rmtree(folder)


def test_memories_that_one_model_would_not_read_alike_are_refused(model_folder, notes, tmp_path):
    model, tokenizer = load_tiny(model_folder)
    add_memory(model, layers=[1], window=19, read="entries")
    with open_memory(model, tmp_path / "wide") as memory:
        memory.read(tokenizer, OTHERS, progress=False)
    from memorizing.errors import MemoryFolderError

    with (
        pytest.raises(MemoryFolderError, match="wide"),
        serve(model_folder, {"notes": notes, "wide": tmp_path / "wide"}),
    ):
        pass


def test_what_goes_wrong_inside_is_told_to_nobody(model_folder, notes, monkeypatch, capsys):
    with serve(model_folder, {"notes": notes}) as served:

        def fail(*_: Any) -> None:
            raise ZeroDivisionError("a secret")

        handle = served.model.register_forward_pre_hook(fail)
        body = {"model": WITH_NOTES, "prompt": "a"}
        status, answer = served.call("/v1/completions", body)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        with (
            openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as client,
            pytest.raises(openai.APIError, match="see its log"),
        ):
            list(client.completions.create(**body, stream=True))
        handle.remove()
        assert served.complete(prompt="a", memory="notes")["usage"]["completion_tokens"] == 16
        assert "a secret" in capsys.readouterr().err


def test_counts_are_those_of_the_requests(model_folder, notes):
    with serve(model_folder, {"notes": notes}) as served:
        served.complete(prompt=PROMPT, max_tokens=7, memory="notes")
        served.complete(prompt=PROMPT, max_tokens=5)
        served.call("/v1/completions", b"{")
        metrics = served.read_metrics()
    path = 'memorizing_requests_total{path="/v1/completions",status='
    assert (metrics[path + '"200"}'], metrics[path + '"400"}']) == (2, 1)
    assert metrics['memorizing_tokens_total{kind="prompt"}'] == 2 * len(PROMPT)
    assert metrics['memorizing_tokens_total{kind="completion"}'] == 12
    assert metrics["memorizing_first_token_seconds_count"] == 2
    assert metrics["process_open_fds"] > 3


def test_an_error_has_the_type_of_its_status():
    kinds = {401: "authentication_error", 404: "invalid_request_error", 503: "server_error"}
    for status, kind in kinds.items():
        assert RequestError(status, "why").to_dict()["error"]["type"] == kind
