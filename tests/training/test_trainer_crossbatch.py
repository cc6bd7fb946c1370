"""Steps of several segments, with gradient between them."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from memorizing.config import Config, ModelConfig, TrainingConfig
from memorizing.data import SegmentBatch
from memorizing.errors import ConfigError
from memorizing.model import Exposed
from memorizing.training import Trainer
from memorizing.training.trainer import Rows
from tests.training.conftest import LENGTHS, SEGMENT_LEN, raise_after

MakeTrainer = Callable[..., Trainer]
CROSSBATCH = {"crossbatch_segments": 2, "crossbatch_rows": 3, "crossbatch_share": 0.5}


def test_a_step_reads_several_segments_until_a_document_begins(make_trainer: MakeTrainer) -> None:
    assert min(LENGTHS) < SEGMENT_LEN < max(LENGTHS)
    loader = make_trainer(rows=1).loader
    expected: list[int] = []
    left = 0
    for batch in itertools.islice(loader, 20):
        if left == 0 or bool(batch.doc_start[0]):
            expected.append(0)
            left = 3
        expected[-1] += batch.num_targets
        left -= 1
    targets: list[int] = []
    make_trainer(
        on_step=lambda step: targets.append(step.num_targets),
        **{**CROSSBATCH, "rows": 1, "crossbatch_rows": 1, "crossbatch_share": 1.0},
    ).run()
    assert len(targets) == 7
    assert targets == expected[:7]


def test_the_last_steps_have_one_segment_each(make_trainer: MakeTrainer) -> None:
    targets: list[int] = []
    settings = {**CROSSBATCH, "rows": 1, "crossbatch_rows": 1}
    make_trainer(on_step=lambda step: targets.append(step.num_targets), **settings).run()
    assert max(targets[4:]) <= SEGMENT_LEN < max(targets[:4])


def test_gradients_flow_between_all_segments_of_a_step(make_trainer: MakeTrainer) -> None:
    """Against a plain reading: every segment is exposed to all that follow, in both rows."""
    trainer = make_trainer(rows=2, model={"combine": "joint"})
    model = trainer.model.double()
    model.compute_dtype = torch.float64
    batches = [
        SegmentBatch(
            *torch.randint(1, 31, (2, 2, SEGMENT_LEN), generator=torch.Generator().manual_seed(n)),
            torch.ones(2, SEGMENT_LEN, dtype=torch.bool),
            torch.full((2,), n == 0),
            torch.arange(2),
            torch.full((2,), n * SEGMENT_LEN),
        )
        for n in range(3)
    ]
    rows = Rows(model, 2, 1, range(2))
    nats = rows.read(model, batches, torch.ones(2, dtype=torch.bool), 6 * SEGMENT_LEN, 2)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    rows.commit()
    assert rows.measure_fill()[1] > 0

    model.zero_grad()
    state, live, total = model.init_state(2), [], torch.zeros((), dtype=torch.float64)
    for batch in batches:
        exposed = {}
        if live:
            keys, values = (torch.cat(parts, 2) for parts in zip(*live, strict=True))
            exposed = {1: Exposed(keys, values, torch.ones(keys.shape[::2], dtype=bool), 2)}
        output = model(batch.tokens, state, exposed=exposed)
        live.append((output.live[1].keys, output.live[1].values))
        state = output.state
        total = total + cross_entropy(
            output.logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )
    (total / (6 * SEGMENT_LEN)).backward()
    assert nats == pytest.approx(total.item())
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the loss is in fp32


def test_a_run_with_crossbatch_resumes_bit_for_bit(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    settings = {**CROSSBATCH, "rows": 4, "crossbatch_rows": 1, "accumulation": 2, "steps": 5}
    whole = make_trainer(run_dir=tmp_path / "whole", **settings)
    whole.run()
    make_trainer(
        run_dir=tmp_path / "parts", on_step=raise_after(2, signal.SIGINT), **settings
    ).run()
    second = make_trainer(run_dir=tmp_path / "parts", **settings)
    second.load(tmp_path / "parts" / "checkpoints" / "step-000002")
    second.run()
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_same_training_where_a_row_sees_its_own_segments(
    make_trainer: MakeTrainer, parts: int
) -> None:
    settings = {**CROSSBATCH, "rows": 4, "crossbatch_rows": 1}
    whole, in_parts = make_trainer(**settings), make_trainer(accumulation=parts, **settings)
    expected, found = whole.run(), in_parts.run()
    assert found.tokens == expected.tokens
    assert found.train_nats == pytest.approx(expected.train_nats, rel=1e-6)


@pytest.mark.parametrize(
    ("training", "model", "message"),
    [
        ({"crossbatch_rows": 5, "rows": 8, "accumulation": 2}, {}, "read at once, 4"),
        ({"crossbatch_rows": 2, "rows": 8, "accumulation": 2}, {}, "1 with training.accumulation"),
        ({"crossbatch_rows": 2, "rows": 8, "accumulation": 4}, {}, "1 with training.accumulation"),
        ({"crossbatch_rows": 0}, {}, "crossbatch_rows is 0"),
        ({"crossbatch_segments": -1}, {}, "crossbatch_segments is -1"),
        ({"crossbatch_share": 1.5}, {}, "crossbatch_share is 1.5"),
        ({}, {"capacity": 0}, "0 for a model without memory"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    training: dict[str, object], model: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(
            model=ModelConfig(**{"memory_layers": (1,), "capacity": 8192, **model}),  # type: ignore[arg-type]
            training=TrainingConfig(**{"crossbatch_segments": 1, **training}),  # type: ignore[arg-type]
        )
