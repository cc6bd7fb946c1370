"""Access by a threshold: what reaches it is read, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from memorizing.data import TokenizedDocument
from memorizing.evaluation import evaluate_documents
from memorizing.model import MemorizingTransformer, evaluation_mode
from tests.experiments.scripts import open_script
from tests.model.tools import SMALL, make_tokens

CONFIG = replace(SMALL, num_neighbors=9, capacity=29, empty_value=True)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with open_script("thresholds") as module:
        yield module


def make_models(script: ModuleType, threshold: list[float] | None):
    """The model's own attention and one that chooses, with the same weights; how it chooses."""
    access = script.Access(None if threshold is None else torch.tensor(threshold))
    attention = partial(script.ChoosingAttention, access=access)
    torch.manual_seed(0)
    plain = MemorizingTransformer(CONFIG)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    choosing = MemorizingTransformer(CONFIG, attention)
    choosing.load_state_dict(plain.state_dict())
    return plain, choosing, access


def read_last(model: MemorizingTransformer, tokens: torch.Tensor, capacity: int | None = None):
    """The output of the last of four segments."""
    state, output = model.init_state(len(tokens), capacity), None
    with evaluation_mode(model):
        for part in tokens.split(model.config.segment_len, 1):
            if output is not None:
                state = output.state.commit()
            output = model(part, state, return_retrievals=True)
    assert output is not None
    return output


def test_what_reaches_the_threshold_of_a_head_is_read(script: ModuleType) -> None:
    tokens = make_tokens(2, 4 * CONFIG.segment_len)
    plain, choosing, access = make_models(script, [0.1, -0.2])
    expected, found = read_last(plain, tokens), read_last(choosing, tokens)
    (layer,) = CONFIG.memory_layers
    before, after = expected.retrievals[layer], found.retrievals[layer]
    reached = before.valid & (before.scores >= torch.tensor([0.1, -0.2]).view(-1, 1, 1))
    assert 0 < reached.sum() < before.valid.sum()
    assert torch.equal(after.valid, reached)
    weights = before.weights.masked_fill(~reached, 0)
    weights = weights / weights.sum(-1, keepdim=True)
    some = reached.any(-1)
    torch.testing.assert_close(after.weights[some], weights[some])
    assert not torch.equal(expected.logits, found.logits)
    access.num_read = access.num_queries = access.num_without = access.num_full = 0
    read_last(choosing, tokens)
    # Three of the segments have entries before them.
    assert access.num_queries == 3 * reached[..., 0].numel()
    assert access.num_read > int(reached.sum())


def test_a_threshold_that_all_reach_changes_nothing_and_one_that_none_reaches_closes_the_memory(
    script: ModuleType,
) -> None:
    tokens = make_tokens(2, 4 * CONFIG.segment_len)
    for threshold in (None, [-1.1, -1.1]):
        plain, choosing, access = make_models(script, threshold)
        assert torch.equal(read_last(plain, tokens).logits, read_last(choosing, tokens).logits)
        assert access.num_without == 0
    plain, choosing, access = make_models(script, [1.1, 1.1])
    found = read_last(choosing, tokens)
    closed = read_last(plain, tokens, capacity=0)
    torch.testing.assert_close(found.logits, closed.logits)
    assert (access.num_read, access.num_full) == (0, 0)
    assert access.num_without == access.num_queries > 0


def test_thresholds_let_in_as_many_as_they_are_asked_for(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "EVERY", 1)
    plain, _, _ = make_models(script, None)
    length = 12 * CONFIG.segment_len
    documents = [
        TokenizedDocument(
            f"{row}", make_tokens(1, length, seed=row)[0].numpy().astype(np.uint16), 1
        )
        for row in range(2)
    ]
    reading: dict[str, Any] = {"capacity": 29, "rows": 2}
    alike, by_head = script.find_thresholds(plain, documents, 0, (2, 5), **reading)
    whole = []

    def keep(output) -> None:
        (found,) = output.retrievals.values()
        whole.append(found.scores[:, :, found.valid[0, 0].all(-1)])

    evaluate_documents(plain, documents, 0, on_output=keep, **reading)
    scores = torch.cat(whole, 2)
    for count, together, each in zip((2, 5), alike, by_head, strict=True):
        assert float((scores >= together.view(-1, 1, 1)).sum(-1).double().mean()) == pytest.approx(
            count, abs=0.01
        )
        counts = (scores >= each.view(-1, 1, 1)).sum(-1).double().mean((0, 2))
        torch.testing.assert_close(counts, torch.full_like(counts, count), atol=0.01, rtol=0)
        assert len(set(together.tolist())) == 1 < len(set(each.tolist()))
