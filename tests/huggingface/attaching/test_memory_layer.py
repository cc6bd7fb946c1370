"""What a memory layer computes: equal to loops over tokens and heads, in value and in gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing.huggingface import remove_memory
from memorizing.huggingface.attaching.families import collect_entries
from memorizing.huggingface.attaching.memory_layer import CLOSED, sum_local_scores
from tests.huggingface.tools import (
    CAPACITY,
    CONFIGS,
    LAYER,
    NUM_SINKS,
    ROTARY,
    SEGMENT_LEN,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
    naive_attention,
    read,
)

NUM_TOKENS = 74
"""Five segments and a tail, so that the window has moved on."""


def set_gates(attachment: Any, bias: float = 0.4) -> None:
    """Gates and scales that differ from head to head, and from where they start."""
    with torch.no_grad():
        for layer in attachment.layers.values():
            layer.bias += bias + 0.3 * torch.arange(len(layer.bias))
            layer.log_scale += 0.2 * torch.arange(len(layer.bias)) - 0.1


def compare(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


def check_against_loops(model: Any, **settings: Any) -> None:
    tokens = make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model, **settings)
    set_gates(attachment)
    with torch.no_grad():
        without = model(tokens).logits
        with memory_open(attachment):
            found = read(model, tokens, 19)
        assert (found - without)[:, 3 * SEGMENT_LEN :].abs().max() > 0.01
        with naive_attention(attachment) as base:
            compare(found, base(tokens, use_cache=False).logits)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_familys_memory_equals_loops_over_tokens_and_heads(family: str):
    check_against_loops(find_model(family))


@pytest.mark.parametrize(
    "settings",
    [
        {"combine": "gate"},
        {"distance": 0},
        {"distance": 7, "combine": "gate"},
        {"search": "normalized"},
        {"temperature": 0.3},
        {"num_sinks": 0},
        {"layers": [0, 2]},
        {"capacity": 17},
        {"capacity": 17, "num_sinks": 0, "combine": "gate"},
        {"num_neighbors": 1, "capacity": 1, "num_sinks": 0, "combine": "gate"},
        {"segment_len": 29},
        {"segment_len": 1, "num_neighbors": 2},
    ],
    ids=str,
)
def test_every_setting_of_the_memory_equals_loops_over_tokens_and_heads(settings: dict[str, Any]):
    check_against_loops(find_model(), **settings)


def test_bounded_scores_and_the_layers_own_window_equal_loops_over_tokens_and_heads():
    # Layers 0 and 2 see 19 tokens by themselves.
    check_against_loops(find_model("gemma2"), layers=[0, 1], combine="joint")


def test_scaled_rotary_positions_equal_loops_over_tokens_and_heads():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 53}
    check_against_loops(make_model(rope_parameters={"rope_theta": 1e4, **rope}))


def test_where_learned_positions_begin_again_what_is_out_of_sight_can_be_retrieved():
    model, tokens = make_model("gpt2", n_positions=41), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model)
    set_gates(attachment)
    position = (torch.arange(NUM_TOKENS) % 39).unsqueeze(0)
    with torch.no_grad():
        with memory_open(attachment):
            found = read(model, tokens, SEGMENT_LEN)
        with naive_attention(attachment, find_first=lambda t: t // 39 * 39) as base:
            compare(found, base(tokens, use_cache=False, position_ids=position).logits)


@pytest.mark.parametrize("combine", ["joint", "gate"])
def test_the_gradients_of_training_equal_those_of_loops_over_tokens_and_heads(combine: str):
    model = make_model()
    tokens = make_tokens(1, 4 * SEGMENT_LEN + 5)
    attachment = give_memory(model, combine=combine)
    set_gates(attachment)
    weight = torch.randn(tokens.shape[1], 101, generator=torch.Generator().manual_seed(3))
    heads = {f"memory.{name}": p for name, p in attachment.layers[LAYER].named_parameters()}
    with memory_open(attachment):
        cache = attachment.make_cache()
        pieces = zip(tokens.split(SEGMENT_LEN, 1), weight.split(SEGMENT_LEN), strict=True)
        for piece, factor in pieces:
            logits = call(model, piece, cache).logits[0]
            (logits * factor).sum().backward()
            attachment.commit(cache)
    found = {name: p.grad for name, p in list(model.named_parameters()) + list(heads.items())}
    model.zero_grad()
    with naive_attention(attachment) as base:
        for parameter in heads.values():
            parameter.grad = None
        (base(tokens, use_cache=False).logits[0] * weight).sum().backward()
    for name, parameter in list(model.named_parameters()) + list(heads.items()):
        assert parameter.grad is not None
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(
            found[name] / scale, parameter.grad / scale, rtol=0, atol=2e-4, msg=name
        )
    assert heads["memory.bias"].grad.abs().min() > 0
    assert heads["memory.log_scale"].grad.abs().min() > 0


@pytest.mark.parametrize("combine", ["joint", "gate"])
@pytest.mark.parametrize(("bias", "tolerance"), [(CLOSED, 0.0), (CLOSED + 5.0, 1e-5)])
def test_a_closed_gate_is_no_memory(combine: str, bias: float, tolerance: float):
    model, tokens = find_model(), make_tokens(2, NUM_TOKENS)
    attachment = give_memory(model, combine=combine, bias=bias)
    with torch.no_grad():
        without = model(tokens, use_cache=False).logits
        with memory_open(attachment):
            found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, without, rtol=tolerance, atol=tolerance)


def test_an_open_gate_ignores_the_local_context():
    model, tokens = find_model(), make_tokens(1, 2 * SEGMENT_LEN)
    attachment = give_memory(model, combine="gate", bias=6e4, num_neighbors=1, capacity=1)
    outputs = []
    hook = model.model.layers[LAYER].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: outputs.append(args[0])
    )
    with torch.no_grad(), memory_open(attachment):
        model(tokens)
    hook.remove()
    _, value = collect_entries(attachment, tokens[0])[LAYER]
    # One entry is left: the last of the first segment, whatever is asked.
    expected = value[0, :, SEGMENT_LEN - 1].repeat_interleave(2, 0).flatten()
    compare(outputs[0][0, SEGMENT_LEN:], expected.expand(SEGMENT_LEN, -1))


def test_heads_of_a_group_read_the_memory_of_their_head():
    model, tokens = find_model(), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        call(model, tokens, cache)
        state = attachment.find_history(cache)
    # Four heads of queries, two of keys; 65 of 74 tokens are before the last boundary.
    assert state.memories[LAYER].keys.shape == (1, 2, CAPACITY, 10)
    assert state.memories[LAYER].num_appended.tolist() == [65]
    assert state.position.tolist() == [74]


@pytest.mark.parametrize("family", ROTARY)
def test_keys_are_stored_free_of_their_positions(family: str):
    model = find_model(family)
    attachment = give_memory(model, layers=[0, 1, 2])
    found = collect_entries(attachment, torch.full((23,), 7))
    for keys, values in found.values():
        compare(keys, keys[:, :, :1].expand_as(keys))
        compare(values, values[:, :, :1].expand_as(values))


def test_learned_positions_stay_in_stored_keys():
    attachment = give_memory(find_model("gpt2"))
    keys, _ = collect_entries(attachment, torch.full((23,), 7))[LAYER]
    assert (keys - keys[:, :, :1]).abs().max() > 0.1


def test_normalized_keys_have_the_mean_norm_of_their_heads_keys():
    model = find_model()
    attachment = give_memory(model, search="normalized")
    norm = attachment.layers[LAYER].key_norm
    assert norm is not None
    keys, _ = collect_entries(attachment, make_tokens(1, 29)[0])[LAYER]
    compare(keys.norm(dim=-1), norm.view(1, -1, 1).expand(1, 2, 29))
    remove_memory(model)
    attachment = give_memory(model)
    keys, _ = collect_entries(attachment, make_tokens(1, 29)[0])[LAYER]
    means = keys.norm(dim=-1).mean(-1)[0]
    assert (norm / means - 1).abs().max() < 0.2
    assert means[0] != means[1]
    remove_memory(model)
    again = give_memory(model, search="normalized").layers[LAYER].key_norm
    assert again is not None
    assert torch.equal(again, norm)


def test_distance_turns_the_query_and_nothing_else():
    model, tokens = find_model(), make_tokens(1, NUM_TOKENS)
    found = {}
    for distance in (0, 11):
        attachment = give_memory(model, distance=distance)
        with torch.no_grad(), memory_open(attachment):
            cache = attachment.make_cache()
            logits = call(model, tokens, cache).logits
            memory = attachment.find_history(cache).memories[LAYER]
        found[distance] = (logits, memory.keys.clone())
        remove_memory(model)
    assert torch.equal(found[0][1], found[11][1])
    assert (found[0][0] - found[11][0]).abs().max() > 1e-3


def test_with_memory_bfloat16_errs_no_more_than_twice_as_much_as_without():
    model = make_model().to(torch.bfloat16)
    exact, tokens = make_model().to(torch.bfloat16).float(), make_tokens(1, NUM_TOKENS)
    errors = []
    attachments = [give_memory(one, dtype="bfloat16", num_sinks=0) for one in (model, exact)]
    for is_open in (False, True):
        with torch.no_grad():
            for attachment in attachments if is_open else ():
                attachment.bind({})
            found = model(tokens).logits
            assert found.dtype == torch.bfloat16
            errors.append((found - exact(tokens).logits).abs().mean())
    assert errors[1] < 2 * errors[0]


def test_sums_of_local_scores_are_finite_where_padding_sees_nothing():
    queries = torch.randn(1, 2, 3, 5, requires_grad=True)
    keys = torch.randn(1, 1, 3, 5)
    mask = torch.tensor([[False, False, False], [False, True, False], [False, True, True]])
    total = sum_local_scores(queries, keys, mask, 0.5, None)
    torch.sigmoid(1.0 - total).sum().backward()
    assert total.isfinite().all()
    assert queries.grad is not None
    assert queries.grad.isfinite().all()
    expected = torch.logsumexp(queries[0, :, 2] @ keys[0, 0, 1:].T * 0.5, -1)
    compare(total[0, :, 2], expected)


def test_a_head_that_finds_nothing_takes_no_gradient_and_gives_none():
    layer = give_memory(find_model(), combine="joint").layers[LAYER]
    queries = torch.randn(1, 4, 3, 5, requires_grad=True)
    attended = layer.attend(queries, (), 0.5, None)
    assert not attended.found.any()
    assert torch.equal(attended.output, torch.zeros(1, 4, 3, 5))
    local = torch.randn(1, 4, 3, 5)
    assert torch.equal(layer.mix(local, attended, torch.zeros(1, 4, 3)), local)


def test_the_first_tokens_are_not_retrieved_and_do_not_take_the_place_of_others():
    model, tokens = find_model(), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model, combine="gate")
    found: list[Tensor] = []
    with (
        torch.no_grad(),
        memory_open(attachment),
        attachment.listen(lambda layer, findings, gates: found.extend(f.shares for f in findings)),
    ):
        model(tokens)
    # After the first segment there are 13 - 3 entries for the 5 neighbors of each token.
    assert SEGMENT_LEN - NUM_SINKS >= 5
    assert all((share > 0).sum(-1).eq(5).all() for share in found)
    assert all(torch.allclose(share.sum(-1), torch.ones(())) for share in found)
