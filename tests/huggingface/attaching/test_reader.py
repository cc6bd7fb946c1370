"""A model that reads passages: it makes of a text what it makes of passages and text as one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.huggingface import open_memory, remove_memory
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import Passage
from memorizing.huggingface.attaching.reader import _exchange
from memorizing.huggingface.attaching.window_cache import TextState, find_text
from memorizing.huggingface.releases import CACHE_NAME
from memorizing.huggingface.sessions.scoring import score_texts
from tests.huggingface.sessions.tools import DOCUMENTS, TOKENIZER, make_tokenizer, read_all
from tests.huggingface.tools import (
    CONFIGS,
    FAMILY_AND_IMPLEMENTATION,
    NUM_SINKS,
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
LONG_DOCUMENTS = {
    name: " ".join(f"w{token}" for token in make_tokens(1, length, seed=length)[0].tolist())
    for name, length in (("one", 131), ("two", 97))
}
ROOM_LEN = (NUM_PASSAGES + 1) * PASSAGE_LEN + 1


def give_passages(model: Any, **settings: Any) -> Attachment:
    chosen: dict[str, Any] = {"read": "passages", "temperature": 0.2}
    chosen |= {"num_passages": NUM_PASSAGES, "passage_len": PASSAGE_LEN, "passage_margin": 20.0}
    return give_memory(model, **chosen | settings)


@torch.no_grad()
def run_pasted(text: TextState, tokens: Tensor, family: str, implementation: str) -> Tensor:
    """Logits of the last tokens of start token, passages and text as one text, without memory."""
    assert text.room is not None
    pasted = torch.cat([text.room.ids[:1, int(text.room.first[0]) :], tokens], 1)
    logits = find_model(family, implementation)(pasted).logits
    return logits[:, -tokens.shape[1] :]


@pytest.mark.parametrize(("family", "implementation"), FAMILY_AND_IMPLEMENTATION)
def test_a_text_behind_passages_is_one_text_with_them(family, implementation):
    model, tokens = find_model(family, implementation), make_tokens(1, 22)
    attachment = give_passages(model)
    with open_memory(model) as memory, torch.no_grad():
        read_all(memory)
        cache = attachment.make_cache()
        first = call(model, tokens[:, :11], cache).logits
        later = [call(model, tokens[:, [place]], cache).logits for place in range(11, 22)]
        text = find_text(cache)
    assert text.room is not None
    assert [one.document for one in text.room.passages[0]]
    assert text.room.length > 1 + PASSAGE_LEN
    wanted = run_pasted(text, tokens, family, implementation)
    assert torch.allclose(torch.cat([first, *later], 1), wanted, atol=1e-4)


def test_passages_are_their_documents_tokens_the_best_one_last():
    model = find_model()
    attachment = give_passages(model)
    with open_memory(model) as memory, torch.no_grad():
        read_all(memory)
        cache = attachment.make_cache()
        call(model, make_tokens(1, 11), cache)
    room = find_text(cache).room
    assert room is not None
    tokens = {name: TOKENIZER(text)["input_ids"] for name, text in DOCUMENTS.items()}
    best, again, second = room.passages[0]
    assert again == best
    assert best.score > second.score > 0
    wanted = [1]
    for one in (second, best, best):
        assert one.document is not None
        assert NUM_SINKS <= one.start < one.end <= len(tokens[one.document])
        assert one.start <= one.chunk < one.end or one.end - one.start == PASSAGE_LEN
        wanted += tokens[one.document][one.start : one.end]
    assert room.ids[0].tolist() == wanted


def test_passages_have_the_words_that_heads_do_not_look_at():
    model = make_model("llama")
    tokens = {name: TOKENIZER(text)["input_ids"] for name, text in LONG_DOCUMENTS.items()}
    common = tokens["one"][37::5]
    with torch.no_grad():
        model.get_input_embeddings().weight[common] = 0  # and so are their values in layer 0
    attachment = give_passages(model, layers=[0])
    with open_memory(model, tokenizer=TOKENIZER) as memory, torch.no_grad():
        memory.read(TOKENIZER, LONG_DOCUMENTS)
        cache = attachment.make_cache()
        call(model, torch.tensor([tokens["one"][40:61]]), cache)
        assert attachment.opened is not None
        assert int(attachment.opened.collection.is_sink.sum()) >= len(common)
    room = find_text(cache).room
    assert room is not None
    for one in room.passages[0]:
        assert one.document is not None
        assert one.ids.tolist() == tokens[one.document][one.start : one.end]
    assert set(common) & set(room.passages[0][0].ids.tolist())


def test_special_tokens_of_a_text_stand_in_no_passage_of_it_where_they_are_sinks():
    model, tokens = make_model("llama"), make_tokens(1, 6 * SEGMENT_LEN)
    special, word = model.config.eos_token_id, 37
    tokens[:, 7::9], tokens[:, 4::9] = special, word
    with torch.no_grad():
        model.get_input_embeddings().weight[[special, word]] = 0
    attachment = give_passages(model, layers=[0])
    with memory_open(attachment), torch.no_grad():
        cache = attachment.make_cache()
        read(model, tokens, SEGMENT_LEN, cache=cache)
    room = find_text(cache).room
    assert room is not None
    for one in room.passages[0]:
        assert one.document is None
        there = tokens[0, one.start : one.end]
        assert special in there
        assert word in there
        assert one.ids.tolist() == there[there != special].tolist()


def test_passages_that_are_given_stand_there_and_none_are_looked_for():
    model, tokens = find_model(), make_tokens(1, 11)
    attachment = give_passages(model)
    with open_memory(model) as memory, torch.no_grad():
        empty = call(model, tokens, attachment.make_cache()).logits
        read_all(memory)
        cache = attachment.make_cache()
        call(model, make_tokens(1, 17, seed=17), cache)
        room = find_text(cache).room
        assert room is not None
        (passages,) = room.passages
        other = (passages[1],)
        for given in (passages, other, ()):
            cache = attachment.make_cache()
            with attachment.change_mode(passages=given):
                call(model, tokens[:, :5], cache)
                logits = call(model, tokens[:, 5:], cache).logits
            text = find_text(cache)
            assert (() if text.room is None else text.room.passages[0]) == given
            if given:
                wanted = run_pasted(text, tokens, "llama", "eager")[:, 5:]
                assert torch.allclose(logits, wanted, atol=1e-4)
            else:
                assert torch.allclose(logits, empty[:, 5:], atol=1e-5)
        with attachment.change_mode(passages=passages):
            call(model, tokens, cache)
        text = find_text(cache)
        assert text.room is not None
        assert text.room.passages == (passages,)


@pytest.mark.parametrize("family", sorted(CONFIGS))
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


@pytest.mark.parametrize("length", [11, 2 * WINDOW + 5])
def test_with_nothing_stored_a_text_within_the_window_is_bit_for_bit_that_of_the_model(length):
    model, tokens = find_model(), make_tokens(1, length)
    with torch.no_grad():
        wanted = read(model, tokens, SEGMENT_LEN)[:, :WINDOW]
    give_passages(model)
    with open_memory(model), torch.no_grad():
        found = read(model, tokens, SEGMENT_LEN)[:, :WINDOW]
    assert torch.equal(found, wanted)


def compose(attachment: Attachment, cache: DynamicCache) -> DynamicCache:
    """A plain cache of what a call sees now: the room, the sinks, the window."""
    text, composed = find_text(cache), DynamicCache()
    assert text.room is not None
    for number, layer in enumerate(cache.layers):
        held: Any = layer
        parts = [text.room.layers[number]]
        if held.sink_keys is not None:
            parts.append((held.sink_keys, held.sink_values))
        parts.append((held.keys, held.values))
        composed.update(*(torch.cat(part, 2) for part in zip(*parts, strict=True)), number)
    return composed


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_what_a_text_has_behind_it_is_found_and_read_like_all_else(family):
    model, length = find_model(family), 4 * SEGMENT_LEN
    tokens = make_tokens(1, length + 1)
    attachment = give_passages(model)
    with memory_open(attachment), torch.no_grad():
        cache = attachment.make_cache()
        read(model, tokens[:, :length], SEGMENT_LEN, cache=cache)
        text = find_text(cache)
        composed = compose(attachment, cache)
        found = call(model, tokens[:, length:], cache).logits
    assert text.room is not None
    (one, *_) = text.room.passages[0]
    assert one.document is None
    assert NUM_SINKS <= one.start < one.end <= length - WINDOW + 1
    assert torch.equal(one.ids, tokens[0, one.start : one.end])
    assert text.shift.tolist() == [[-ROOM_LEN]]
    model = find_model(family)
    with torch.no_grad():
        wanted = call(
            model,
            tokens[:, length:],
            composed,
            position_ids=torch.tensor([[length + ROOM_LEN]]),
        ).logits
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_passages_stand_right_before_the_window_wherever_a_text_is(family):
    model, length = find_model(family), 21 * SEGMENT_LEN + 5
    tokens = make_tokens(1, length)
    attachment = give_passages(model, search_every=5)
    seen, shifts = [], set()
    with memory_open(attachment), torch.no_grad():
        cache = attachment.make_cache()
        starts = [*range(0, 21 * SEGMENT_LEN, SEGMENT_LEN), *range(21 * SEGMENT_LEN, length)]
        for start, stop in itertools.pairwise([*starts, length]):
            call(model, tokens[:, start:stop], cache)
            text = find_text(cache)
            if text.room is None or (stop - start == 1 and start % 5):
                continue
            if stop - start > 1:
                first_seen = start - WINDOW + 1
                assert text.room.before.tolist() == [max(0, first_seen)]
            place = torch.arange(text.room.length) - text.room.length
            place = (place + int(text.room.before) - int(text.shift)).unsqueeze(0)
            plain = DynamicCache()
            with attachment.change_mode(is_plain=True):
                call(model, text.room.ids, plain, position_ids=place)
            for layer, (keys, values) in zip(plain.layers, text.room.layers, strict=True):
                assert torch.allclose(layer.keys, keys, atol=1e-4)
                assert torch.allclose(layer.values, values, atol=1e-4)
            seen.append(text.room.passages)
            shifts.add(int(text.shift))
    assert len(shifts) == 3  # positions began again, twice
    assert any(a == b for a, b in itertools.pairwise(seen))  # moved, not read again
    assert len(set(seen)) > 2


def test_a_prompt_of_one_token_finds_passages():
    model = find_model()
    attachment = give_passages(model)
    with open_memory(model) as memory, torch.no_grad():
        read_all(memory)
        cache = attachment.make_cache()
        found = call(model, make_tokens(1, 1), cache).logits
        text = find_text(cache)
    assert text.room is not None
    assert torch.allclose(found, run_pasted(text, make_tokens(1, 1), "llama", ""), atol=1e-4)


def test_what_was_given_as_embeddings_is_not_read_again_as_tokens():
    model, length = find_model(), 4 * SEGMENT_LEN
    tokens = make_tokens(1, length + 1)
    attachment = give_passages(model)
    embeddings = model.get_input_embeddings()(tokens)
    with memory_open(attachment), torch.no_grad():
        cache = attachment.make_cache()
        for start in range(0, length, SEGMENT_LEN):
            piece = slice(start, start + SEGMENT_LEN)
            if start < SEGMENT_LEN:
                call(model, tokens[:, piece], cache)
            else:
                inputs = {"inputs_embeds": embeddings[:, piece], CACHE_NAME: cache}
                model(**inputs, use_cache=True)
        call(model, tokens[:, length:], cache)
        room = find_text(cache).room
    assert room is not None
    assert all(one.end <= SEGMENT_LEN for one in room.passages[0])
    for one in room.passages[0]:
        assert torch.equal(one.ids, tokens[0, one.start : one.end])


def test_passages_are_exchanged_when_what_is_asked_for_is_in_sight_no_more():
    model = find_model()
    attachment = give_passages(model, passage_len=32, search_every=1)
    with open_memory(model) as memory, torch.no_grad():
        read_all(memory, LONG_DOCUMENTS)
        cache = attachment.make_cache()
        call(model, make_tokens(1, 11), cache)
        rooms = [find_text(cache).room]
        for token in make_tokens(1, 17, seed=8)[0]:
            composed = compose(attachment, cache)
            found = call(model, token.view(1, 1), cache).logits
            rooms.append(find_text(cache).room)
            if rooms[-1] is rooms[-2]:
                position = torch.tensor([[int(cache.get_seq_length()) - 1 + 97]])
                with attachment.change_mode(is_plain=True):
                    wanted = call(model, token.view(1, 1), composed, position_ids=position)
                assert torch.allclose(found, wanted.logits, atol=1e-4)
        exchanged = [pair for pair in itertools.pairwise(rooms) if pair[0] is not pair[1]]
        assert len(exchanged) > 2
        for before, after in exchanged:
            # What is new is read behind the others, which are as they were read.
            columns = after.find_same(before)[0]
            count = len(columns)
            assert torch.equal(before.ids[0, columns], after.ids[0, :count])
            again, alone = DynamicCache(), DynamicCache()
            for number, (keys, values) in enumerate(after.read):
                assert torch.equal(values[:, :, :count], before.read[number][1][:, :, columns])
                again.update(keys[:, :, :count], values[:, :, :count], number)
            place = torch.arange(after.length).unsqueeze(0) + 97 - after.length
            with attachment.change_mode(is_plain=True):
                call(model, after.ids[:, count:], again, position_ids=place[:, count:])
                call(model, after.ids, alone, position_ids=place)
            # The first layer's keys see nothing but their token: they are turned to any place.
            assert torch.allclose(after.read[0][0], alone.layers[0].keys, atol=1e-4)
            for (keys, values), layer in zip(after.read, again.layers, strict=True):
                assert torch.allclose(keys, layer.keys, atol=1e-4)
                assert torch.allclose(values, layer.values, atol=1e-4)


def make_passage(start: int, document: str = "a") -> Passage:
    return Passage(document, start, start + 128, 0.1, start, False, None, torch.arange(128))


def test_what_is_found_anew_comes_after_what_is_there():
    first, second, third, new, best = map(make_passage, (0, 200, 400, 600, 800))
    settings = MemorySettings((1,), num_passages=3)
    old = (first, first, second, third)  # from the last to the first

    def exchange(found: tuple[Passage, ...], *, is_written: bool = True) -> tuple[Passage, ...]:
        return _exchange(old, found, settings, is_written=is_written)

    assert exchange((best,)) == exchange((best, second)) == (best, first, second)
    assert exchange((best, second, new)) == (best, new, first)
    assert exchange((make_passage(100), third)) == (make_passage(100), third)
    assert exchange((make_passage(100, "b"), third)) == (make_passage(100, "b"), first, second)
    assert exchange((second, best)) == exchange(()) == old
    assert exchange((best, second), is_written=False) == (best, best, second)
    assert _exchange((), (best, second), settings, is_written=True) == (best, best, second)


def test_a_text_is_scored_as_if_it_were_written_token_by_token():
    model = find_model()
    attachment = give_passages(model, search_every=SEGMENT_LEN)
    text = make_tokens(1, 5 * SEGMENT_LEN)
    with open_memory(model) as memory, torch.no_grad():
        read_all(memory, LONG_DOCUMENTS)
        scored = score_texts(model, [text[0].numpy()], 1)[0]
        cache, written, rooms = attachment.make_cache(), [], []
        with attachment.change_mode(looks_ahead=False):  # the first token finds nothing by itself
            for token in torch.cat([torch.tensor([[1]]), text[:, :-1]], 1)[0]:
                written.append(call(model, token.view(1, 1), cache).logits)
                rooms.append(find_text(cache).room)
    nats = torch.nn.functional.cross_entropy(torch.cat(written, 1)[0], text[0], reduction="none")
    assert len({id(room) for room in rooms}) > 3
    assert abs(nats.numpy() - scored).max() < 1e-4


def test_tokens_that_are_scored_do_not_depend_on_later_ones():
    model = find_model()
    give_passages(model)
    text = make_tokens(1, 5 * SEGMENT_LEN)[0].numpy()
    other = text.copy()
    other[3 * SEGMENT_LEN + 4 :] = make_tokens(1, len(text), seed=9)[0, : len(text) - 43].numpy()
    with open_memory(model) as memory:
        read_all(memory)
        first, second = score_texts(model, [text, other], 1)
        shuffled = score_texts(model, [text, other], 1, control="shuffled")[0]
        off = score_texts(model, [text], 1, control="off")[0]
    same = 3 * SEGMENT_LEN + 4
    assert (first[:same] == second[:same]).all()
    assert abs(first[SEGMENT_LEN + 1 :] - off[SEGMENT_LEN + 1 :]).max() > 1e-3
    # What is open is wrong too: it is found before anything has left the window.
    for right in (first, off):
        assert abs(shuffled - right)[SEGMENT_LEN:WINDOW].max() > 1e-3


def test_another_documents_passages_are_those_that_it_finds():
    model = find_model()
    give_passages(model)
    long, short = (make_tokens(1, length, seed=length + 60)[0].numpy() for length in (61, 47))
    with open_memory(model) as memory:
        read_all(memory)
        wrong = score_texts(model, [short, long], 1, control="other_document")[0]
        twice = score_texts(model, [short, short], 1, control="other_document")[0]
        right = score_texts(model, [short], 1)[0]
    assert abs(twice - right).max() < 1e-4
    assert abs(wrong - right)[SEGMENT_LEN:WINDOW].max() > 1e-3


@pytest.mark.parametrize("search_every", [5, 13, 64])
def test_passages_are_looked_for_as_often_as_a_text_is_written(search_every):
    model = find_model()
    give_passages(model, search_every=search_every)
    text = make_tokens(1, 3 * SEGMENT_LEN + 2)[0].numpy()
    calls = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    pieces = {5: [5, 5, 3] * 3 + [2], 13: [13, 13, 13, 2], 64: [13, 13, 13, 2]}
    with open_memory(model) as memory:
        read_all(memory)
        score_texts(model, [text], 1)
        assert calls == pieces[search_every]
        calls.clear()
        score_texts(model, [text], 1, control="off")  # nothing is looked for
        assert calls == [13, 13, 13, 2]
    hook.remove()


def test_documents_are_read_in_the_models_own_context():
    model = find_model()
    attachment = give_passages(model, layers=[2])
    with open_memory(model) as memory, torch.no_grad():
        memory.read(TOKENIZER, {"first": DOCUMENTS["first"]}, progress=False)
        (block,) = attachment.opened.base[2].blocks
        found = block.load().values[0]
    ids = torch.tensor([TOKENIZER(DOCUMENTS["first"])["input_ids"]])
    cache = DynamicCache()
    with torch.no_grad():
        call(find_model(), ids, cache)
    assert torch.allclose(found, cache.layers[2].values[0, :, NUM_SINKS:], atol=1e-5)


def test_documents_longer_than_the_context_are_read_in_stretches_that_overlap():
    model = find_model()
    attachment = give_passages(model)
    most = attachment.max_window
    words = " ".join(f"w{token}" for token in make_tokens(1, 3 * most, seed=2)[0].tolist())
    with open_memory(model) as memory, torch.no_grad():
        told: list[int] = []
        report = memory.read(
            TOKENIZER, {"long": words}, progress=lambda _, count: told.append(count)
        )
        # What is read again is not counted again.
        assert sum(told) == 3 * most + 1
        assert min(told) >= 0
        assert report.num_entries == 3 * most + 1 - NUM_SINKS
        memory.read(TOKENIZER, {"begin": " ".join(words.split()[: most - 1])}, progress=False)
        base = attachment.opened.collection
        keys = torch.cat([block.load().keys[0] for block in base.layers[1].blocks], 1)
    count = most - NUM_SINKS
    first = base.first_entries[1]
    assert torch.allclose(keys[:, :count], keys[:, first : first + count], atol=1e-5)


def test_a_folder_that_is_opened_again_gives_the_same(tmp_path):
    model, tokens = find_model(), make_tokens(1, 11)
    give_passages(model)
    with open_memory(model, tmp_path / "memory") as memory, torch.no_grad():
        read_all(memory)
        wanted = call(model, tokens).logits
        with memory.record() as sources:
            call(model, tokens)
    assert {name for name, _ in sources.list()} <= set(DOCUMENTS)
    assert sum(share for _, share in sources.list()) == pytest.approx(1.0)
    with open_memory(model, tmp_path / "memory", tokenizer=TOKENIZER), torch.no_grad():
        assert torch.equal(call(model, tokens).logits, wanted)
    with pytest.raises(MemoryFolderError, match="tokenizer=tokenizer"):
        open_memory(model, tmp_path / "memory").__enter__()
    with pytest.raises(MemoryFolderError, match="another tokenizer"):
        open_memory(model, tmp_path / "memory", tokenizer=make_tokenizer(5)).__enter__()


@pytest.mark.parametrize("index", ["int8", "faiss_flat:block_len=16"])
def test_an_index_that_finds_all_entries_finds_the_passages_of_exact_search(index, tmp_path):
    if "faiss" in index:
        pytest.importorskip("faiss")
    model, tokens, found = find_model(), make_tokens(1, 11), []
    for name in ("exact", index):
        attachment = give_passages(
            model, index=name, num_neighbors=512, capacity=512, heads={1: (2,)}
        )
        with open_memory(model, tmp_path / name[:5]) as memory, torch.no_grad():
            read_all(memory)
            assert memory.num_entries < 512
            cache = attachment.make_cache()
            logits = call(model, tokens, cache).logits
            assert attachment.opened.base[1].num_heads == 1
            found.append((logits, find_text(cache).room.passages))
        remove_memory(model)
    assert torch.equal(found[0][0], found[1][0])
    scores = [[one.score for one in passages[0]] for _, passages in found]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_a_memory_without_its_texts_says_what_to_do(tmp_path):
    model = find_model()
    give_memory(model)
    with open_memory(model, tmp_path / "memory") as memory:
        read_all(memory)
    model = find_model()
    give_passages(model)
    with pytest.raises(MemoryFolderError, match=r"did not keep the text of 'first'.*--keep-text"):
        open_memory(model, tmp_path / "memory", tokenizer=TOKENIZER).__enter__()


def test_heads_may_read_entries_and_find_passages():
    model, tokens = find_model(), make_tokens(1, 11)
    found = {}
    for way in ("entries", "passages", "both"):
        give_passages(model, read=way)
        with open_memory(model) as memory, torch.no_grad():
            read_all(memory)
            cache = memory.new_cache()
            found[way] = call(model, tokens, cache).logits
        room = find_text(cache).room
        assert (room is None) == (way == "entries")
        remove_memory(model)
    for one, other in itertools.combinations(found.values(), 2):
        assert not torch.allclose(one, other, atol=1e-3)


def test_what_was_read_without_the_memory_is_found_later():
    model, length = find_model(), 4 * SEGMENT_LEN
    tokens = make_tokens(1, length + 1)
    attachment = give_passages(model)
    with memory_open(attachment), torch.no_grad():
        cache = attachment.make_cache()
        with attachment.change_mode(is_reading=False):
            read(model, tokens[:, :length], SEGMENT_LEN, cache=cache)
        assert find_text(cache).room is None
        call(model, tokens[:, length:], cache)
        room = find_text(cache).room
    assert room is not None
    assert {one.document for one in room.passages[0]} == {None}


def test_settings_of_passages_stand_where_passages_are_read_only():
    model = find_model()
    entries = give_memory(model).settings
    described = entries.to_dict()
    assert "passage_len" not in described
    assert type(entries).from_dict(described) == entries
    # What is older than passages does not say what is read.
    assert described.pop("read") == "entries"
    assert type(entries).from_dict(described) == entries
    passages = give_passages(find_model()).settings
    assert passages.to_dict()["passage_len"] == PASSAGE_LEN
    assert type(passages).from_dict(passages.to_dict()) == passages


def test_what_is_not_made_for_passages_says_so():
    model = find_model()
    give_passages(model)
    with pytest.raises(ConfigError, match=r"window .* 70 for passages"):
        give_passages(find_model(), window=200, segment_len=13)


def test_generate_reads_passages_with_and_without_a_cache():
    model, tokens = find_model(), make_tokens(1, 11)
    give_passages(model)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    without = model.generate(tokens, **options)
    with open_memory(model) as memory:
        read_all(memory)
        found = model.generate(tokens, **options)
        assert torch.equal(
            model.generate(tokens, use_cache=False, **options)[:, :12], found[:, :12]
        )
    assert not torch.equal(found, without)
