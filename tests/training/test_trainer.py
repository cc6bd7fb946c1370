from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memorizing.data import TokenizedDocument
from memorizing.errors import CheckpointError, NonFiniteLossError
from memorizing.training import StepMetrics, Trainer, load_model, read_metrics
from memorizing.training.checkpoint import locate_checkpoint

from .conftest import drop_times, raise_after

MakeTrainer = Callable[..., Trainer]

EVERYTHING = {
    "accumulation": 3,
    "memory_closed_share": 0.4,
    "restart_share": 0.3,
    "weight_decay": 0.1,
    "evaluate_every": 4,
    "evaluate_tokens": 61,
    "log_every": 3,
    "checkpoint_every": 0,
}


@pytest.mark.parametrize(
    ("optimizer", "precision", "stop"),
    [
        ("adamw", "bf16", 3),
        ("adafactor", "fp32", 1),
        ("muon", "fp32", 5),
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(
    make_trainer: MakeTrainer,
    documents: list[TokenizedDocument],
    tmp_path: Path,
    optimizer: str,
    precision: str,
    stop: int,
) -> None:
    settings: dict[str, Any] = {
        "model": {"dropout": 0.2},
        "optimizer": optimizer,
        "precision": precision,
        "validation": documents[:2],
        **EVERYTHING,
    }
    whole = make_trainer(run_dir=tmp_path / "whole", **settings).run()
    assert not whole.interrupted
    stopped = make_trainer(
        run_dir=tmp_path / "parts", on_step=raise_after(stop, signal.SIGINT), **settings
    ).run()
    assert (stopped.interrupted, stopped.steps) == (True, stop)
    torch.manual_seed(97)  # whatever the second process did before
    second = make_trainer(run_dir=tmp_path / "parts", **settings)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.zero_()
    second.load(locate_checkpoint(tmp_path / "parts", stop))
    resumed = second.run()
    assert (resumed.steps, resumed.tokens) == (7, whole.tokens)
    assert resumed.train_nats == whole.train_nats
    assert resumed.validation_nats == whole.validation_nats

    folders = [locate_checkpoint(tmp_path / name, 7) for name in ("whole", "parts")]
    for file in ("model.safetensors", "optimizer.safetensors", "state.safetensors"):
        ours, theirs = (load_file(folder / file) for folder in folders)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
    ours, theirs = (
        drop_times(json.loads((folder / "trainer.json").read_text())) for folder in folders
    )
    for values in (ours, theirs):
        assert values["counters"]["window"].pop("steps") == 0
    assert ours == theirs
    logs = [drop_times(read_metrics(tmp_path / n / "metrics.jsonl")) for n in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [3, 4, 6, 7, 7]


def test_the_run_above_is_interrupted_in_the_middle_of_documents_with_entries_in_memory(
    make_trainer: MakeTrainer, documents: list[TokenizedDocument], tmp_path: Path
) -> None:
    trainer = make_trainer(run_dir=tmp_path, **EVERYTHING)
    trainer.run(until=5)
    left = [
        len(documents[index].tokens) - position
        for index, position in trainer.loader.state_dict()["rows"]
    ]
    assert min(left) > 0
    state = load_file(locate_checkpoint(tmp_path, 5) / "state.safetensors")
    entries = [int(state[f"row.{row}.memories.1.num_appended"]) for row in range(6)]
    assert max(entries) > 23 > min(entries)  # one memory has evicted, one is young


def test_accumulation_gives_the_gradient_of_the_whole_batch(make_trainer: MakeTrainer) -> None:
    trainers = [make_trainer(accumulation=parts) for parts in (1, 2, 3, 6)]
    results = [trainer.run(until=4) for trainer in trainers]
    assert len({result.tokens for result in results}) == 1
    for trainer, result in zip(trainers[1:], results[1:], strict=True):
        assert result.train_nats == pytest.approx(results[0].train_nats, rel=1e-6)
        for ours, theirs in zip(
            trainer.model.parameters(), trainers[0].model.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_counts_every_target_token_once(
    make_trainer: MakeTrainer, documents: list[TokenizedDocument]
) -> None:
    seen: list[StepMetrics] = []
    trainer = make_trainer(on_step=seen.append, steps=5)
    result = trainer.run()
    assert [metrics.step for metrics in seen] == [1, 2, 3, 4, 5]
    assert result.tokens == sum(metrics.num_targets for metrics in seen)
    nats = sum(metrics.nats for metrics in seen)
    assert result.train_nats == pytest.approx(nats / result.tokens, rel=1e-12)


def test_a_rate_far_too_high_stops_before_the_model_is_broken(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(
        run_dir=tmp_path, steps=50, learning_rate=1e30, clip_norm=0.0, checkpoint_every=1
    )
    with pytest.raises(NonFiniteLossError, match=r"training\.learning_rate"):
        trainer.run()
    assert all(bool(torch.isfinite(p).all()) for p in load_model(tmp_path).model.parameters())


def test_a_second_interrupt_is_not_held_back(make_trainer: MakeTrainer) -> None:
    def twice(metrics: StepMetrics) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # A shell's background jobs start with the interrupt ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_trainer(on_step=twice).run()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_closed_memory_is_still_written_and_changes_nothing(make_trainer: MakeTrainer) -> None:
    closed = make_trainer(memory_start_step=7)
    without = make_trainer(model={"capacity": 0})
    closed.run()
    without.run()
    fills = closed._rows.measure_fill()
    assert fills[1] > 0.3
    theirs = dict(without.model.named_parameters())
    for name, ours in closed.model.named_parameters():
        assert torch.equal(ours, theirs[name]), name


def test_a_memory_that_opens_changes_the_next_step(make_trainer: MakeTrainer) -> None:
    closed, opened = make_trainer(memory_start_step=7), make_trainer(memory_start_step=4)
    nats: list[list[float]] = [[], []]
    for trainer, seen in zip((closed, opened), nats, strict=True):
        trainer._on_step = lambda metrics, seen=seen: seen.append(metrics.nats)
        trainer.run()
    # Steps 1 to 4 are the cache-only phase; the model reads its memory from step 5 on.
    assert nats[0][:4] == nats[1][:4]
    assert nats[0][4] != nats[1][4]


def test_the_share_of_closed_rows_is_drawn_per_row(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(memory_closed_share=0.3, seed=3)
    draws = torch.stack([trainer._draw_open_rows() for _ in range(500)])
    assert draws.double().mean().item() == pytest.approx(0.7, abs=0.03)
    assert 0 < sum(len(set(row)) == 2 for row in draws.tolist()) < 500


def test_rows_restart_by_a_share_of_their_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(restart_share=0.3, seed=3)
    draws = torch.stack([trainer._draw_restarts() for _ in range(500)])
    assert draws.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert 0 < sum(len(set(row)) == 2 for row in draws.tolist()) < 500
    assert make_trainer()._draw_restarts() is None
    assert make_trainer(restart_share=0.3, model={"capacity": 0})._draw_restarts() is None


def test_rows_that_always_restart_train_as_without_memory_and_cache(
    make_trainer: MakeTrainer,
) -> None:
    restarting = make_trainer(restart_share=1.0, model={"smear_keys": False})
    bare = make_trainer(model={"smear_keys": False, "capacity": 0, "xl_cache": False})
    restarting.run()
    bare.run()
    assert restarting._rows.measure_fill()[1] > 0.3
    theirs = dict(bare.model.named_parameters())
    for name, ours in restarting.model.named_parameters():
        torch.testing.assert_close(ours, theirs[name])


def test_the_models_compute_dtype_follows_the_precision(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(precision="bf16")
    assert trainer.model.compute_dtype == torch.bfloat16
    assert trainer.run(until=1).train_nats == pytest.approx(3.5, abs=1.0)


def test_gradient_checkpointing_changes_no_weight(make_trainer: MakeTrainer) -> None:
    plain, saving = make_trainer(), make_trainer(gradient_checkpointing=True)
    for trainer in (plain, saving):
        trainer.run(until=4)
    for ours, theirs in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_precision_is_refused(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(run_dir=tmp_path).run(until=1)
    with pytest.raises(CheckpointError, match=r"training\.precision = 'fp32'"):
        make_trainer(precision="bf16").load(locate_checkpoint(tmp_path, 1))


def test_training_ends_with_documents_that_are_read_once(
    make_trainer: MakeTrainer, documents: list[TokenizedDocument]
) -> None:
    trainer = make_trainer(steps=100)
    trainer.loader.repeat = False
    once = make_trainer(steps=100).loader
    once.repeat = False
    result = trainer.run()
    assert result.tokens == sum(len(document.tokens) for document in documents)
    assert result.steps == len(list(once))
    assert not result.interrupted
