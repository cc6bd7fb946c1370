"""Training a model with memory: segment by segment, forward, backward, commit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing.errors import StateError
from memorizing.huggingface import open_memory
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.window_cache import list_layers
from tests.huggingface.tools import (
    CACHE,
    LAYER,
    SEGMENT_LEN,
    WINDOW,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
    read,
)

NUM_TOKENS = 4 * SEGMENT_LEN + 5


def train_step(
    attachment: Attachment, tokens: Tensor, lengths: tuple[int, ...] = (SEGMENT_LEN,)
) -> dict[str, Tensor]:
    """Gradients of the summed loss of texts, read in calls of so many tokens in turn."""
    model = attachment.model()
    model.zero_grad()
    cache = attachment.make_cache()
    start = 0
    while start < tokens.shape[1]:
        loss: Any = 0.0
        for length in lengths:
            piece = tokens[:, start : start + length]
            if piece.shape[1]:
                logits = call(model, piece, cache).logits
                loss = loss + torch.logsumexp(logits, -1).square().sum()
            start += piece.shape[1]
        loss.backward()
        attachment.commit(cache)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = gradient.abs().max() + 1e-9
        torch.testing.assert_close(
            found[name] / scale, gradient / scale, rtol=0, atol=1e-4, msg=name
        )


@pytest.fixture
def attachment() -> Attachment:
    # What is stored in bfloat16 is copied for the backward pass, what is not is read in place.
    return give_memory(make_model())


def test_a_call_over_a_boundary_of_segments_is_refused(attachment: Attachment):
    model, tokens = attachment.model(), make_tokens(1, NUM_TOKENS)
    with memory_open(attachment):
        with pytest.raises(StateError, match=r"at most 13 tokens follow.*torch\.no_grad"):
            model(tokens)
        cache = model(tokens[:, :5])[CACHE]
        with pytest.raises(StateError, match="at most 8 tokens follow"):
            call(model, tokens[:, 5:14], cache)
        # What is refused changes nothing.
        call(model, tokens[:, 5:13], cache)
        with pytest.raises(StateError, match=r"uncommitted.*memory\.commit"):
            call(model, tokens[:, 13:14], cache)
        attachment.commit(cache)
        call(model, tokens[:, 13:14], cache)


def test_without_a_memory_open_longer_calls_take_gradients_too(attachment: Attachment):
    logits = attachment.model()(make_tokens(1, 2 * WINDOW)).logits
    logits.sum().backward()
    assert attachment.model().model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_what_was_committed_is_retrieved_and_the_cache_is_cut_off(attachment: Attachment):
    model, tokens = attachment.model(), make_tokens(2, NUM_TOKENS)
    with open_memory(model) as memory:
        cache = memory.new_cache()
        for count, piece in enumerate(tokens.split(SEGMENT_LEN, 1)):
            stored = attachment.find_history(cache).memories[LAYER] if count else None
            assert stored is None or stored.num_appended.tolist() == [count * SEGMENT_LEN] * 2
            call(model, piece, cache).logits.sum().backward()
            assert any(layer.keys.requires_grad for layer in list_layers(cache))
            memory.commit(cache)
            assert not any(layer.keys.requires_grad for layer in list_layers(cache))


def test_training_and_reading_give_the_same_logits(attachment: Attachment):
    model, tokens = attachment.model(), make_tokens(2, NUM_TOKENS)
    with memory_open(attachment):
        cache, found = attachment.make_cache(), []
        for piece in tokens.split(SEGMENT_LEN, 1):
            found.append(call(model, piece, cache).logits.detach())
            attachment.commit(cache)
        with torch.no_grad():
            expected = model(tokens).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=2e-5)


def test_gradient_reaches_gates_scales_and_weights_and_no_entry(attachment: Attachment):
    tokens = make_tokens(2, NUM_TOKENS)
    with memory_open(attachment):
        gradients = train_step(attachment, tokens)
        cache = attachment.make_cache()
        call(attachment.model(), tokens[:, :SEGMENT_LEN], cache)
        attachment.commit(cache)
        memory = attachment.find_history(cache).memories[LAYER]
    prefix = f"model.layers.{LAYER}.self_attn"
    for name in ("memory.bias", "memory.log_scale", "q_proj.weight", "v_proj.weight"):
        assert gradients[f"{prefix}.{name}"].abs().sum() > 0
    assert not memory.keys.requires_grad
    assert not memory.values.requires_grad


def test_rows_give_the_sum_of_their_own_gradients(attachment: Attachment):
    tokens = make_tokens(3, NUM_TOKENS)
    with memory_open(attachment):
        together = train_step(attachment, tokens)
        alone = [train_step(attachment, tokens[row : row + 1]) for row in range(3)]
    compare(together, {name: sum(one[name] for one in alone) for name in together})  # type: ignore[misc]


def test_a_segment_in_pieces_gives_the_gradient_of_the_whole(attachment: Attachment):
    tokens = make_tokens(2, NUM_TOKENS)
    with memory_open(attachment):
        pieces = train_step(attachment, tokens, (6, 7))
        compare(pieces, train_step(attachment, tokens))


def compute_layers_again(model: Any, *, is_reentrant: bool) -> None:
    """Train with gradient checkpointing, which has two names."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": is_reentrant})
    model.train()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize(
    ("is_reentrant", "lengths"),
    # The second call of a segment has begun when the first is computed again. Reentrant
    # checkpoints leave out the gradient that goes from one call to another.
    [(False, (6, 7)), (True, (SEGMENT_LEN,))],
)
def test_gradient_checkpointing_gives_the_same_gradients(
    family: str, is_reentrant: bool, lengths: tuple[int, ...]
):
    attachment = give_memory(make_model(family), layers=[0, LAYER])
    tokens = make_tokens(2, NUM_TOKENS)
    with memory_open(attachment):
        expected = train_step(attachment, tokens, lengths)
        compute_layers_again(attachment.model(), is_reentrant=is_reentrant)
        compare(train_step(attachment, tokens, lengths), expected)


