"""The history of our own model, and what a memory layer is shown of earlier segments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.errors import ConfigError, StateError
from memorizing.model import Exposed, MemorizingTransformer, ModelOutput, join_exposed
from memorizing.model.layout import attend_to_exposed

from .tools import make_model, make_tokens, read


@pytest.mark.parametrize("shape", [(7,), (2, 0), (0, 7)])
def test_a_call_without_a_token_is_refused(shape: tuple[int, ...]) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="at least one of each"):
        model(torch.zeros(shape, dtype=torch.int64), model.init_state(2))


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (torch.tensor([[True, False, True]]), "padding before a token"),
        (torch.tensor([[False, True, True]]), "begin in column 0"),
        (torch.tensor([[1, 1, 0]]), "must be bool"),
        (torch.tensor([[True, True]]), "as large as tokens"),
    ],
)
def test_a_mask_with_a_hole_or_of_another_kind_is_refused(valid: Tensor, message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        model(make_tokens(1, 3), model.init_state(1), valid=valid)


def test_a_call_without_a_valid_token_changes_no_history() -> None:
    model = make_model()
    tokens = make_tokens(2, 21)
    _, state = read(model, tokens[:, :10])
    idle = model(tokens[:, :3], state, valid=torch.zeros(2, 3, dtype=torch.bool)).state.commit()
    assert idle.position.tolist() == [10, 10]
    assert idle.count_pending().tolist() == [3, 3]
    expected = model(tokens[:, 10:14], state).logits
    torch.testing.assert_close(model(tokens[:, 10:14], idle).logits, expected)


def test_a_state_keeps_no_more_than_its_own_entries() -> None:
    model = make_model(window=7)
    _, state = read(model, make_tokens(2, 14))
    for name, tensor in state.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def make_config(**changes: object) -> ModelConfig:
    config = ModelConfig(
        vocab_size=53, num_layers=3, model_dim=22, num_heads=2, head_dim=10, ffn_dim=31,
        segment_len=7, window=5, memory_layers=(1,), capacity=67, num_neighbors=41,
        memory_dtype="float32", smear_keys=True,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def draw_tokens(rows: int, count: int) -> Tensor:
    return torch.randint(53, (rows, count), generator=torch.Generator().manual_seed(5))


def read_first(model: MemorizingTransformer, tokens: Tensor, num_committed: int) -> ModelOutput:
    """Read three segments; commit only the first `num_committed` of them."""
    state = model.init_state(tokens.shape[0])
    for number in range(num_committed):
        state = model(tokens[:, number * 7 : number * 7 + 7], state).state.commit()
    return model(tokens[:, num_committed * 7 : num_committed * 7 + 7], state)


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("xl_cache", [True, False])
def test_exposed_entries_count_like_retrieved_ones(combine: str, xl_cache: bool) -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(make_config(combine=combine, xl_cache=xl_cache))
    tokens = draw_tokens(3, 21)
    for num_committed in (0, 1):
        before = read_first(model, tokens, num_committed)
        following = tokens[:, num_committed * 7 + 7 : num_committed * 7 + 14]
        exposed = {1: join_exposed([before.live[1]], 1)}
        shown = model(following, before.state, exposed=exposed)
        # With more neighbors than entries all are found, exposed or retrieved.
        found = model(following, before.state.commit())
        torch.testing.assert_close(shown.logits, found.logits, atol=1e-5, rtol=1e-5)


def test_what_waited_is_committed_together() -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(make_config(num_neighbors=11))
    tokens = draw_tokens(2, 21)
    first = read_first(model, tokens, 0)
    second = model(tokens[:, 7:14], first.state, exposed=first.live)
    both = join_exposed([first.live[1], second.live[1]], 2)
    state = model(tokens[:, 14:], second.state, exposed={1: both}).state.commit()
    memory = state.memories[1]
    assert memory.size.tolist() == [21, 21]
    torch.testing.assert_close(memory.keys[:, :, :7], first.live[1].keys.detach())
    assert not state.staged


def test_without_exposure_a_segment_still_waits_for_the_commit() -> None:
    model = MemorizingTransformer(make_config())
    tokens = draw_tokens(2, 14)
    with pytest.raises(StateError, match="uncommitted"):
        model(tokens[:, 7:], read_first(model, tokens, 0).state)


def test_gradient_reaches_an_earlier_segment_through_exposed_entries_only() -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(make_config(xl_cache=False))
    tokens = draw_tokens(2, 14)
    first = read_first(model, tokens, 0)
    for is_exposed in (False, True):
        if is_exposed:
            output = model(tokens[:, 7:], first.state, exposed=first.live)
        else:
            output = model(tokens[:, 7:], first.state.commit())
            first = read_first(model, tokens, 0)
        live = first.live[1]
        grads = torch.autograd.grad(
            output.logits.sum(), [live.keys, live.values], allow_unused=True, retain_graph=True
        )
        assert all((grad is not None and bool(grad.any())) == is_exposed for grad in grads)


def test_other_rows_are_seen_as_negatives() -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 3, 2, 5, 11, dtype=torch.float64)
    valid = torch.ones(3, 5, dtype=torch.bool)
    valid[1, 3:] = False
    output, log_sum = attend_to_exposed(queries, Exposed(keys, values, valid, num_rows=2))
    for row in range(3):
        other = (row + 1) % 3
        seen_keys, seen_values = (
            torch.cat([part[row][:, valid[row]], part[other][:, valid[other]]], 1)
            for part in (keys, values)
        )
        scores = queries[row] @ seen_keys.transpose(-1, -2)
        torch.testing.assert_close(output[row], torch.softmax(scores, -1) @ seen_values)
        torch.testing.assert_close(log_sum[row], torch.logsumexp(scores, -1))


def test_hidden_entries_are_the_newest_own_ones() -> None:
    queries = torch.zeros(2, 1, 2, 3, dtype=torch.float64)
    keys = torch.zeros(2, 1, 4, 3, dtype=torch.float64)
    values = torch.arange(8.0, dtype=torch.float64).view(2, 1, 4, 1).expand(2, 1, 4, 3)
    exposed = Exposed(keys, values, torch.ones(2, 4, dtype=torch.bool), num_rows=2)
    output, _ = attend_to_exposed(queries, exposed, torch.tensor([[0, 3], [2, 4]]))
    # Row 0: entries 0 to 3 are its own, 4 to 7 the other's; row 1 the other way round.
    expected = [[28 / 8, (0 + 22) / 5], [(4 + 5 + 6) / 6, 6 / 4]]
    torch.testing.assert_close(output[..., 0].squeeze(1), torch.tensor(expected).double())


def test_padding_is_not_counted_among_the_hidden_entries() -> None:
    queries, keys = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 5, 3)
    values = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 3)
    valid = torch.tensor([[True, True, True, False, False]])
    output, _ = attend_to_exposed(queries, Exposed(keys, values, valid), torch.tensor([[1]]))
    torch.testing.assert_close(output[0, 0, 0, 0], torch.tensor(0.5))


def test_a_closed_row_sees_nothing_exposed() -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(make_config())
    tokens = draw_tokens(2, 14)
    first = read_first(model, tokens, 0)
    is_open = torch.tensor([True, False])
    closed = model(tokens[:, 7:], first.state, exposed=first.live, memory_open=is_open)
    alone = model(tokens[:, 7:], first.state.commit(), memory_open=False)
    torch.testing.assert_close(closed.logits[1], alone.logits[1])
    assert not torch.allclose(closed.logits[0], alone.logits[0])
