"""A text's cache, memories and clock as tensors by name, to go on later."""

from __future__ import annotations

import pytest
import torch

from memorizing.errors import CheckpointError, StateError
from memorizing.huggingface.attaching.memory_layer import CLOSED
from memorizing.huggingface.sessions.cache_state import dump_cache, load_cache
from tests.huggingface.tools import (
    LAYER,
    SEGMENT_LEN,
    call,
    find_model,
    give_memory,
    make_tokens,
    memory_open,
)


def test_a_saved_cache_goes_on_with_the_same_heads_alone():
    model, tokens = find_model(), make_tokens(1, 3 * SEGMENT_LEN)
    attachment = give_memory(model, heads={LAYER: (2,)})
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        call(model, tokens, cache)
        attachment.commit(cache)
        saved = dump_cache(attachment, cache)
        assert saved is not None
        saved = {name: tensor.clone() for name, tensor in saved.items()}
        expected = call(model, tokens, cache).logits
        assert torch.equal(call(model, tokens, load_cache(attachment, saved)).logits, expected)
    attachment.layers[LAYER].bias.data.copy_(torch.tensor([0.0, CLOSED, CLOSED, CLOSED]))
    with memory_open(attachment), pytest.raises(CheckpointError, match=r"keys \[1\].*\[0\]"):
        load_cache(attachment, saved)


def test_a_cache_is_saved_at_the_end_of_a_segment_and_not_before_its_first_token():
    model = find_model()
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        assert dump_cache(attachment, cache) is None
        call(model, make_tokens(1, SEGMENT_LEN + 2), cache)
        with pytest.raises(StateError, match="in the middle of a segment"):
            dump_cache(attachment, cache)
