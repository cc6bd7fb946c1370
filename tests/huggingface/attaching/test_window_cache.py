"""What local attention sees: the window and the first tokens, past the model's own length too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.errors import StateError
from memorizing.huggingface import remove_memory
from tests.huggingface.tools import (
    CACHE,
    FAMILY_AND_IMPLEMENTATION,
    NUM_SINKS,
    OWN_WINDOW,
    ROTARY,
    SEGMENT_LEN,
    WINDOW,
    call,
    find_model,
    give_memory,
    list_seen,
    make_model,
    make_tokens,
    naive_attention,
    pad_left,
    read,
    run_densely,
)

NUM_TOKENS = 83
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
"""Sums of other lengths, and angles of other positions, round otherwise."""


def compare(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(("family", "implementation"), FAMILY_AND_IMPLEMENTATION)
@pytest.mark.parametrize("num_sinks", [0, NUM_SINKS])
def test_a_longer_text_equals_the_base_model_with_an_explicit_mask(
    family: str, implementation: str, num_sinks: int
):
    model, tokens = find_model(family, implementation), make_tokens(2, NUM_TOKENS)
    with torch.no_grad():
        expected = run_densely(model, tokens, list_seen(NUM_TOKENS, num_sinks))
        give_memory(model, num_sinks=num_sinks)
        compare(model(tokens, use_cache=False).logits, expected)
        compare(read(model, tokens, [40, 1, 5, 37]), expected)


def test_a_cache_that_knows_no_config_sees_what_the_others_see():
    model, tokens = find_model("gemma3_text"), make_tokens(1, NUM_TOKENS)
    give_memory(model)
    with torch.no_grad():
        compare(read(model, tokens, 17, cache=DynamicCache()), model(tokens).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_token_by_token_a_longer_text_equals_the_base_model_with_an_explicit_mask(family: str):
    model, tokens = find_model(family), make_tokens(1, NUM_TOKENS)
    with torch.no_grad():
        expected = run_densely(model, tokens, list_seen(NUM_TOKENS, NUM_SINKS))
        give_memory(model)
        compare(read(model, tokens, 1), expected)


@pytest.mark.parametrize(("family", "implementation"), FAMILY_AND_IMPLEMENTATION)
def test_rows_with_left_padding_equal_each_row_alone(family: str, implementation: str):
    model = find_model(family, implementation)
    # One row begins where the others have left the window, and one that has begun in the window.
    texts = [make_tokens(1, n, seed=n)[0] for n in (71, 11, 59)]
    tokens, mask = pad_left(texts)
    give_memory(model)
    with torch.no_grad():
        found = read(model, tokens, [37, 1, 20, 13], mask)
        for row, text in enumerate(texts):
            alone = model(text.unsqueeze(0)).logits[0]
            compare(found[row, -len(text) :], alone)


def test_a_window_that_is_all_of_the_models_positions_works():
    model, tokens = find_model(), make_tokens(1, 240)
    with torch.no_grad():
        give_memory(model, window=208, num_sinks=0)
        compare(read(model, tokens, SEGMENT_LEN), run_without_memory(model, tokens, 208))


def run_without_memory(model: Any, tokens: Tensor, window: int, num_sinks: int = 0) -> Tensor:
    remove_memory(model)
    return run_densely(model, tokens, list_seen(tokens.shape[1], num_sinks, window))


ZONES: dict[str, Any] = {"max_position_embeddings": 67}
"""65 positions in whole segments, of which the window takes 39: zones begin every 26 from 65 on."""


@pytest.mark.parametrize("family", ROTARY)
def test_past_its_own_length_a_rotary_model_equals_one_that_has_more_positions(family: str):
    model, tokens = make_model(family, **ZONES), make_tokens(2, 143)
    with torch.no_grad():
        expected = run_densely(model, tokens, list_seen(143, 0))
        give_memory(model, num_sinks=0)
        compare(read(model, tokens, [52, 13, 1, 7, 5, 13, 26, 26]), expected)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_past_a_models_own_length_sinks_keep_their_place(family: str):
    model, tokens = make_model(family, **ZONES), make_tokens(1, 98)
    attachment = give_memory(model)
    with torch.no_grad():
        whole = read(model, tokens, SEGMENT_LEN)
        compare(read(model, tokens, [*([7, 6] * 5), *([1] * SEGMENT_LEN), 4, 9]), whole)
        with naive_attention(
            attachment, has_memory=False, find_shift=lambda t: 26 * max(0, (t - 39) // 26)
        ) as base:
            compare(whole, base(tokens, use_cache=False).logits)


def test_learned_positions_begin_again_with_nothing_but_sinks_in_sight():
    model, num_tokens = make_model("gpt2", n_positions=41), 143
    tokens = make_tokens(2, num_tokens)
    zone = torch.arange(num_tokens) // 39
    seen = list_seen(num_tokens, 0) & (zone.unsqueeze(1) == zone)
    seen |= list_seen(num_tokens, NUM_SINKS) & (torch.arange(num_tokens) < NUM_SINKS)
    position = (torch.arange(num_tokens) % 39).unsqueeze(0)
    with torch.no_grad():
        expected = run_densely(model, tokens, seen, position_ids=position)
        give_memory(model)
        compare(read(model, tokens, SEGMENT_LEN), expected)
        compare(read(model, tokens, [20, 19, *([1] * 5), 34, 39, 39]), expected)


def test_learned_positions_begin_again_in_rows_with_left_padding_too():
    model = make_model("gpt2", n_positions=41)
    texts = [make_tokens(1, n, seed=n)[0] for n in (97, 17, 58)]
    tokens, mask = pad_left(texts)
    give_memory(model)
    with torch.no_grad():
        whole = read(model, tokens, SEGMENT_LEN, mask)
        pieces = read(model, tokens, [6, 7, *([1] * SEGMENT_LEN)], mask)
    for row, text in enumerate(texts):
        compare(whole[row, -len(text) :], pieces[row, -len(text) :])


SCALED = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 53,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 53,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_positions_equal_the_base_model_with_an_explicit_mask(kind: str):
    model = make_model("llama", rope_parameters={"rope_theta": 1e4, **SCALED[kind]})
    tokens = make_tokens(1, NUM_TOKENS)
    with torch.no_grad():
        expected = run_densely(model, tokens, list_seen(NUM_TOKENS, NUM_SINKS))
        give_memory(model)
        compare(read(model, tokens, [39, 1, 12, 31]), expected)


def test_longrope_reads_past_its_first_length_with_the_factors_of_short_texts():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [2.0, 3.0, 4.0],
        "original_max_position_embeddings": 67,
        "partial_rotary_factor": 0.6,
    }
    settings = {"rope_parameters": rope, "original_max_position_embeddings": 67}
    model, tokens = make_model("phi3", **settings), make_tokens(1, 150)
    rope_short = rope | {"long_factor": rope["short_factor"]}
    endless = make_model("phi3", **settings | {"rope_parameters": rope_short})
    with torch.no_grad():
        expected = run_densely(endless, tokens, list_seen(150, 0))
        give_memory(model, num_sinks=0)
        compare(read(model, tokens, SEGMENT_LEN), expected)


def test_a_call_over_the_end_of_a_zone_is_refused_with_the_tokens_that_may_follow():
    model, tokens = find_model(), make_tokens(1, 230)
    give_memory(model)
    with torch.no_grad():
        with pytest.raises(StateError, match="230 tokens at once.*208 more"):
            model(tokens)
        cache = model(tokens[:, :200])[CACHE]
        with pytest.raises(StateError, match="9 tokens at once.*8 more"):
            call(model, tokens[:, 200:209], cache)
        assert call(model, tokens[:, 200:208], cache).logits.shape[1] == 8


def test_the_cache_holds_no_more_than_the_window():
    model, tokens = find_model("gemma3_text"), make_tokens(1, NUM_TOKENS)
    give_memory(model)
    with torch.no_grad():
        cache = model(tokens)[CACHE]
    assert [layer.keys.shape[2] for layer in cache.layers] == [OWN_WINDOW - 1, WINDOW - 1, 18]
    assert cache.get_seq_length() == NUM_TOKENS
    assert all(layer.keys.untyped_storage().nbytes() < 4 * 2 * 10 * 40 for layer in cache.layers)
