"""Passages that are kept as entries of all layers stand in the room as they were read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.huggingface import open_memory
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.passage_room import Passage, plan_room
from memorizing.huggingface.attaching.window_cache import TextState, find_text
from memorizing.memory import MemoryFolder
from tests.huggingface.attaching.all_families import make_config
from tests.huggingface.sessions.tools import DOCUMENTS, TOKENIZER, read_all
from tests.huggingface.tools import (
    CONFIGS,
    FAMILY_AND_IMPLEMENTATION,
    SEGMENT_LEN,
    WINDOW,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
    pad_left,
    read,
)

NUM_PASSAGES, PASSAGE_LEN = 2, 23
ROOM_LEN = NUM_PASSAGES * PASSAGE_LEN + 1
ROTARY = [pair for pair in FAMILY_AND_IMPLEMENTATION if pair[0] != "gpt2"]


def give_passages(model: Any, **settings: Any) -> Attachment:
    chosen: dict[str, Any] = {"read": "passages", "keep": "entries", "temperature": 0.2}
    chosen |= {"num_passages": NUM_PASSAGES, "passage_len": PASSAGE_LEN, "passage_margin": 20.0}
    return give_memory(model, **chosen | settings)


@torch.no_grad()
def ask(model: Any, length: int = 11) -> tuple[Tensor, TextState]:
    cache = model.memorizing.make_cache()
    logits = call(model, make_tokens(1, length), cache).logits
    return logits, find_text(cache)


@torch.no_grad()
def read_to_place(family: str, implementation: str, passage: Passage, first: int) -> DynamicCache:
    """A document read as ever, but at positions that put a passage's first token at `first`."""
    assert passage.document is not None
    ids = torch.tensor([TOKENIZER(DOCUMENTS[passage.document])["input_ids"]])
    position = torch.arange(ids.shape[1]) + first - passage.start
    cache = DynamicCache()
    call(find_model(family, implementation), ids, cache, position_ids=position.unsqueeze(0))
    return cache


@pytest.mark.parametrize(("family", "implementation"), ROTARY)
def test_the_room_holds_what_documents_were_read_as_at_the_places_where_it_stands(
    family, implementation
):
    model = find_model(family, implementation)
    give_passages(model)
    with open_memory(model) as memory:
        read_all(memory)
        _, text = ask(model)
    room = text.room
    assert room is not None
    assert len(room.passages[0]) == NUM_PASSAGES
    end = room.length
    for passage in room.passages[0]:
        span = slice(end - len(passage.ids), end)
        end = span.start
        first = ROOM_LEN - room.length + span.start
        read_again = read_to_place(family, implementation, passage, first)
        for held, layer in zip(room.layers, read_again.layers, strict=True):
            for found, whole in zip(held, (layer.keys, layer.values), strict=True):
                wanted = whole[:, :, passage.start : passage.end]
                assert torch.allclose(found[:, :, span], wanted, atol=1e-5)
    assert end == 1
    assert room.ids[0].tolist() == [1] + [-1] * (room.length - 1)


