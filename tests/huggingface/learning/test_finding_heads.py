"""Heads that find passages: the one that was made to find is found; what is drawn and ranked."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from memorizing import calibrate, open_memory
from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import find_attachment, get_attachment
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passages import (
    CHUNK_LEN,
    LAST,
    Collection,
    choose_in,
    score_chunks,
)
from memorizing.huggingface.learning.calibration import add_calibrated_memory
from memorizing.huggingface.learning.finding_heads import (
    PROMPT_LEN,
    Ranks,
    choose,
    draw_places,
    find_finders,
    rank_places,
    weigh_by_head,
)
from memorizing.memory.frozen import FrozenMemory
from tests.huggingface.attaching.chunks import choose_spans, weigh_chunks
from tests.huggingface.sessions.tools import TOKENIZER, read_all
from tests.huggingface.tools import (
    CONFIGS,
    NUM_LAYERS,
    NUM_SINKS,
    find_model,
    give_memory,
    make_model,
    make_tokens,
)

FINDS = (0, 2)
"""Layer and head of queries that find, made so: four heads of queries, two of keys."""
KEY_HEADS, GROUPS, WIDTH, NUM_ENTRIES = 2, 3, 7, 83
SETTINGS: dict[str, Any] = {
    "window": 101,
    "num_sinks": NUM_SINKS,
    "distance": 0,
    "passage_len": 23,
    "num_passages": 2,
}


@functools.cache
def make_finder() -> Any:
    """A model with a head that asks for the tokens that it sees."""
    model = make_model("llama", max_position_embeddings=1201)
    attention = model.model.layers[FINDS[0]].self_attn
    asks = attention.q_proj.weight.view(4, -1, attention.q_proj.weight.shape[1])
    has = attention.k_proj.weight.view(2, -1, attention.k_proj.weight.shape[1])
    with torch.no_grad():
        asks[FINDS[1]] = 3 * has[FINDS[1] // 2]
    return model


@functools.cache
def find_once() -> Any:
    return calibrate_finder(make_tokens(1, 2203)[0])


def calibrate_finder(tokens: torch.Tensor, **settings: Any) -> Any:
    return calibrate(make_finder(), tokens, read="passages", **SETTINGS | settings)


def make_shares(*best: tuple[int, ...]) -> torch.Tensor:
    """Shares (P, T, C) of one query, in which each prompt prefers these chunks, the first most."""
    shares = torch.full((len(best), 1, 11), 0.01)
    for prompt, chunks in enumerate(best):
        for place, chunk in enumerate(chunks):
            shares[prompt, 0, chunk] = 0.5 / (1 + place)
    return shares


def test_the_head_that_was_made_to_find_is_found_and_the_model_is_as_it_was():
    model, tokens = make_finder(), make_tokens(1, 19)
    before = model(tokens).logits
    found = find_once()
    assert found.heads == {FINDS[0]: (FINDS[1],)}
    assert found.candidates == tuple(range(NUM_LAYERS))
    assert found.single.shape == (NUM_LAYERS, 4)
    assert found.single.argmax() == FINDS[0] * 4 + FINDS[1]
    assert float(found.single.max()) == pytest.approx(float((1 / found.ranks.ranks).mean()))
    assert found.ranks.first > 0.8
    assert str(found).startswith("layer 0, heads 2; of 64 places of this text, ")
    assert find_attachment(model) is None
    assert torch.equal(model(tokens).logits, before)


def test_what_was_found_is_added_and_finds_what_is_read_then():
    model = make_finder()
    find_once().add_to(model, num_passages=3)
    attachment = get_attachment(model)
    try:
        settings = attachment.settings
        assert (settings.read, settings.layers, settings.window) == ("passages", (0,), 101)
        assert (settings.num_passages, settings.passage_len, settings.distance) == (3, 23, 0)
        assert attachment.layers[0].list_open() == [False, False, True, False]
        with open_memory(model, tokenizer=TOKENIZER) as memory:
            read_all(memory)
            assert attachment.opened is not None
            assert attachment.opened.collection.layers[0].num_heads == 1
    finally:
        attachment.remove()


def test_candidates_limit_what_can_be_chosen():
    found = calibrate_finder(make_tokens(1, 2203)[0], candidates=[2, 0])
    assert found.candidates == (0, 2)
    assert found.single.shape == (2, 4)
    assert found.heads == {FINDS[0]: (FINDS[1],)}


def test_calibration_counts_tokens_of_the_text_and_of_the_prompts():
    told: list[tuple[int, int]] = []
    length = 64 * CHUNK_LEN + NUM_SINKS
    calibrate_finder(make_tokens(1, length)[0], progress=lambda *both: told.append(both))
    assert told[-1] == (64 * CHUNK_LEN + 64 * PROMPT_LEN,) * 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_inference_mode_finds_the_same():
    with torch.inference_mode():
        found = calibrate_finder(make_tokens(1, 2203)[0])
    assert torch.equal(found.single, find_once().single)


@pytest.mark.parametrize(
    ("length", "settings", "said"),
    [
        (64 * CHUNK_LEN + 2, {}, "tokens is 2050; allowed: 2,051 or more"),
        (0, {}, "tokens is 0"),
        (2203, {"num_sinks": 2201}, "tokens is 2203; allowed: 4,249 or more"),
        (2203, {"biases": (0.0,)}, "biases is .* passages have no gates"),
        (2203, {"max_layers": 0}, "max_layers is 0"),
        (2203, {"candidates": []}, "layers is"),
        (2203, {"candidates": [7]}, "layers is"),
        (2203, {"passage_len": 800}, "passage_len .* for passages"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_leaves_the_model_alone(length, settings, said):
    with pytest.raises(ConfigError, match=said):
        calibrate_finder(make_tokens(1, length)[0], **settings)
    assert find_attachment(make_finder()) is None


def test_a_model_that_finds_nothing_is_told_so():
    tokens = torch.full((2203,), 5)
    with pytest.raises(ConfigError, match=r"no heads of this model find .* layer .* came first"):
        calibrate_finder(tokens)
    assert find_attachment(make_finder()) is None
    with pytest.raises(ConfigError, match="read is 'both'"):
        calibrate(make_finder(), tokens, read="both")  # type: ignore[call-overload]


def test_a_memory_is_added_as_calibrated_on_texts():
    model = make_finder()
    texts = (" ".join(f"w{token}" for token in make_tokens(1, 1103, seed)[0]) for seed in range(2))
    found = add_calibrated_memory(model, TOKENIZER, texts, read="passages", capacity=59, **SETTINGS)
    try:
        assert found.heads == {FINDS[0]: (FINDS[1],)}
        assert get_attachment(model).settings.capacity == 59
        assert get_attachment(model).settings.read == "passages"
    finally:
        get_attachment(model).remove()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_heads_of_every_family_are_ranked(family):
    model, tokens = find_model(family), make_tokens(1, 307)[0]
    attachment = give_memory(model, layers=[0, 2], read="passages", num_passages=1, passage_len=23)
    places = draw_places(tokens, NUM_SINKS, num_places=11)
    found = find_finders(attachment, tokens, places, max_layers=1)
    assert found.single.shape == (2, 4)
    assert bool(((found.single > 0.1) & (found.single <= 1)).all())
    assert set(found.heads) < {0, 2}
    assert len(found.ranks.ranks) == 11


def test_shares_of_a_head_are_those_that_passages_are_chosen_by():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(KEY_HEADS, NUM_ENTRIES, WIDTH, generator=generator)
    values = torch.randn(KEY_HEADS, NUM_ENTRIES, WIDTH, generator=generator)
    values[:, 41] *= 1e-3  # a sink
    queries = torch.randn(5, KEY_HEADS * GROUPS, LAST, WIDTH, generator=generator)
    collection = Collection((NUM_ENTRIES,), {3: FrozenMemory.from_tensors(keys, values)})
    shares = weigh_by_head(queries, keys, collection)
    assert shares.shape == (5, KEY_HEADS * GROUPS, LAST, 3)
    for heads in ([4], [0, 5], list(range(KEY_HEADS * GROUPS))):
        (wanted,) = weigh_chunks({3: queries[2]}, {3: torch.tensor(heads)}, [collection], 1)
        wanted = collection.join_next(wanted)
        torch.testing.assert_close(shares[2, heads].mean(0), wanted)
        (best,) = choose_spans([collection], [wanted], [score_chunks(wanted)], 1, CHUNK_LEN, 0.0)
        scores = score_chunks(shares[2:3, heads].mean(1))
        chunk = collection.find_chunks(torch.tensor([best.chunk]))
        assert rank_places(scores, chunk).tolist() == [1]


def test_prompts_stand_in_the_text_and_every_second_one_is_changed_a_little():
    tokens = make_tokens(1, 1009)[0]
    places = draw_places(tokens, NUM_SINKS, num_places=17)
    assert places.prompts.shape == (17, PROMPT_LEN)
    assert len(set(places.after.tolist())) == 17
    assert int(places.after.min()) >= NUM_SINKS + PROMPT_LEN
    for number, (prompt, after) in enumerate(zip(places.prompts, places.after, strict=True)):
        text = tokens[after - PROMPT_LEN : after]
        changed = (prompt != text).sum()
        assert int(changed) == 0 if number % 2 == 0 else 0 < int(changed) < PROMPT_LEN // 2
        # What is changed is changed wherever it stands.
        assert len(set(zip(text.tolist(), prompt.tolist(), strict=True))) == len(text.unique())
    again = draw_places(tokens, NUM_SINKS, num_places=17)
    assert torch.equal(places.prompts, again.prompts)
    assert torch.equal(tokens, make_tokens(1, 1009)[0])


def test_a_text_with_few_places_gives_all_of_them():
    tokens = make_tokens(1, NUM_SINKS + PROMPT_LEN + 3)[0]
    places = draw_places(tokens, NUM_SINKS)
    assert places.after.tolist() == [NUM_SINKS + PROMPT_LEN + place for place in range(3)]


def test_prompts_begin_as_the_text_does_where_that_is_the_models_start_token():
    tokens = make_tokens(1, 211)[0]
    tokens[0] = 1
    assert draw_places(tokens, NUM_SINKS).prompts.shape[1] == PROMPT_LEN
    assert draw_places(tokens, NUM_SINKS, start_token=2).prompts.shape[1] == PROMPT_LEN
    prompts = draw_places(tokens, NUM_SINKS, start_token=1).prompts
    assert prompts.shape[1] == PROMPT_LEN + 1
    assert bool((prompts[:, 0] == 1).all())
    assert torch.equal(prompts[:, 1:], draw_places(tokens, NUM_SINKS).prompts)


def test_right_are_the_chunks_around_which_a_passage_has_the_place():
    length = MemorySettings.passage_len
    part = Collection((13 * CHUNK_LEN,), {})
    right = 6
    for chunk in range(1, 11):  # nearer to an end of the text passages begin elsewhere
        shares = torch.full((1, 13), 1e-3)
        shares[0, chunk] = 0.5
        (span,) = choose_in(part, shares, score_chunks(shares), 1, length)
        has_it = span.start <= right * CHUNK_LEN and (right + 1) * CHUNK_LEN <= span.end
        rank = rank_places(score_chunks(shares.unsqueeze(0)), torch.tensor([right]))
        assert (rank.item() == 1) == has_it


def test_ranks_count_the_chunks_in_front_of_those_whose_passage_has_the_right_one():
    scores = torch.tensor([[5.0, 1, 4, 2, 3, 0, 9], [0, 1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7, 7]])
    right = torch.tensor([4, 6, 0])
    assert rank_places(scores, right).tolist() == [3, 1, 6]
    assert rank_places(scores, torch.tensor([1, 0, 3])).tolist() == [2, 6, 4]
    both = torch.stack([scores, scores.flip(-1)], 1)
    assert rank_places(both, right)[:, 0].tolist() == [3, 1, 6]
    ranks = Ranks(torch.tensor([1, 4, 5, 2]))
    assert (ranks.first, ranks.among_four) == (0.25, 0.75)
    assert str(ranks) == "of 4 places of this text, 25% came first and 75% among the best 4"


def test_heads_are_added_while_they_bring_more():
    right = torch.tensor([2, 5, 8])
    half = make_shares((2,), (5,), (0, 4, 5, 8))
    other = make_shares((5, 4, 6, 2), (0, 5), (8,))
    noise = make_shares((9,), (9,), (1,))
    assert choose([noise, other, half], right, 3) == [1, 2]
    assert choose([noise, other, half], right, 1) == [2]
    assert choose([half, half], right, 2) == [0]
    rates = [float((1 / rank_places(score_chunks(one), right)).mean()) for one in (other, half)]
    assert choose([other, half], right, 1, slack=rates[1] - rates[0] - 1e-3) == [1]
    assert choose([other, half], right, 1, slack=rates[1] - rates[0] + 1e-3) == [0]
    # What is added has to bring enough, near to the best of the others or not.
    assert choose([half, noise, other], right, 2, slack=1.0) == [0, 2]
    assert choose([noise], right, 3) == [0]
