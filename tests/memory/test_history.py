"""The history of rows: never gone on from twice, never mixed with another document's."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memorizing.errors import StateError
from tests.model.tools import make_model, make_tokens, read


def test_a_state_that_was_committed_is_void() -> None:
    model = make_model()
    tokens = make_tokens(2, 14)
    before = model.init_state(2)
    state = model(tokens[:, :7], before).state
    state.commit()
    with pytest.raises(StateError, match="go on from the state"):
        model(tokens[:, :7], before)
    with pytest.raises(StateError, match="go on from the state"):
        state.commit()
    assert before.memories[1].num_appended.tolist() == [7, 7]


def test_a_state_from_before_a_new_document_is_void() -> None:
    model = make_model()
    tokens = make_tokens(2, 14)
    _, state = read(model, tokens[:, :7])
    starts = torch.tensor([True, False])
    started = state.start_documents(starts)
    with pytest.raises(StateError, match="row 0 of this state has read 7 tokens"):
        model(tokens[:, 7:], state)
    # Starting the same documents again is no harm.
    again = model(tokens[:, 7:], state.start_documents(starts)).logits
    assert torch.equal(again, model(tokens[:, 7:], started).logits)


@pytest.mark.parametrize("num_others", [1, 2])
@pytest.mark.parametrize("change", [{}, {"combine": "joint"}, {"memory_layers": (0, 2)}])
def test_a_state_whose_memory_holds_as_much_of_another_document_is_void(
    change: dict[str, object], num_others: int
) -> None:
    model = make_model(**change)
    tokens = make_tokens(2, 14)
    _, state = read(model, tokens[:, :7])
    row = torch.tensor([False, True])
    later = state
    for other in range(num_others):
        later = later.start_documents(row)
        call = make_tokens(2, 7, seed=other + 2)
        valid = row.view(-1, 1).expand(-1, 7)
        later = model(call, later, valid=valid).state.commit()
    assert later.position.tolist() == state.position.tolist()
    for use in (
        lambda: model(tokens[:, 7:], state),
        lambda: state.select_rows(torch.tensor([1])),
    ):
        with pytest.raises(StateError, match="row 1 of this state has read 7 tokens"):
            use()
    loaded = later.load_state_dict(later.state_dict())
    with pytest.raises(StateError, match="go on from the state"):
        model(tokens[:, 7:], later)
    # The row itself may begin anew, and the others then go on.
    again = state.start_documents(torch.ones(2, dtype=torch.bool))
    expected = model(tokens[:, :7], model.init_state(2)).logits
    torch.testing.assert_close(model(tokens[:, :7], again).logits, expected)
    with pytest.raises(StateError, match="go on from the state"):
        model(tokens[:, 7:], loaded)


def test_a_document_that_starts_before_the_commit_takes_nothing_of_the_last_one() -> None:
    model = make_model()
    tokens = make_tokens(2, 21)
    state = model(tokens[:, :7], model.init_state(2)).state
    state = state.start_documents(torch.tensor([True, False]))
    assert state.count_pending().tolist() == [0, 7]
    state = state.commit()
    assert state.memories[1].num_appended.tolist() == [0, 7]
    logits = model(tokens[:, 7:14], state).logits
    torch.testing.assert_close(logits[0], read(model, tokens[:1, 7:14])[0][0])


@pytest.mark.parametrize("starts", [torch.tensor([0]), torch.tensor([True]), torch.tensor([1, 0])])
def test_documents_start_by_a_mask_over_the_rows(starts: Tensor) -> None:
    state = make_model().init_state(2)
    with pytest.raises(StateError, match="bool per row"):
        state.start_documents(starts)


def test_selected_rows_share_nothing_with_the_whole() -> None:
    model = make_model()
    _, state = read(model, make_tokens(3, 18))
    chosen = state.select_rows(torch.tensor([2, 0]))
    kept = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    for tensor in chosen.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(state.state_dict()[name], kept[name]) for name in kept)


@pytest.mark.parametrize("pointer", [False, True])
def test_a_loaded_state_does_not_write_into_the_saved_tensors(pointer: bool) -> None:
    model = make_model(pointer=pointer)
    tokens = make_tokens(2, 21)
    _, state = read(model, tokens[:, :10])
    saved = state.state_dict()
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    read(model, tokens[:, 10:], state=model.init_state(2).load_state_dict(saved))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 2},
        {"memory_layers": (1, 2)},
        {"memory_layers": ()},
        {"head_dim": 5},
        {"smear_keys": False},
        {"smear_keys": False, "conv_len": 3},
        {"memory_dtype": "bfloat16"},
        {"pointer": True},
    ],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(
    change: dict[str, object],
) -> None:
    _, state = read(make_model(), make_tokens(2, 14))
    kept = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    with pytest.raises(StateError, match=r"another model|saved with"):
        state.load_state_dict(make_model(**change).init_state(2).state_dict())
    assert all(torch.equal(state.state_dict()[name], kept[name]) for name in kept)


def test_a_state_of_another_precision_is_refused() -> None:
    _, state = read(make_model(), make_tokens(2, 14))
    other = make_model(dtype=torch.float32).init_state(2)
    with pytest.raises(StateError, match="precision"):
        other.load_state_dict(state.state_dict())


def test_a_state_made_in_inference_mode_can_be_trained_with() -> None:
    model = make_model()
    with torch.inference_mode():
        state = model.init_state(1)
    output = model(make_tokens(1, 7), state)
    output.logits.sum().backward()
    assert output.state.commit().memories[1].size.tolist() == [7]


@pytest.mark.parametrize("pointer", [False, True])
def test_a_copied_or_pickled_model_and_state_go_on_alike(pointer: bool) -> None:
    model = make_model(pointer=pointer)
    tokens = make_tokens(2, 14)
    _, state = read(model, tokens[:, :7])
    expected = model(tokens[:, 7:], state).logits
    for other, history in (
        copy.deepcopy((model, state)),
        pickle.loads(pickle.dumps((model, state))),
    ):
        assert torch.equal(other(tokens[:, 7:], history).logits, expected)
        assert history.memories[1].keys.data_ptr() != state.memories[1].keys.data_ptr()


def test_a_commit_before_the_backward_pass_of_a_checkpointed_step_is_refused() -> None:
    model = make_model()
    model.gradient_checkpointing = True
    tokens = make_tokens(1, 14)
    _, state = read(model, tokens[:, :7])
    output = model(tokens[:, 7:], state)
    output.state.commit()
    with pytest.raises(StateError, match="after backward"):
        output.logits.sum().backward()


def test_memories_of_several_layers_are_written_alike() -> None:
    model = make_model(memory_layers=(0, 2))
    _, state = read(model, make_tokens(2, 25))
    first, second = state.memories[0], state.memories[2]
    assert first.num_appended.tolist() == second.num_appended.tolist() == [21, 21]
    assert not torch.equal(first.keys, second.keys)
    behind = replace(state, memories={0: first.select_rows(torch.tensor([0, 1])), 2: second})
    behind.memories[0].append(first.keys[:, :, :1], first.values[:, :, :1])
    with pytest.raises(StateError, match="has taken 22, 21"):
        model(make_tokens(2, 1), behind)
