"""Calls of our own model as a `PreTrainedModel`: any chunking, any padding, its history."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface.own_model.cache import MemorizingCache
from memorizing.huggingface.own_model.config import MemorizingTransformerConfig
from memorizing.huggingface.own_model.model import MemorizingTransformerForCausalLM

from ...model.tools import SMALL, make_tokens, read
from .tools import get_history, make_own


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


def test_a_call_gives_what_the_models_own_loop_gives() -> None:
    model = make_own()
    tokens = make_tokens(2, 31)
    torch.testing.assert_close(model(tokens).logits, read(model.model, tokens)[0])


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("conv_len", [0, 4])
@settings(max_examples=3, deadline=None)
@given(lengths=st.lists(st.integers(2, 17), min_size=1, max_size=31))
def test_any_chunking_of_calls_gives_the_same_logits(
    combine: str, conv_len: int, lengths: list[int]
) -> None:
    model = make_own(combine=combine, conv_len=conv_len, smear_keys=not conv_len)
    tokens = make_tokens(2, 31)
    cache = model.init_cache(2)
    pieces, start = [], 0
    while start < 31:
        stop = min(31, start + lengths[len(pieces) % len(lengths)])
        pieces.append(model(tokens[:, start:stop], past_key_values=cache).logits)
        start = stop
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 31
    assert cache.state.position.tolist() == [31, 31]


def test_token_by_token_gives_the_same_logits() -> None:
    model = make_own()
    tokens = make_tokens(2, 31)
    cache = model.init_cache(2)
    steps = [model(tokens[:, [i]], past_key_values=cache).logits for i in range(31)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_an_empty_memory_and_none_give_the_same_bit_for_bit(combine: str) -> None:
    model = make_own(combine=combine)
    tokens = make_tokens(2, 7)
    plain = model(tokens, past_key_values=model.init_cache(2, capacity=0)).logits
    assert torch.equal(model(tokens).logits, plain)
    long = make_tokens(2, 31)
    plain = model(long, past_key_values=model.init_cache(2, capacity=0)).logits
    torch.testing.assert_close(plain, read(model.model, long, capacity=0)[0])
    assert not torch.allclose(model(long).logits, plain)


def test_the_capacity_of_the_configuration_holds_from_the_next_document() -> None:
    model = make_own()
    tokens = make_tokens(1, 31)
    expected = read(model.model, tokens, capacity=5)[0]
    model.config.capacity = 5
    torch.testing.assert_close(model(tokens).logits, expected)
    model.config.capacity = 2
    with pytest.raises(ConfigError, match="at least num_neighbors = 3"):
        model(tokens)


def test_a_memory_that_is_not_returned_is_no_larger_than_the_call() -> None:
    model = make_own(capacity=1 << 40)  # Could not be allocated.
    tokens = make_tokens(1, 31)
    expected = make_own(capacity=31)(tokens).logits
    assert torch.equal(model(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("wanted", "columns"),
    [
        (0, list(range(31))),
        (8, list(range(23, 31))),
        (torch.tensor([30, 2, 11, 2]), [30, 2, 11, 2]),
        (torch.tensor([-1]), [30]),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_only_the_logits_asked_for_are_returned(
    wanted: int | torch.Tensor, columns: list[int], padded: bool
) -> None:
    model = make_own()
    tokens, mask = make_tokens(2, 31), torch.ones(2, 31)
    if padded:
        mask[0, :5] = 0
    whole = model(tokens, attention_mask=mask).logits
    some = model(tokens, attention_mask=mask, logits_to_keep=wanted).logits
    assert torch.equal(some, whole[:, columns])
    loss = model(tokens, attention_mask=mask, labels=tokens, logits_to_keep=wanted)
    assert torch.equal(loss.logits, some)
    torch.testing.assert_close(
        loss.loss, model(tokens, attention_mask=mask, labels=tokens).loss, rtol=0, atol=0
    )


def test_the_history_is_returned_where_it_is_asked_for() -> None:
    model = make_own()
    tokens = make_tokens(1, 3)
    assert isinstance(get_history(model(tokens)), MemorizingCache)
    assert get_history(model(tokens, use_cache=False)) is None
    model.config.use_cache = False
    assert get_history(model(tokens)) is None
    cache = model.init_cache(1)
    assert get_history(model(tokens, past_key_values=cache, use_cache=False)) is cache
    with torch.enable_grad():
        assert get_history(model(tokens)) is None
        assert get_history(model(tokens, use_cache=True)) is not None


def test_a_tuple_is_returned_where_it_is_asked_for() -> None:
    model = make_own()
    tokens = make_tokens(1, 3)
    logits, cache = model(tokens, return_dict=False)
    assert torch.equal(logits, model(tokens).logits)
    assert isinstance(cache, MemorizingCache)


def test_bf16_computes_in_bf16_with_fp32_weights() -> None:
    model = make_own()
    tokens = make_tokens(1, 31)
    config = MemorizingTransformerConfig.from_model_config(SMALL, dtype="bfloat16")
    half = MemorizingTransformerForCausalLM(config)
    half.load_state_dict(model.state_dict())
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    logits = half(tokens).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(tokens).logits, rtol=0.3, atol=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(tokens).logits, logits)
    with pytest.raises(ConfigError, match="float64"):
        MemorizingTransformerForCausalLM(
            MemorizingTransformerConfig.from_model_config(SMALL, dtype="float64")
        )


def test_a_history_of_another_precision_is_refused() -> None:
    model = make_own()
    cache = model.init_cache(1)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(StateError, match=r"torch.float32 and this call of torch.bfloat16"),
    ):
        model(make_tokens(1, 3), past_key_values=cache)


def test_a_model_that_exists_is_wrapped_with_its_weights() -> None:
    inner = make_own().model
    wrapped = MemorizingTransformerForCausalLM.from_model(inner)
    assert wrapped.model is inner
    assert not wrapped.training
    tokens = make_tokens(1, 17)
    torch.testing.assert_close(wrapped(tokens).logits, read(inner, tokens)[0])


def test_embeddings_can_be_resized() -> None:
    model = make_own()
    tokens = make_tokens(1, 17)
    before = model(tokens).logits
    model.resize_token_embeddings(31)
    assert model.config.vocab_size == 31
    after = model(tokens).logits
    torch.testing.assert_close(after[..., :29], before)
    model(torch.tensor([[30]]))
