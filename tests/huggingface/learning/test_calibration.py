"""Calibration: the slopes are those of the loss, and the model is as it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from memorizing import add_memory, calibrate, remove_memory
from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.learning.calibration import (
    LEAST_GAIN,
    choose_heads,
    measure_nats,
    measure_slopes,
)


@pytest.fixture
def model():
    torch.manual_seed(9)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=42,
        intermediate_size=59,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=14,
        max_position_embeddings=151,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(11)
    phrase = torch.randint(53, (31,), generator=generator)
    return torch.cat([phrase, torch.randint(53, (19,), generator=generator), phrase, phrase])


SETTINGS = {
    "read": "entries",
    "window": 13,
    "num_neighbors": 5,
    "capacity": 101,
    "dtype": "float32",
    "num_sinks": 2,
}


def test_slopes_are_the_change_of_the_loss_with_a_heads_strength(model, tokens):
    add_memory(model, [1, 2], **SETTINGS)
    attachment = get_attachment(model)
    nats, slopes = measure_slopes(attachment, tokens)
    assert slopes.shape == ((len(tokens) - 1) // 13, 2, 3)
    assert bool((slopes[0] == 0).all())
    for layer, head in ((1, 2), (2, 0)):
        measured = []
        for strength in (-1e-2, 1e-2):
            strengths = {number: torch.zeros(3) for number in attachment.layers}
            strengths[layer][head] = strength
            with attachment.change_mode(strengths=strengths):
                measured.append(measure_nats(attachment, tokens))
        expected = (measured[1] - measured[0]) / 2e-2
        # Later segments also differ by what the strength did to the entries of this one.
        torch.testing.assert_close(slopes[1, layer - 1, head], expected[1], rtol=0.02, atol=2e-4)
        assert abs(float(expected[1])) > 1e-3
    with attachment.change_mode(strengths=dict.fromkeys(attachment.layers, torch.zeros(3))):
        torch.testing.assert_close(measure_nats(attachment, tokens), nats)
    remove_memory(model)


def test_a_calibrated_model_is_as_it_was_and_gains_on_its_text(model, tokens):
    before = model(tokens[None, :30]).logits
    frozen = model.lm_head.weight
    frozen.requires_grad_(False)
    found = calibrate(model, tokens, candidates=[1, 2], biases=(-3.0, 0.0), **SETTINGS)
    assert found.nats_with < found.nats_without
    assert set(found.heads) <= {1, 2}
    assert found.settings["bias"] in (-3.0, 0.0)
    assert torch.equal(model(tokens[None, :30]).logits, before)
    assert not frozen.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    found.add_to(model)
    attachment = get_attachment(model)
    assert attachment.settings.window == 13
    first = 2
    nats = measure_nats(attachment, tokens)[first:].mean()
    assert float(nats) == pytest.approx(found.nats_with, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_is_calibrated(model, tokens, dtype):
    settings = SETTINGS | {"dtype": str(dtype).removeprefix("torch.")}
    found = calibrate(model.to(dtype), tokens, **settings)
    assert found.nats_with <= found.nats_without
    assert found.slopes.isfinite().all()


def test_candidates_may_be_named_in_any_order(model, tokens):
    both = [
        calibrate(model, tokens, candidates=layers, biases=(0.0,), **SETTINGS)
        for layers in ([1, 2], [2, 1])
    ]
    assert both[0].heads == both[1].heads
    assert both[0].candidates == both[1].candidates == (1, 2)


def test_heads_are_chosen_by_what_they_promise_in_every_segment():
    slopes = torch.zeros(4, 3, 2)
    slopes[:, 0, 1] = -0.02
    slopes[:, 1, 0] = -LEAST_GAIN / 2
    slopes[:, 1, 1] = torch.tensor([-0.9, 0.7, -0.5, 0.6])  # by chance
    slopes[:, 2, 0] = -0.05
    slopes[:, 2, 1] = 0.03
    assert choose_heads(slopes, 3) == {0: (1,), 2: (0,)}
    assert choose_heads(slopes, 1) == {2: (0,)}
    assert choose_heads(slopes.abs(), 3) == {}


def test_a_text_that_is_too_short_is_refused_and_the_model_left_alone(model, tokens):
    with pytest.raises(ConfigError, match="four windows"):
        calibrate(model, tokens[:52], **SETTINGS)
    with pytest.raises(ConfigError, match="max_layers"):
        calibrate(model, tokens, max_layers=0, **SETTINGS)
    add_memory(model, [1], **SETTINGS)
    with pytest.raises(ConfigError, match="has a memory"):
        calibrate(model, tokens, **SETTINGS)


def test_a_model_that_does_not_gain_is_told_so(model, tokens):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with pytest.raises(ConfigError, match="no head of this model gains"):
        calibrate(model, tokens, **SETTINGS)


def test_calibration_tells_how_far_it_is(model, tokens):
    told = []
    calibrate(
        model,
        tokens,
        biases=(-3.0, 0.0),
        progress=lambda *numbers: told.append(numbers),
        **SETTINGS,
    )
    num_segments = (len(tokens) - 1) // 13
    assert told == [(13 * n, 3 * 13 * num_segments) for n in range(1, 3 * num_segments + 1)]


def test_calibration_inside_of_inference_mode_finds_the_same(model, tokens):
    expected = calibrate(model, tokens, biases=(0.0,), **SETTINGS)
    with torch.inference_mode():
        found = calibrate(model, tokens, biases=(0.0,), **SETTINGS)
    assert found.heads == expected.heads
    torch.testing.assert_close(found.slopes, expected.slopes)


def test_weights_without_gradients_are_refused_with_the_reason(model, tokens):
    with torch.inference_mode():
        loaded = copy.deepcopy(model)
        with pytest.raises(ConfigError, match="loaded outside"):
            calibrate(loaded, tokens, **SETTINGS)
