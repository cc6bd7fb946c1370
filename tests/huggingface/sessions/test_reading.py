"""Documents through a model into memory: what becomes an entry, and what an interrupt leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.data import Document
from memorizing.errors import CorpusError, MemoryFolderError
from memorizing.huggingface import open_memory
from tests.huggingface.sessions.tools import (
    DOCUMENTS,
    NUM_ENTRIES,
    TOKENIZER,
    ask,
    fetch_entries,
    read_all,
)
from tests.huggingface.tools import (
    LAYER,
    NUM_SINKS,
    SEGMENT_LEN,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
)


def test_reading_makes_every_token_an_entry_but_the_first(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        report = read_all(memory)
        assert (report.num_documents, report.num_tokens) == (3, 68 + 31 + 39)
        assert report.num_entries == memory.num_entries == sum(NUM_ENTRIES.values())
        found = {document.name: document.num_entries for document in memory.documents}
    assert found == NUM_ENTRIES
    assert report.skipped == []


@pytest.mark.parametrize("layers", [[LAYER], [0, LAYER], [2]])
def test_entries_are_those_of_a_full_forward_pass(layers: list[int]):
    model = find_model()
    attachment = give_memory(model, layers=layers, capacity=89)
    tokens = torch.tensor([TOKENIZER(DOCUMENTS["first"])["input_ids"]])
    # Two segments more, so that all of the document is written.
    more = torch.cat([tokens, make_tokens(1, 2 * SEGMENT_LEN)], 1)
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        call(model, more, cache)
        memories = attachment.find_history(cache).memories
    with open_memory(model) as memory:
        read_all(memory, {"first": DOCUMENTS["first"]})
        for layer in layers:
            keys, values = fetch_entries(model, layer)
            expected = memories[layer]
            span = slice(NUM_SINKS, tokens.shape[1])
            torch.testing.assert_close(keys, expected.keys[0, :, span], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, expected.values[0, :, span], rtol=1e-4, atol=1e-5)


def test_a_documents_entries_do_not_depend_on_others(path: Path | None):
    model = find_model()
    give_memory(model)
    found = []
    for names in (["second"], ["first", "second"]):
        with open_memory(model) as memory:
            for name in names:
                read_all(memory, {name: DOCUMENTS[name]})
            found.append(fetch_entries(model)[0][:, -NUM_ENTRIES["second"] :])
    assert torch.equal(*found)


def test_nothing_is_trained_and_the_mode_of_the_model_stays():
    model = make_model().train()
    give_memory(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open_memory(model) as memory:
        read_all(memory)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_reading_again_skips_what_is_there(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory, {"first": DOCUMENTS["first"]})
        report = read_all(memory)
        assert report.skipped == ["first"]
        assert report.num_documents == 2
        assert read_all(memory).skipped == ["first", "second", "third"]
        assert memory.num_entries == sum(NUM_ENTRIES.values())


def test_reading_goes_on_after_an_interrupt(path: Path | None):
    model = find_model()
    give_memory(model)

    def interrupted() -> Iterator[tuple[str, str]]:
        for count, pair in enumerate(DOCUMENTS.items()):
            if count == 2:
                raise KeyboardInterrupt
            yield pair

    with open_memory(model, path) as memory:
        with pytest.raises(KeyboardInterrupt):
            read_all(memory, interrupted())
        # What was read whole is there, and is read by the model.
        assert [document.name for document in memory.documents] == ["first", "second"]
        assert fetch_entries(model)[0].shape[1] == 65 + 28
        assert read_all(memory).skipped == ["first", "second"]
        stopped = ask(model)
    with open_memory(model) as memory:
        read_all(memory)
        assert torch.equal(ask(model), stopped)


def test_an_interrupt_within_a_document_leaves_it_out(path: Path | None):
    model = find_model()
    give_memory(model)
    calls = []

    def interrupt(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 8:  # in the second document
            raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(interrupt)
    with open_memory(model, path) as memory:
        with pytest.raises(KeyboardInterrupt):
            read_all(memory)
        hook.remove()
        assert [document.name for document in memory.documents] == ["first"]
        assert read_all(memory).num_documents == 2


def test_a_document_that_is_updated_is_there_at_every_moment(path: Path | None):
    model = find_model()
    give_memory(model)
    changed = {"first": DOCUMENTS["first"], "second": DOCUMENTS["second"] + " w5 w7"}

    def interrupted() -> Iterator[tuple[str, str]]:
        yield "second", changed["second"]
        yield "third", "w5 w6 w7 w8 w9"
        assert {one.name for one in memory.documents} == set(DOCUMENTS)
        raise KeyboardInterrupt

    with open_memory(model, path) as memory:
        read_all(memory)
        before = memory.documents
        calls = []

        def interrupt(module: Any, args: Any) -> None:
            calls.append(1)
            raise KeyboardInterrupt

        hook = model.model.layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            memory.read(TOKENIZER, changed, update=True, progress=False)
        hook.remove()
        assert calls
        assert memory.documents == before
        assert memory.read(TOKENIZER, changed, update=True, progress=False).skipped == ["first"]
        assert [one.name for one in memory.documents] == ["first", "third", "second"]
        updated = ask(model)
        with pytest.raises(MemoryFolderError, match="'second' with another text"):
            read_all(memory)
    with open_memory(model) as memory:
        read_all(memory, {"first": "", "third": DOCUMENTS["third"]} | changed)
        assert torch.allclose(ask(model), updated, atol=1e-5)
        with pytest.raises(KeyboardInterrupt):
            memory.read(TOKENIZER, interrupted(), update=True, progress=False)
        assert [one.num_tokens for one in memory.documents] == [68, 33, 6]


@pytest.mark.parametrize(("text", "is_kept"), [("", False), ("w5 w6", False), ("w5 w6 w7", True)])
def test_documents_that_leave_nothing_in_memory_are_named(
    path: Path | None, text: str, is_kept: bool
):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        report = read_all(memory, {"short": text, **DOCUMENTS})
        assert report.without_entries == ([] if is_kept else ["short"])
        assert memory.num_entries == report.num_entries == sum(NUM_ENTRIES.values()) + is_kept


def test_reading_tells_every_segment_to_who_asks(path: Path | None):
    model = find_model()
    give_memory(model)
    told: dict[str, list[int]] = {}
    with open_memory(model, path) as memory:

        def tell(name: str, count: int) -> None:
            told.setdefault(name, []).append(count)

        memory.read(TOKENIZER, DOCUMENTS, progress=tell)
    assert {name: sum(counts) for name, counts in told.items()} == {
        "first": 68, "second": 31, "third": 39
    }  # fmt: skip
    assert told["second"] == [13, 13, 5]


@pytest.mark.parametrize("text", ["", "w5", "w5 w6 w7"])
def test_documents_with_few_tokens_are_read(path: Path | None, text: str):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        report = read_all(memory, {"short": text})
        assert report.num_documents == 1
        assert report.num_entries == max(0, report.num_tokens - NUM_SINKS)
        ask(model)
        assert read_all(memory).skipped == []
        assert memory.num_entries == report.num_entries + sum(NUM_ENTRIES.values())


def test_documents_may_be_given_in_several_ways():
    model = find_model()
    give_memory(model)
    found = []
    for given in (
        DOCUMENTS,
        list(DOCUMENTS.items()),
        [Document(name, text) for name, text in DOCUMENTS.items()],
        (Document(name, text) for name, text in DOCUMENTS.items()),
    ):
        with open_memory(model) as memory:
            read_all(memory, given)
            found.append(fetch_entries(model)[0])
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("given", ["a text", ["a text"], [("", "text")], [("name", 3)], [4]])
def test_what_is_no_document_is_refused(given: Any):
    model = find_model()
    give_memory(model)
    with open_memory(model) as memory, pytest.raises(CorpusError):
        read_all(memory, given)
