"""Several threads with one model: what a call collects, controls or tells is its alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing.huggingface import open_memory
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.sessions.reading import read_tokens
from memorizing.huggingface.sessions.scoring import score_texts
from tests.huggingface.tools import (
    LAYER,
    SEGMENT_LEN,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    read,
)

PROMPT = make_tokens(2, 37, seed=11)
TEXT = make_tokens(1, 41, seed=3)[0]


@contextmanager
def interrupt_calls(model: Any, other: Callable[[], Any]) -> Iterator[list[Any]]:
    """In the middle of this thread's first two calls, another thread runs `other` to its end."""
    mine, results = threading.get_ident(), []
    with ThreadPoolExecutor(1) as pool:

        def interrupt(*_: Any) -> None:
            if threading.get_ident() == mine and len(results) < 2:
                results.append(pool.submit(other).result())

        handle = model.base_model.layers[0].register_forward_hook(interrupt)
        try:
            yield results
        finally:
            handle.remove()


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        return read(model, PROMPT, SEGMENT_LEN)


def collect(model: Any) -> Tensor:
    pieces = [entries[LAYER] for entries in read_tokens(get_attachment(model), TEXT)]
    return torch.cat([torch.cat(piece) for piece in pieces], 1)


def score(model: Any, control: Any) -> Tensor:
    texts = [TEXT.numpy(), PROMPT[0].numpy()]
    nats = score_texts(model, texts, 1, control=control)
    return torch.cat([torch.from_numpy(part) for part in nats])


def record(model: Any, memory: Any) -> Tensor:
    with memory.record() as sources:
        answer(model)
    return torch.tensor([sources.own_mass, *(share for _, share in sources.list())])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("read", "answer"),
        ("read", "read"),
        ("answer", "read"),
        ("answer", "shuffled"),
        ("other_document", "answer"),
        ("off", "record"),
        ("record", "answer"),
    ],
)
def test_a_call_in_the_middle_of_another_threads_changes_neither(first: str, second: str):
    model = find_model()
    give_memory(model)
    with open_memory(model) as memory:
        memory._store.append(*make_document(get_attachment(model)))
        memory._bind()

        def run(what: str) -> Tensor:
            if what == "read":
                return collect(model)
            if what == "record":
                return record(model, memory)
            return answer(model) if what == "answer" else score(model, what)

        expected, others = run(first), run(second)
        with interrupt_calls(model, lambda: run(second)) as results:
            found = run(first)
        assert not get_attachment(model).mode.listeners
    assert torch.equal(found, expected)
    assert len(results) == 2
    assert all(torch.equal(result, others) for result in results)


def make_document(attachment: Any) -> tuple[list[Any], dict[int, tuple[Tensor, Tensor]]]:
    """Random entries of a document that was read."""
    from memorizing.memory import NewDocument

    keys, values = torch.randn(2, 2, 23, 10, generator=torch.Generator().manual_seed(5))
    return [NewDocument("first", 23, 23, "0" * 64)], {LAYER: (keys, values)}


def test_recordings_that_overlap_end_each_by_itself():
    model = find_model()
    attachment = give_memory(model)
    with open_memory(model) as memory:
        memory._store.append(*make_document(attachment))
        memory._bind()
        first, second = memory.record(), memory.record()
        sources = first.__enter__()
        answer(model)
        others = second.__enter__()
        first.__exit__(None, None, None)
        mass = dict(sources.list())
        answer(model)
        second.__exit__(None, None, None)
        answer(model)
        assert dict(sources.list()) == dict(others.list()) == mass
        assert sources.own_mass == others.own_mass > 0
    assert not attachment.mode.listeners


def test_eight_threads_generate_from_one_open_memory():
    model = make_model()
    attachment = give_memory(model)

    def generate(seed: int) -> Tensor:
        tokens = make_tokens(1, 11 + seed, seed=seed)
        return model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)

    with open_memory(model) as memory:
        memory._store.append(*make_document(attachment))
        memory._bind()
        expected = [generate(seed) for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(generate, range(8)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
