"""Pointing: a proper mixture, exact where it says nothing, and what it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing.model import MemorizingTransformer, RetrievalControl
from memorizing.model.pointer import _Mixture, _sum_by_token
from tests.model.tools import SMALL, make_model, make_tokens, read

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def point_naively(logits: Tensor, share: Tensor, amounts: Tensor, tokens: Tensor) -> Tensor:
    """p = s_0 softmax(z) + c, token by token; amounts and tokens (N, n) before they are summed."""
    p = share.unsqueeze(-1) * torch.softmax(logits, -1)
    return p + torch.zeros_like(p).scatter_add(-1, tokens, amounts)


def make_case(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = 3 * torch.randn(5, 17, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (5, num_tokens), generator=generator)
    parts = torch.rand(5, 1 + num_tokens, generator=generator, dtype=torch.float64)
    parts[0, 1:] = 0  # nothing is found here
    parts[1, 1:3] = 0  # and not by every head there
    parts = parts / parts.sum(-1, keepdim=True)
    return logits.to(dtype), parts[:, 0], parts[:, 1:], tokens


def mix(logits: Tensor, share: Tensor, amounts: Tensor, tokens: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    _, sums = _sum_by_token(tokens, amounts.to(wide))
    return _Mixture.apply(logits, share.to(wide).log(), sums.sums, sums.tokens, sums.is_first)


@pytest.mark.parametrize("num_tokens", [1, 2, 13, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_mixed_is_the_sum_of_shares(num_tokens: int, dtype: torch.dtype) -> None:
    logits, share, amounts, tokens = make_case(num_tokens, dtype)
    mixed = mix(logits, share, amounts, tokens)
    assert mixed.dtype == dtype
    expected = point_naively(logits.double(), share, amounts, tokens)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    found = torch.softmax(mixed.double(), -1)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12)
    assert torch.equal(mixed[0], logits[0])


@pytest.mark.parametrize("num_tokens", [1, 2, 13, 40])
def test_gradients_are_those_of_the_sum_of_shares(num_tokens: int) -> None:
    logits, share, amounts, tokens = make_case(num_tokens, torch.float64)
    weight = torch.randn(5, 17, dtype=torch.float64)
    gradients = []
    for compute in (
        lambda *given: torch.log_softmax(mix(*given), -1),
        lambda *given: torch.log(point_naively(*given)),
    ):
        # Shares and amounts that depend on one another sum to 1 wherever they are moved to.
        free = torch.cat([share.unsqueeze(-1), amounts], -1).log().requires_grad_()
        moved = torch.softmax(free, -1)
        z = logits.clone().requires_grad_()
        result = compute(z, moved[:, 0], moved[:, 1:], tokens)
        # A gradient whose rows do not lie one after another.
        result = result.mT.contiguous().mT
        gradients.append(torch.autograd.grad((result * weight).sum(), [z, free]))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected.nan_to_num())


def test_a_token_that_the_vocabulary_holds_impossible_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, -500.0, -500.0]], requires_grad=True)
    amounts = torch.tensor([[0.3, 0.0]], requires_grad=True)
    mixed = mix(logits, torch.tensor([0.7]), amounts, torch.tensor([[1, 2]]))
    torch.testing.assert_close(torch.softmax(mixed, -1), torch.tensor([[0.7, 0.3, 0.0]]))
    torch.log_softmax(mixed, -1)[0, 1:].sum().backward()
    assert logits.grad.isfinite().all()
    assert amounts.grad.isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"combine": "joint"}, {"memory_layers": (0, 2)}])
def test_an_empty_memory_points_at_nothing_bit_for_bit(changes: dict[str, Any]) -> None:
    model = make_model(pointer=True, dtype=torch.float32, **changes)
    tokens = make_tokens(3, 21)
    _, state = read(model, tokens[:, :14])
    logits = model(tokens[:, :7], model.init_state(3)).logits
    assert torch.equal(logits, model(tokens[:, :7], model.init_state(3, capacity=0)).logits)
    # Neither does a row that does not read its memory, beside others that do.
    pointing, model.pointer = model(tokens[:, 14:], state).logits, None
    bare = model(tokens[:, 14:], state.select_rows(torch.arange(3))).logits
    assert not torch.allclose(pointing, bare)


def test_a_row_whose_memory_is_closed_has_the_logits_of_its_vocabulary() -> None:
    model = make_model(pointer=True)
    tokens = make_tokens(2, 21)
    _, state = read(model, tokens[:, :14])
    half = model(tokens[:, 14:], state, memory_open=torch.tensor([True, False])).logits
    model.pointer = None
    bare = model(tokens[:, 14:], state, memory_open=torch.tensor([True, False])).logits
    assert torch.equal(half[1], bare[1])
    assert not torch.allclose(half[0], bare[0])


def test_a_pointer_changes_no_token_but_those_retrieved() -> None:
    model = make_model(pointer=True)
    tokens = make_tokens(2, 21)
    _, state = read(model, tokens[:, :14])
    output = model(tokens[:, 14:], state, return_retrievals=True)
    pointer, model.pointer = model.pointer, None
    changed = output.logits != model(tokens[:, 14:], state).logits
    model.pointer = pointer
    positions = output.retrievals[1].positions
    for row in range(2):
        for place in range(7):
            found = tokens[row, positions[row, :, place].flatten()]
            assert set(changed[row, place].nonzero().flatten().tolist()) == set(found.tolist())


@pytest.mark.parametrize("shuffled", [False, True])
def test_wrong_memories_point_at_the_wrong_tokens(shuffled: bool) -> None:
    model = make_model(pointer=True)
    tokens = make_tokens(2, 21)
    tokens[0], tokens[1] = tokens[0] % 13, 13 + tokens[1] % 13
    _, state = read(model, tokens[:, :14])
    control = RetrievalControl(None if shuffled else torch.tensor([1, 0]), shuffled, 5)
    pointing = model(tokens[:, 14:], state, control=control).logits
    model.pointer = None
    changed = pointing != model(tokens[:, 14:], state, control=control).logits
    own = torch.stack([changed[0, :, :13].any(), changed[1, :, 13:26].any()])
    others = torch.stack([changed[0, :, 13:26].any(), changed[1, :, :13].any()])
    assert (own if shuffled else others).all()
    assert not (others if shuffled else own).any()


def test_a_chunk_of_any_length_points_as_a_whole_segment_does() -> None:
    model = make_model(pointer=True, memory_layers=(0, 2), capacity=11)
    tokens = make_tokens(2, 33)
    whole, state = read(model, tokens)
    for length in (1, 3):
        logits, other = read(model, tokens, chunk_len=length)
        torch.testing.assert_close(logits, whole)
        assert torch.equal(other.memories[2].tokens, state.memories[2].tokens)


def train_to_copy(pointer: bool) -> float:
    """Nats a token where a document's second half repeats its first, which no other one has."""
    config = replace(
        SMALL, pointer=pointer, vocab_size=499, capacity=32, num_neighbors=4, segment_len=16,
        window=16, smear_keys=False, conv_len=3, induction_init=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MemorizingTransformer(config)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        document = torch.randint(499, (8, 16), generator=generator)
        state = model(document, model.init_state(8)).state.commit()
        log_p = model(document[:, :-1], state).logits.log_softmax(-1)
        # A token is told by those before it, so that the first ones cannot be.
        nats = -log_p.gather(-1, document[:, 1:, None])[:, 3:].mean()
        optimizer.zero_grad()
        nats.backward()
        optimizer.step()
    return nats.item()


def test_new_words_are_copied_after_a_short_training() -> None:
    # ln 499 = 6.2 nats is to know nothing.
    assert train_to_copy(pointer=True) < 0.5
    assert train_to_copy(pointer=False) > 4.0


def test_a_model_without_a_pointer_has_the_same_other_weights() -> None:
    states = []
    for pointer in (True, False):
        torch.manual_seed(5)
        states.append(MemorizingTransformer(replace(SMALL, pointer=pointer)).state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert {name.partition(".")[0] for name in states[0].keys() - states[1].keys()} == {"pointer"}
