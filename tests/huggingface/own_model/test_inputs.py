"""Masks, histories and arguments of a call, taken or refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from memorizing.errors import ConfigError, StateError

from ...model.tools import make_tokens
from .tools import VOCAB_SIZE, make_own, pad_left


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("later", [False, True])
def test_what_the_mask_leaves_out_is_neither_seen_nor_counted_nor_remembered(later: bool) -> None:
    model = make_own()
    tokens, mask = make_tokens(3, 41), torch.ones(3, 41, dtype=torch.int64)
    mask[0, :19] = 0
    mask[1, 5:12] = 0
    mask[2, 40:] = 0
    cache = model.init_cache(3)
    if later:  # In two calls, the second with a mask over all columns.
        pieces = [
            model(tokens[:, :23], attention_mask=mask[:, :23], past_key_values=cache).logits,
            model(tokens[:, 23:], attention_mask=mask, past_key_values=cache).logits,
        ]
        logits = torch.cat(pieces, 1)
    else:
        logits = model(tokens, attention_mask=mask, past_key_values=cache).logits
    for row in range(3):
        seen = mask[row].bool()
        alone = model(tokens[row : row + 1, seen]).logits[0]
        torch.testing.assert_close(logits[row, seen], alone, rtol=1e-5, atol=1e-5)
        assert not logits[row, ~seen].any()
    assert cache.state.position.tolist() == mask.sum(1).tolist()


def test_a_call_of_padding_alone_reads_nothing() -> None:
    model = make_own()
    cache = model.init_cache(2)
    tokens = make_tokens(2, 5)
    output = model(tokens, attention_mask=torch.zeros(2, 5), past_key_values=cache)
    assert output.logits.shape == (2, 5, VOCAB_SIZE)
    assert cache.state.position.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"input_ids": None}, ConfigError, "input_ids is None"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ConfigError, r"is \(1, 0\)"),
        ({"input_ids": torch.tensor([[29]])}, ConfigError, "vocabulary has 0 to 28"),
        ({"attention_mask": torch.ones(1, 2)}, ConfigError, r"must be \(1, 3\)"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, ConfigError, r"must be \(1, 3\)"),
        ({"labels": torch.zeros(1, 2)}, ConfigError, "as large as input_ids"),
        ({"inputs_embeds": torch.zeros(1, 3, 22)}, ConfigError, "give input_ids"),
        ({"position_ids": torch.zeros(1, 3)}, ConfigError, "positions follow"),
        ({"output_attentions": True}, ConfigError, "does not return attentions"),
        ({"something": 1}, ConfigError, "something cannot be used here"),
        ({"past_key_values": DynamicCache()}, StateError, "is a DynamicCache"),
    ],
)
def test_inputs_that_would_have_no_effect_are_refused(
    inputs: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_own()(**{"input_ids": make_tokens(1, 3), **inputs})


def test_a_history_of_other_rows_is_refused() -> None:
    model = make_own()
    with pytest.raises(StateError, match="3 rows and input_ids 2"):
        model(make_tokens(2, 3), past_key_values=model.init_cache(3))


def test_left_padding_changes_nothing() -> None:
    model = make_own()
    prompts = [make_tokens(1, n, seed=n)[0] for n in (3, 23, 11)]
    tokens, mask = pad_left(prompts)
    logits = model(tokens, attention_mask=mask).logits
    for row, prompt in enumerate(prompts):
        alone = model(prompt.unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits[row, -len(prompt) :], alone, rtol=1e-5, atol=1e-5)
