"""What a model has read: open for a while, in a folder or not, and by document."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from memorizing.errors import MemoryFolderError
from memorizing.huggingface import MemorySession, open_memory
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.memory import FrozenMemory

from ..tools import (
    LAYER,
    NUM_SINKS,
    SEGMENT_LEN,
    VOCAB_SIZE,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
    read,
)

QUESTION = make_tokens(2, 41, seed=11)


def make_tokenizer(first: int = 3) -> Any:
    """Words w<number> -> number; a start token before every text."""
    words = {f"w{number}": number for number in range(first, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


TOKENIZER = make_tokenizer()
DOCUMENTS = {
    name: " ".join(f"w{token}" for token in make_tokens(1, length, seed=length)[0].tolist())
    for name, length in (("first", 67), ("second", 30), ("third", 38))
}
"""68, 31 and 39 tokens with the start token; all but the first three of each are entries."""
NUM_ENTRIES = {"first": 65, "second": 28, "third": 36}


def ask(model: Any) -> Tensor:
    with torch.no_grad():
        return read(model, QUESTION, SEGMENT_LEN)


def read_all(memory: MemorySession, documents: Any = None) -> Any:
    return memory.read(TOKENIZER, DOCUMENTS if documents is None else documents, progress=False)


def fetch_entries(model: Any, layer: int = LAYER) -> tuple[Tensor, Tensor]:
    """Keys and values (H, n, D) that are open now."""
    base = get_attachment(model).opened.base[layer]
    blocks = [block.load() for block in base.blocks]
    return (
        torch.cat([block.keys[0] for block in blocks], 1),
        torch.cat([block.values[0] for block in blocks], 1),
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


def test_what_was_read_is_retrieved_from_the_first_token_on():
    model = find_model()
    give_memory(model)
    without = ask(model)
    with open_memory(model) as memory:
        only_own = ask(model)
        read_all(memory)
        found = ask(model)
    assert (found[:, 0] - without[:, 0]).abs().max() > 1e-3
    assert (found[:, -1] - only_own[:, -1]).abs().max() > 1e-3
    assert torch.equal(ask(model), without)


def test_what_was_read_and_a_texts_own_memory_are_searched_as_one():
    model = find_model()
    # Above the memory there is nothing that mixes tokens.
    attachment = give_memory(model, layers=[2], combine="gate")
    with open_memory(model) as memory:
        read_all(memory)
        keys, values = fetch_entries(model, 2)
        cache = attachment.make_cache()
        with torch.no_grad():
            found = read(model, QUESTION[:1, :27], SEGMENT_LEN, cache=cache)
        own = attachment.find_history(cache).memories[2]
        # The same entries, all of them read before; and no text of its own.
        span = slice(NUM_SINKS, 2 * SEGMENT_LEN)
        joined = FrozenMemory.from_tensors(
            torch.cat([keys, own.keys[0, :, span]], 1),
            torch.cat([values, own.values[0, :, span]], 1),
        )
        attachment.bind({2: joined})
        attachment.settings = replace(attachment.settings, capacity=0)
        with torch.no_grad():
            expected = model(QUESTION[:1, :27]).logits
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=1e-5)
    assert (found[:, 5] - expected[:, 5]).abs().max() > 1e-3


def test_a_folder_and_no_folder_give_the_same_logits(tmp_path: Path):
    model = find_model()
    give_memory(model)
    found = []
    for path in (None, tmp_path / "a.memory"):
        with open_memory(model, path) as memory:
            read_all(memory)
            found.append(ask(model))
    with open_memory(model, tmp_path / "a.memory") as memory:
        found.append(ask(model))
        memory.save(tmp_path / "b.memory")
    with open_memory(model) as memory:
        read_all(memory)
        memory.save(tmp_path / "c.memory")
    for name in ("b", "c"):
        with open_memory(model, tmp_path / f"{name}.memory"):
            found.append(ask(model))
    assert all(torch.equal(one, found[0]) for one in found)


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


def test_a_memory_that_is_not_entered_changes_nothing_of_one_that_is(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model) as memory:
        read_all(memory, {"first": DOCUMENTS["first"]})
        expected = ask(model)
        other = open_memory(model, path)
        read_all(other)
        torch.testing.assert_close(ask(model), expected, rtol=0, atol=0)
        other.forget("second")
        torch.testing.assert_close(ask(model), expected, rtol=0, atol=0)
        # Leaving one twice, or one that was never entered.
        other.__exit__(None, None, None)
        torch.testing.assert_close(ask(model), expected, rtol=0, atol=0)
    assert not get_attachment(model).is_bound
    read_all(memory, {"third": DOCUMENTS["third"]})
    assert not get_attachment(model).is_bound


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


def test_a_document_is_forgotten(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory, {name: DOCUMENTS[name] for name in ("first", "third")})
        expected = ask(model)
    if path is not None:
        shutil.rmtree(path)
    with open_memory(model, path) as memory:
        read_all(memory)
        assert not torch.equal(ask(model), expected)
        memory.forget("second")
        assert [document.name for document in memory.documents] == ["first", "third"]
        assert torch.equal(ask(model), expected)
        with pytest.raises(MemoryFolderError, match="no document 'second'"):
            memory.forget("second")


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
