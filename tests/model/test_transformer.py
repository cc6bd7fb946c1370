"""The laws of the model: what must hold whatever the weights are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.config import ModelConfig
from memorizing.errors import ConfigError, StateError
from memorizing.memory import memory_bytes
from memorizing.model import MemorizingTransformer, RetrievalControl
from tests.model.tools import SMALL, make_model, make_tokens, read


def set_gates(model: MemorizingTransformer, value: float) -> None:
    for block in model.blocks:
        if block.attention.gate_bias is not None:
            with torch.no_grad():
                block.attention.gate_bias.fill_(value)


@pytest.mark.parametrize(
    "changes", [{}, {"combine": "joint"}, {"empty_value": True}], ids=["gate", "joint", "value"]
)
def test_an_empty_memory_gives_the_output_without_one_bit_for_bit(changes: dict[str, Any]) -> None:
    model = make_model(dtype=torch.float32, **changes)
    tokens = make_tokens(3, 7)
    with_memory = model(tokens, model.init_state(3)).logits
    without = model(tokens, model.init_state(3, capacity=0)).logits
    assert torch.equal(with_memory, without)


def test_a_closed_memory_gives_the_output_of_local_attention_bit_for_bit() -> None:
    model = make_model(dtype=torch.float32)
    tokens = make_tokens(2, 21)
    _, state = read(model, tokens[:, :14])
    _, bare = read(model, tokens[:, :14], capacity=0)
    # The caches differ where the memory was read above them, so compare from equal caches.
    bare = bare.__class__(**{**vars(state), "memories": {}, "staged": {}})
    closed = model(tokens[:, 14:], state, memory_open=False).logits
    assert torch.equal(closed, model(tokens[:, 14:], bare).logits)
    half = model(tokens[:, 14:], state, memory_open=torch.tensor([True, False])).logits
    assert torch.equal(half[1], closed[1])
    assert not torch.allclose(half[0], closed[0])


def test_a_model_without_memory_has_no_use_for_the_value_of_an_empty_one() -> None:
    tokens = make_tokens(2, 33)
    models = [make_model(capacity=0, empty_value=has) for has in (False, True)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    assert models[1].blocks[1].attention.empty_value.abs().max() > 0
    assert torch.equal(*(read(model, tokens)[0] for model in models))


@pytest.mark.parametrize("xl_cache", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"smear_keys": False, "conv_len": 4, "window": 17}, {"combine": "joint", "window": 5}],
    ids=["smear", "conv", "joint"],
)
def test_a_row_that_restarts_reads_as_if_its_document_began(
    changes: dict[str, Any], xl_cache: bool
) -> None:
    model = make_model(xl_cache=xl_cache, **changes)
    tokens = make_tokens(2, 28)
    states = [read(model, tokens[:, :14])[1] for _ in range(2)]
    part = tokens[:, 14:21]
    restarted = model(part, states[0], restart=torch.tensor([True, False]))
    usual = model(part, states[1])
    torch.testing.assert_close(restarted.logits[0], model(part, model.init_state(2)).logits[0])
    assert torch.equal(restarted.logits[1], usual.logits[1])
    # It is written where it stands, and what follows sees all of before.
    state = restarted.state.commit()
    assert state.position.tolist() == [21, 21]
    assert state.memories[1].size.tolist() == [17, 17]
    later = model(tokens[:, 21:], state).logits
    assert torch.equal(later[1], model(tokens[:, 21:], usual.state.commit()).logits[1])
    assert not torch.allclose(later[0], read(model, tokens[:, 14:])[0][0, 7:])


def test_a_closed_gate_equals_the_plain_transformer() -> None:
    model = make_model()
    set_gates(model, -1e4)
    tokens = make_tokens(2, 33)
    torch.testing.assert_close(read(model, tokens)[0], read(model, tokens, capacity=0)[0])


def test_an_open_gate_ignores_the_local_context() -> None:
    # One layer: the logits of a token are then a function of the token and of what its head
    # retrieved.
    model = make_model(num_layers=1, memory_layers=(0,), smear_keys=False, xl_cache=True)
    set_gates(model, 1e4)
    tokens = make_tokens(1, 21)
    other = tokens.clone()
    other[0, 14:20] = (other[0, 14:20] + 1) % 29
    _, state = read(model, tokens[:, :14])
    first, second = (model(t[:, 14:], state).logits for t in (tokens, other))
    torch.testing.assert_close(first[0, -1], second[0, -1])
    assert not torch.allclose(first[0, 0], second[0, 0])


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("changed", [0, 6, 7, 19, 33])
def test_changing_a_token_changes_no_logit_before_it(combine: str, changed: int) -> None:
    model = make_model(combine=combine)
    tokens = make_tokens(1, 37)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 29
    first, second = read(model, tokens)[0], read(model, other)[0]
    assert torch.equal(first[:, :changed], second[:, :changed])
    assert not torch.allclose(first[:, changed], second[:, changed])


def test_a_query_never_retrieves_from_its_own_or_a_later_segment() -> None:
    model = make_model(num_neighbors=5)
    tokens = make_tokens(2, 40)
    state = model.init_state(2)
    for start in range(0, 40, 7):
        output = model(tokens[:, start : start + 7], state, return_retrievals=True)
        if start:
            found = output.retrievals[1]
            assert found.positions[found.valid].max() < start
            assert found.positions[found.valid].min() >= max(0, start - SMALL.capacity)
        state = output.state.commit()


def test_the_joint_softmax_never_retrieves_what_local_attention_sees() -> None:
    model = make_model(combine="joint", num_neighbors=5, window=9)
    tokens = make_tokens(2, 40)
    state = model.init_state(2)
    for start in range(0, 35, 7):
        output = model(tokens[:, start : start + 7], state, return_retrievals=True)
        found = output.retrievals[1]
        queries = torch.arange(start, start + 7).view(1, 1, 7, 1).expand_as(found.positions)
        assert (queries - found.positions)[found.valid].ge(9).all()
        state = output.state.commit()
    assert found.valid.any()


def test_a_document_never_sees_another_document_or_row() -> None:
    model = make_model()
    tokens = make_tokens(3, 28)
    alone, _ = read(model, tokens[1:2])
    torch.testing.assert_close(read(model, tokens)[0][1:2], alone)

    # Another document before it in the same row leaves nothing behind.
    _, state = read(model, make_tokens(3, 25, seed=5))
    state = state.start_documents(torch.tensor([True, True, True]))
    torch.testing.assert_close(read(model, tokens, state=state)[0][1:2], alone)


def test_starting_a_document_in_one_row_leaves_the_others() -> None:
    model = make_model()
    tokens = make_tokens(2, 42)
    whole, _ = read(model, tokens)
    _, state = read(model, tokens[:, :21])
    state = state.start_documents(torch.tensor([True, False]))
    later, _ = read(model, tokens[:, 21:], state=state)
    torch.testing.assert_close(later[1], whole[1, 21:])
    torch.testing.assert_close(later[0], read(model, tokens[:1, 21:])[0][0])


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("xl_cache", [True, False])
@pytest.mark.parametrize("conv_len", [0, 4])
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=40))
def test_any_chunking_gives_the_same_logits(
    combine: str, xl_cache: bool, conv_len: int, lengths: list[int]
) -> None:
    model = make_model(
        combine=combine, xl_cache=xl_cache, conv_len=conv_len, smear_keys=not conv_len
    )
    tokens = make_tokens(1, 31)
    whole, _ = read(model, tokens)
    state = model.init_state(1)
    pieces, start = [], 0
    while start < 31:
        length = lengths[len(pieces) % len(lengths)]
        stop = min(31, start + min(length, 7 - start % 7))
        output = model(tokens[:, start:stop], state)
        pieces.append(output.logits)
        state, start = output.state.commit(), stop
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"xl_cache": False},
        {"combine": "joint", "window": 11, "memory_layers": (0, 2)},
        {"smear_keys": False, "window": 3, "capacity": 5},
        {"smear_keys": False, "conv_len": 4},
    ],
)
def test_padding_changes_nothing(kind: dict[str, object]) -> None:
    model = make_model(**kind)
    memory_layer = model.config.memory_layers[0]
    tokens = make_tokens(3, 19)
    expected, _ = read(model, tokens)
    state = model.init_state(3)
    done = [0, 0, 0]
    collected: list[list[torch.Tensor]] = [[], [], []]
    for step in range(60):
        takes = [
            min((3 + step + 2 * row) % 5, 7 - done[row] % 7, 19 - done[row]) for row in range(3)
        ]
        if not any(takes):
            continue
        call = torch.full((3, 5), 28)
        valid = torch.zeros(3, 5, dtype=torch.bool)
        for row, take in enumerate(takes):
            call[row, :take] = tokens[row, done[row] : done[row] + take]
            valid[row, :take] = True
            done[row] += take
        output = model(call, state, valid=valid)
        state = output.state.commit()
        for row in range(3):
            collected[row].append(output.logits[row, valid[row]])
    assert done == [19, 19, 19]
    for row in range(3):
        torch.testing.assert_close(torch.cat(collected[row]), expected[row], rtol=1e-5, atol=1e-5)
    assert state.memories[memory_layer].num_appended.tolist() == [14, 14, 14]


def test_other_segment_lengths_give_the_same_logits_without_memory() -> None:
    tokens = make_tokens(2, 44)
    results = []
    for segment_len in (3, 7, 11, 44):
        model = make_model(segment_len=segment_len, memory_layers=(), capacity=0)
        results.append(read(model, tokens)[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_crossing_a_boundary_uncommitted_raises() -> None:
    model = make_model()
    tokens = make_tokens(1, 14)
    state = model(tokens[:, :7], model.init_state(1)).state
    with pytest.raises(StateError, match="uncommitted"):
        model(tokens[:, 7:], state)
    model(tokens[:, 7:], state.commit())


def test_a_call_over_a_boundary_raises() -> None:
    model = make_model()
    with pytest.raises(StateError, match="cross a boundary"):
        model(make_tokens(1, 8), model.init_state(1))


def test_a_forward_pass_leaves_its_state_as_it_was() -> None:
    model = make_model()
    tokens = make_tokens(1, 21)
    _, state = read(model, tokens[:, :14])
    first = model(tokens[:, 14:], state)
    assert torch.equal(model(tokens[:, 14:], state).logits, first.logits)
    assert state.position.tolist() == [14]
    assert state.memories[1].num_appended.tolist() == [14]


def test_staged_entries_do_not_pile_up_while_one_row_is_between_boundaries() -> None:
    model = make_model()
    tokens = make_tokens(2, 30)
    _, state = read(model, tokens[:, :3])
    kept = torch.tensor([[False] * 7, [True] * 7])
    state = state.start_documents(torch.tensor([False, True]))
    for _ in range(4):
        state = model(tokens[:, :7], state, valid=kept).state.commit()
        assert state.staged[1].valid.shape == (2, 3)
    assert state.memories[1].num_appended.tolist() == [0, 28]


def test_tails_retrieve_and_are_never_written() -> None:
    model = make_model()
    tokens = make_tokens(1, 17)
    _, state = read(model, tokens)
    assert state.memories[1].num_appended.tolist() == [14]
    assert state.count_pending().tolist() == [3]
    assert state.start_documents(torch.tensor([True])).count_pending().tolist() == [0]


@pytest.mark.parametrize("capacity", [1, 2])
def test_a_capacity_below_the_number_of_neighbors_is_refused(capacity: int) -> None:
    with pytest.raises(ConfigError, match="at least num_neighbors = 3"):
        make_model().init_state(1, capacity=capacity)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="vocabulary has 0 to 28"):
        model(torch.tensor([[29]]), model.init_state(1))


def test_another_documents_memory_is_the_donors() -> None:
    model = make_model()
    tokens = make_tokens(2, 21)
    _, state = read(model, tokens[:, :14])
    swap = RetrievalControl(donor_rows=torch.tensor([1, 0]))
    swapped = model(tokens[:, 14:], state, control=swap, return_retrievals=True)
    # By hand: the same state with the rows of its memory exchanged.
    exchanged = {1: state.memories[1].select_rows(torch.tensor([1, 0]))}
    by_hand = model(tokens[:, 14:], replace(state, memories=exchanged, generation=None))
    torch.testing.assert_close(swapped.logits, by_hand.logits)
    own = model(tokens[:, 14:], state)
    assert not torch.allclose(swapped.logits, own.logits)


def test_shuffled_values_keep_what_is_found_and_change_the_output() -> None:
    model = make_model()
    tokens = make_tokens(2, 21)
    _, state = read(model, tokens[:, :14])
    own = model(tokens[:, 14:], state, return_retrievals=True)
    shuffled = model(
        tokens[:, 14:],
        state,
        control=RetrievalControl(shuffle_values=True, seed=3),
        return_retrievals=True,
    )
    assert torch.equal(own.retrievals[1].slots, shuffled.retrievals[1].slots)
    assert not torch.allclose(own.logits, shuffled.logits)


def test_a_saved_state_continues_bit_for_bit() -> None:
    model = make_model(dtype=torch.float32)
    tokens = make_tokens(2, 40)
    _, state = read(model, tokens[:, :17])
    saved = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    expected, _ = read(model, tokens[:, 17:], state=state)
    restored = model.init_state(2).load_state_dict(saved)
    assert torch.equal(read(model, tokens[:, 17:], state=restored)[0], expected)


def test_a_state_of_another_capacity_is_refused() -> None:
    model = make_model()
    _, state = read(model, make_tokens(2, 14))
    with pytest.raises(StateError, match="capacity"):
        model.init_state(2, capacity=19).load_state_dict(state.state_dict())


def test_selected_rows_continue_as_they_would_have() -> None:
    model = make_model()
    tokens = make_tokens(3, 33)
    _, state = read(model, tokens[:, :18])
    expected, _ = read(model, tokens[:, 18:], state=state.select_rows(torch.tensor([0, 1, 2])))
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(
        read(model, tokens[rows, 18:], state=state.select_rows(rows))[0], expected[rows]
    )


def test_bf16_errs_at_most_twice_as_much_as_plain_bf16_attention() -> None:
    # The error of the plain transformer in bf16 is PyTorch's own; memory must not add a new kind of
    # error.
    model = make_model(dtype=torch.float32, memory_dtype="bfloat16", num_neighbors=17)
    tokens = make_tokens(2, 35)
    errors = {}
    for capacity in (0, 17):
        model.compute_dtype = torch.float32
        exact, _ = read(model, tokens, capacity)
        model.compute_dtype = torch.bfloat16
        errors[capacity] = (read(model, tokens, capacity)[0].float() - exact).abs().mean()
    assert errors[17] <= 2 * errors[0]


@pytest.mark.parametrize(
    ("name", "billions"), [("paper_200m", 0.184), ("paper_1b", 0.871), ("paper_8b", 6.57)]
)
def test_the_papers_sizes_have_the_papers_parameters(name: str, billions: float) -> None:
    from memorizing.config import load_config

    config = load_config(name).model
    with torch.device("meta"):
        model = MemorizingTransformer(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_model_that_was_evaluated_can_be_trained() -> None:
    model = make_model()
    tokens = make_tokens(1, 7)
    with torch.inference_mode():
        model(tokens, model.init_state(1))
    model(tokens, model.init_state(1)).logits.sum().backward()
    assert model.blocks[0].attention.position_bias.table.grad is not None


def test_memory_bytes_are_those_of_the_paper() -> None:
    # 8 heads x 128, bf16 keys and values: 4,096 bytes a token, 32 MiB at 8,192 entries.
    config = ModelConfig(memory_layers=(8,), capacity=8192)
    assert memory_bytes(config, 1, 8192) == 32 * 2**20


def test_a_layer_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers from 0 to 11"):
        ModelConfig(memory_layers=(12,))


def test_memory_layers_without_a_bias_learn_none() -> None:
    tables = {
        name: parameter.requires_grad
        for name, parameter in MemorizingTransformer(
            replace(SMALL, memory_layer_bias=False)
        ).named_parameters()
        if name.endswith("table")
    }
    assert list(tables.values()) == [True, False, True]