def test_gpt2_leaves_the_cache_out_under_gradient_checkpointing_which_is_refused():
    attachment = give_memory(make_model("gpt2"))
    compute_layers_again(attachment.model(), is_reentrant=False)
    with memory_open(attachment), pytest.raises(StateError, match="wrote nothing into the cache"):
        train_step(attachment, make_tokens(1, 5))


def test_a_commit_before_the_backward_pass_is_refused(attachment: Attachment):
    model, tokens = attachment.model(), make_tokens(1, 2 * SEGMENT_LEN)
    with memory_open(attachment):
        cache = attachment.make_cache()
        call(model, tokens[:, :SEGMENT_LEN], cache)
        attachment.commit(cache)
        loss = call(model, tokens[:, SEGMENT_LEN:], cache).logits.sum()
        attachment.commit(cache)
        with pytest.raises(StateError, match="after backward"):
            loss.backward()


def test_a_commit_before_layers_are_computed_again_is_refused():
    attachment = give_memory(make_model(), dtype="bfloat16")
    model, tokens = attachment.model(), make_tokens(1, 2 * SEGMENT_LEN)
    compute_layers_again(model, is_reentrant=False)
    with memory_open(attachment):
        cache = attachment.make_cache()
        for piece in tokens.split(SEGMENT_LEN, 1):
            loss = call(model, piece, cache).logits.sum()
            attachment.commit(cache)
        with pytest.raises(StateError, match="after backward"):
            loss.backward()


def test_training_with_padding_gives_finite_gradients_that_padding_does_not_change():
    attachment = give_memory(make_model(implementation="eager"))
    model, text = attachment.model(), make_tokens(1, SEGMENT_LEN)
    pad = torch.zeros(1, 4, dtype=torch.int64)
    found = []
    with memory_open(attachment):
        for num_pads in (0, 4):
            model.zero_grad()
            cache = attachment.make_cache()
            tokens = torch.cat([pad[:, :num_pads], text], 1)
            mask = (tokens != 0).long()
            position = (mask.cumsum(1) - 1).clamp(min=0)
            logits = call(model, tokens, cache, attention_mask=mask, position_ids=position).logits
            logits[:, num_pads:].sum().backward()
            attachment.commit(cache)
            piece = make_tokens(1, 5, seed=7)
            mask = torch.cat([mask, torch.ones(1, 5, dtype=torch.int64)], 1)
            position = torch.arange(SEGMENT_LEN, SEGMENT_LEN + 5).unsqueeze(0)
            call(
                model, piece, cache, attention_mask=mask, position_ids=position
            ).logits.sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(gradient.isfinite().all() for gradient in found[1].values())
    # The embedding of padding takes a gradient of its own.
    compare(found[1], found[0])


def test_memory_that_was_read_takes_part_in_training(attachment: Attachment):
    model, tokens = attachment.model(), make_tokens(1, SEGMENT_LEN)
    from memorizing.memory import FrozenMemory

    keys, values = torch.randn(2, 2, 31, 10)
    attachment.bind({LAYER: FrozenMemory.from_tensors(keys, values)})
    with torch.inference_mode():
        model(tokens)
    model(tokens).logits.sum().backward()
    assert attachment.layers[LAYER].bias.grad is not None
    assert attachment.layers[LAYER].bias.grad.abs().sum() > 0
    attachment.unbind()


def test_a_model_that_is_evaluated_between_steps_goes_on_with_its_training():
    attachment = give_memory(find_model())
    model, tokens = attachment.model(), make_tokens(1, NUM_TOKENS)
    with memory_open(attachment):
        cache = attachment.make_cache()
        found = []
        for piece in tokens.split(SEGMENT_LEN, 1):
            found.append(call(model, piece, cache).logits.detach())
            attachment.commit(cache)
            with torch.no_grad():
                read(model, tokens, 7)
        with torch.no_grad():
            expected = model(tokens).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=2e-5)