@pytest.mark.parametrize(("family", "implementation"), ROTARY)
def test_a_whole_document_behind_its_start_token_is_the_text_read_again(family, implementation):
    document = {"third": DOCUMENTS["third"]}
    logits = []
    for keep in ("text", "entries"):
        model = find_model(family, implementation)
        give_passages(
            model, keep=keep, num_passages=1, passage_len=41, best_readings=1, num_sinks=1
        )
        with open_memory(model) as memory:
            read_all(memory, document)
            found, text = ask(model)
        assert text.room is not None
        assert text.room.length == 39
        logits.append(found)
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - {"gpt2"}))
def test_rows_with_padding_are_what_they_are_alone(family):
    model = find_model(family)
    attachment = give_passages(model)
    texts = [make_tokens(1, length, seed=length + 60)[0] for length in (5, 11, 8)]
    tokens, mask = pad_left(texts)
    with open_memory(model) as memory, torch.no_grad():
        read_all(memory)
        cache = attachment.make_cache()
        position = (mask.cumsum(1) - 1).clamp(min=0)
        together = call(model, tokens, cache, attention_mask=mask, position_ids=position).logits
        alone = []
        for text in texts:
            own = attachment.make_cache()
            alone.append(call(model, text.unsqueeze(0), own).logits[0])
    room = find_text(cache).room
    assert room is not None
    assert len(set(room.passages)) > 1
    for row, text in enumerate(texts):
        assert torch.allclose(together[row, -len(text) :], alone[row], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3"])
def test_a_texts_own_passages_are_read_again_and_moved_between_those_that_are_kept(family):
    model, tokens = find_model(family), make_tokens(2, 5 * SEGMENT_LEN + 1)
    attachment = give_passages(model, num_passages=4)
    with open_memory(model) as memory, torch.no_grad():
        read_all(memory, {"third": DOCUMENTS["third"]})
        cache = attachment.make_cache()
        read(model, tokens[:, :-1], SEGMENT_LEN, cache=cache)
        call(model, tokens[:, -1:], cache)
    room = find_text(cache).room
    assert room is not None
    for row, passages in enumerate(room.passages):
        own = [one.ids for one in reversed(passages) if one.document is None]
        assert 0 < len(own) < len(passages)
        ids = torch.cat([torch.tensor([1]), *own]).unsqueeze(0)
        columns = (room.ids[row] >= 0).nonzero().flatten()
        columns = columns[columns >= room.first[row]]
        assert torch.equal(room.ids[row][columns], ids[0])
        plain, values = DynamicCache(), DynamicCache()
        with torch.no_grad():
            call(find_model(family), ids, values)
            # The first layer's keys see nothing but their token: they are turned to any place.
            place = columns - room.length + int(room.before[0]) - int(find_text(cache).shift[0])
            place = place.unsqueeze(0)
            call(find_model(family), ids, plain, position_ids=place)
        assert torch.allclose(
            room.layers[0][0][row][:, columns], plain.layers[0].keys[0], atol=1e-4
        )
        for held, layer in zip(room.layers, values.layers, strict=True):
            assert torch.allclose(held[1][row][:, columns], layer.values[0], atol=1e-5)


@pytest.mark.parametrize("length", [11, 2 * WINDOW + 5])
def test_with_nothing_stored_a_text_within_the_window_is_bit_for_bit_that_of_the_model(length):
    model, tokens = find_model(), make_tokens(1, length)
    with torch.no_grad():
        wanted = read(model, tokens, SEGMENT_LEN)[:, :WINDOW]
    attachment = give_passages(model)
    with memory_open(attachment), torch.no_grad():
        found = read(model, tokens, SEGMENT_LEN)[:, :WINDOW]
    assert torch.equal(found, wanted)


def test_what_was_read_is_found_as_by_texts():
    found = []
    for keep in ("text", "entries"):
        model = find_model()
        give_passages(model, keep=keep)
        with open_memory(model) as memory:
            read_all(memory)
            found.append(ask(model)[1].room)
    texts, entries = found
    assert texts is not None
    assert entries is not None
    best, *others = texts.passages[0]
    assert others[0] == best
    for mine, other in zip(others, entries.passages[0], strict=True):
        assert (mine.document, mine.start, mine.end) == (other.document, other.start, other.end)
        assert mine.score == pytest.approx(other.score, rel=1e-4)


def test_models_whose_entries_cannot_be_kept_or_moved_are_refused():
    with pytest.raises(ConfigError, match="keep is 'entries'; allowed: text, since .* positions"):
        give_passages(find_model("gpt2"))
    model = make_model("llama", bos_token_id=None, eos_token_id=None)
    with pytest.raises(ConfigError, match="text, since this model has no bos_token_id"):
        give_passages(model)
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma4_text", **make_config("gemma4_text"))
    with pytest.raises(ConfigError, match=r"this model has layers with other heads \(\[\("):
        give_passages(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    for settings, message in (
        ({"read": "entries"}, "keep is 'entries'; allowed: text, unless passages are read"),
        ({"search": "normalized"}, "inner_product where keep is entries"),
    ):
        with pytest.raises(ConfigError, match=message):
            give_passages(find_model(), **settings)


@pytest.mark.parametrize("way", ["passages", "both"])
def test_a_folder_is_opened_again_and_without_a_tokenizer_heads_alone_find(
    tmp_path: Path, way: str
):
    model, path = find_model(), tmp_path / "memory"
    give_passages(model, read=way)
    with open_memory(model, path) as memory:
        read_all(memory)
        wanted, _ = ask(model)
        with memory.record() as sources:
            assert torch.equal(ask(model)[0], wanted)
    assert {name for name, _ in sources.list()} <= set(DOCUMENTS)
    assert all(one.text in DOCUMENTS[str(one.document)] for one in sources.passages)
    assert MemoryFolder.open(path).description.layers == (0, 1, 2)
    followed = find_model()
    with open_memory(followed, path, tokenizer=TOKENIZER):
        assert torch.equal(ask(followed)[0], wanted)
    with open_memory(followed, path):
        (found,) = ask(followed)[1].room.passages
    assert len(found) == NUM_PASSAGES


def test_what_is_merged_and_forgotten_is_that_of_all_layers(tmp_path: Path):
    model, names = find_model(), list(DOCUMENTS)
    give_passages(model)
    for name in names:
        with open_memory(model, tmp_path / name) as memory:
            read_all(memory, {name: DOCUMENTS[name]})
    with open_memory(model) as memory:
        read_all(memory, {name: DOCUMENTS[name] for name in names[1:]})
        wanted, text = ask(model)
    MemoryFolder.merge([tmp_path / name for name in names], tmp_path / "all")
    with open_memory(model, tmp_path / "all") as memory:
        memory.forget(names[0])
        found, other = ask(model)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert text.room is not None
    assert other.room is not None
    assert text.room.passages == other.room.passages


def test_passages_stay_readable_while_documents_are_read(tmp_path: Path):
    model = find_model()
    attachment = give_passages(model)
    with open_memory(model, tmp_path / "memory") as memory:
        read_all(memory, {"first": DOCUMENTS["first"]})
        wanted, _ = ask(model)
        opened = attachment.opened
        read_all(memory)
        with attachment.change_mode(opened=opened):
            assert torch.equal(ask(model)[0], wanted)


def test_entries_of_one_byte_are_close(tmp_path: Path):
    logits = []
    for dtype in (None, "int8"):
        model = find_model()
        give_passages(model)
        with open_memory(model, tmp_path / str(dtype), dtype=dtype) as memory:
            read_all(memory)
            logits.append(ask(model)[0])
    assert torch.allclose(*logits, atol=0.2)
    assert not torch.equal(*logits)


def test_a_memory_without_all_layers_names_the_command_that_makes_one(tmp_path: Path):
    model = find_model()
    give_passages(model, keep="text")
    with open_memory(model, tmp_path / "texts") as memory:
        read_all(memory)
    give_passages(find_model())
    message = r"entries of layers \[1\].* need those of all, \[0, 1, 2\].*--set keep=entries"
    with pytest.raises(MemoryFolderError, match=message):
        open_memory(model, tmp_path / "texts")
    with open_memory(model, tmp_path / "entries") as memory:
        read_all(memory)
    give_passages(find_model(), keep="text")
    with pytest.raises(MemoryFolderError, match=r"has entries of layers \[0, 1, 2\]"):
        open_memory(model, tmp_path / "entries", tokenizer=TOKENIZER)


def test_entries_belong_to_all_weights():
    model = make_model()
    attachment = give_passages(model)
    before = attachment.fingerprint()
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] += 1
    assert attachment.fingerprint() != before


def test_what_stands_in_the_room_stays_readable_when_it_is_forgotten(path: Path | None):
    model = find_model()
    attachment = give_passages(model)
    with open_memory(model, path) as memory, torch.no_grad():
        read_all(memory)
        cache = attachment.make_cache()
        call(model, make_tokens(3, 11, seed=4), cache)
        before = find_text(copy.deepcopy(cache)).room
        for name in DOCUMENTS:
            memory.forget(name)
        assert before is not None
        found = attachment._read_room(plan_room(before.passages, 1), None)
    assert found is not None
    assert all(passage.kept is not None for row in found.passages for passage in row)
    for held, old in zip(found.read, before.read, strict=True):
        assert torch.equal(held[0], old[0])
        assert torch.equal(held[1], old[1])
