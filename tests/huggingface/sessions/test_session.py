"""What a model has read: open for a while, in a folder or not, and by document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from memorizing.huggingface import open_memory
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.memory import FrozenMemory
from tests.huggingface.sessions.tools import (
    DOCUMENTS,
    QUESTION,
    ask,
    fetch_entries,
    read_all,
)
from tests.huggingface.tools import (
    NUM_SINKS,
    SEGMENT_LEN,
    find_model,
    give_memory,
    read,
)


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
