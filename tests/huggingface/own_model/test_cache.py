"""The history of our own model as a cache of `transformers`."""

from __future__ import annotations

import copy

import pytest
import torch

from memorizing.errors import StateError

from ...model.tools import make_tokens
from .tools import make_own


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


def test_a_copied_history_goes_on_by_itself() -> None:
    model = make_own()
    tokens = make_tokens(1, 31)
    cache = model.init_cache(1)
    model(tokens[:, :16], past_key_values=cache)
    copied = copy.deepcopy(cache)
    first = model(tokens[:, 16:], past_key_values=cache).logits
    model(make_tokens(1, 9, seed=3), past_key_values=copied)
    assert copied.get_seq_length() == 25
    torch.testing.assert_close(model(tokens).logits[:, 16:], first)


def test_rows_of_a_history_can_be_chosen_repeated_and_moved() -> None:
    model = make_own()
    tokens = make_tokens(3, 31)
    expected = model(tokens).logits[:, 16:]
    cache = model.init_cache(3)
    model(tokens[:, :16], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1]))
    assert cache.batch_size == 2
    rows = torch.tensor([0, 2])
    torch.testing.assert_close(
        model(tokens[rows, 16:], past_key_values=cache).logits, expected[rows]
    )


def test_a_history_that_was_reset_is_empty() -> None:
    model = make_own()
    tokens = make_tokens(2, 23)
    cache = model.init_cache(2)
    model(make_tokens(2, 19, seed=5), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_a_history_describes_itself() -> None:
    cache = make_own().init_cache(2)
    assert repr(cache) == "MemorizingCache(position=[0, 0], columns=0)"
    assert len(cache) == 3
    assert cache.get_max_length() == -1
    assert cache.is_initialized
    assert not cache.is_compileable
    assert not cache.is_croppable


def test_nothing_is_taken_back_from_a_history_or_put_into_it() -> None:
    cache = make_own().init_cache(1)
    with pytest.raises(StateError, match="cannot be taken back"):
        cache.crop(1)
    with pytest.raises(StateError, match="takes no keys"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
