"""The model against the paper's formulas token by token, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from memorizing.model.reference import compute_reference_logits

from .tools import make_model, make_tokens, read

KINDS = {
    "vanilla": {"xl_cache": False, "memory_layers": (), "capacity": 0},
    "sliding window": {"xl_cache": False, "window": 3, "memory_layers": (), "capacity": 0},
    "transformer-xl": {"memory_layers": (), "capacity": 0},
    "transformer-xl, short window": {"window": 5, "memory_layers": (), "capacity": 0},
    "transformer-xl, window of several segments": {
        "window": 19,
        "memory_layers": (),
        "capacity": 0,
    },
    "memory without cache": {"xl_cache": False},
    "memory with cache": {},
    "memory of every token": {"capacity": 64},
    "memory of k entries": {"capacity": 3},
    "every entry retrieved": {"capacity": 23, "num_neighbors": 23},
    "two memory layers": {"memory_layers": (0, 2)},
    "a value for an empty memory": {"empty_value": True},
    "a value for an empty memory, two memory layers": {
        "empty_value": True,
        "memory_layers": (0, 2),
        "xl_cache": False,
    },
    "a value for an empty memory, of a model without one": {"empty_value": True, "capacity": 0},
    "a pointer": {"pointer": True},
    "a pointer of a model without memory": {"pointer": True, "capacity": 0},
    "a pointer of two memory layers": {"pointer": True, "memory_layers": (0, 2), "capacity": 9},
    "a pointer, joint softmax": {"pointer": True, "combine": "joint", "num_neighbors": 7},
    "a pointer without normalization": {"pointer": True, "normalize_qk": False},
    "a pointer, a value for an empty memory, convolution": {
        "pointer": True,
        "empty_value": True,
        "smear_keys": False,
        "conv_len": 3,
    },
    "a pointer at every entry": {"pointer": True, "capacity": 64, "num_neighbors": 47},
    "joint softmax": {"combine": "joint"},
    "joint softmax without cache": {"combine": "joint", "xl_cache": False},
    "joint softmax, window of several segments": {"combine": "joint", "window": 11, "capacity": 31},
    "without smearing": {"smear_keys": False},
    "convolution": {"smear_keys": False, "conv_len": 4},
    "convolution of two tokens, joint softmax": {
        "smear_keys": False,
        "conv_len": 2,
        "combine": "joint",
    },
    "convolution longer than a segment": {
        "smear_keys": False,
        "conv_len": 5,
        "segment_len": 3,
        "window": 3,
        "normalize_qk": False,
    },
    "without normalization": {"normalize_qk": False},
    "memory in every layer": {"num_layers": 2, "memory_layers": (0, 1)},
    "ring shorter than a segment": {"capacity": 5, "window": 11},
    "ring of exactly a segment": {"capacity": 7, "combine": "joint", "window": 3},
    "ring one longer than a segment": {"capacity": 8, "xl_cache": False, "window": 2},
    "segments of one token": {"segment_len": 1, "window": 4, "capacity": 5},
    "a window of one token": {"window": 1, "combine": "joint"},
    "one segment": {"segment_len": 53, "window": 19, "memory_layers": (), "capacity": 0},
    "joint softmax without normalization": {"combine": "joint", "normalize_qk": False},
    "one bucket per half": {"num_buckets": 2, "max_distance": 2},
}


def test_frozen_weights_get_no_gradient_and_leave_the_others_theirs() -> None:
    gradients = []
    for frozen in (False, True):
        model = make_model()
        _, state = read(model, make_tokens(2, 14))
        if frozen:
            model.requires_grad_(False)
            for parameter in model.memory_parameters():
                parameter.requires_grad_()
        model(make_tokens(2, 7, seed=2), state).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.memory_parameters()])
    assert model.embedding.weight.grad is None
    for whole, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, alone)


def test_gradient_reaches_the_current_keys_and_never_a_stored_entry() -> None:
    model = make_model(num_layers=1, memory_layers=(0,))
    tokens = make_tokens(1, 14)
    tokens[0, :7] %= 11
    tokens[0, 7:] = 11 + tokens[0, 7:] % 17
    _, state = read(model, tokens[:, :7])
    # Not the logits: their product with the tied embedding reaches every token's vector.
    seen = []
    model.final_norm.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(tokens[:, 7:], state)
    seen[0].square().sum().backward()
    reached = model.embedding.weight.grad.abs().sum(1) > 0
    assert reached[tokens[0, 7:]].all()
    assert not reached[tokens[0, :7]].any()
    assert model.blocks[0].attention.key.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_the_reference(kind: str) -> None:
    model = make_model(**KINDS[kind])
    tokens = make_tokens(1, 41)
    logits, _ = read(model, tokens)
    expected = compute_reference_logits(model, tokens[0], model.config.capacity)
    # Stored entries are fp32, the rest fp64.
    torch.testing.assert_close(logits[0], expected, rtol=1e-5, atol=1e-5)

    # An uneven weight per logit, so that no gradient cancels.
    weight = torch.linspace(-1.0, 1.0, expected.numel(), dtype=expected.dtype).view_as(expected)
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(
        (logits[0] * weight).sum(), list(parameters.values()), allow_unused=True
    )
    theirs = torch.autograd.grad(
        (expected * weight).sum(), list(parameters.values()), allow_unused=True
    )
    for name, our, their in zip(parameters, ours, theirs, strict=True):
        assert (our is None) == (their is None), name
        if our is not None:
            torch.testing.assert_close(
                our, their, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_gate_and_scale_and_query_of_a_memory_layer_get_gradients() -> None:
    model = make_model()
    logits, _ = read(model, make_tokens(2, 31))
    logits.square().sum().backward()
    attention = model.blocks[1].attention
    for parameter in (
        attention.gate_bias,
        attention.scale,
        attention.query.weight,
        attention.key.weight,
    ):
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_neither_logits_nor_gradients(dropout: float) -> None:
    gradients = []
    for enabled in (False, True):
        model = make_model(dropout=dropout)
        model.gradient_checkpointing = enabled
        tokens = make_tokens(2, 20)
        state = model.init_state(2)
        for start in range(0, 20, 7):
            output = model(tokens[:, start : start + 7], state)
            output.logits.square().sum().backward()
            state = output.state.commit()
        assert state.memories[1].num_appended.tolist() == [14, 14]
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)
