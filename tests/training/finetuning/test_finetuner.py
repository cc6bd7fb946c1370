from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.data import SegmentLoader
from memorizing.errors import (
    ConfigError,
)
from memorizing.huggingface.attaching.attachment import add_memory
from memorizing.huggingface.sessions.opening import open_memory
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.finetuner import Finetuner
from memorizing.training.optimizer import compute_schedule
from tests.huggingface.tools import CACHE
from tests.training.finetuning.tools import (
    MEMORY,
    PASSAGES,
    SEGMENT_LEN,
    START,
    list_weights,
    make_base,
    make_documents,
    make_gpt2,
    make_model,
)

BOTH = {**PASSAGES, "read": "both"}
DOCUMENTS = make_documents(3 * SEGMENT_LEN, 47, 5 * SEGMENT_LEN + 1, 2)


def make_settings(**changes: Any) -> FinetuneSettings:
    values = {
        "steps": 7, "rows": 2, "lora_rank": 3, "evaluate_every": 0, "warmup_steps": 2,
        "gate_learning_rate": 0.1, "log_every": 1, "checkpoint_every": 3, **changes,
    }  # fmt: skip
    return FinetuneSettings(**values)


def make_tuner(model: Any, *, run_dir: Path | None = None, **changes: Any) -> Finetuner:
    return Finetuner(model, DOCUMENTS, START, make_settings(**changes), run_dir=run_dir)


def test_the_loss_of_one_row_is_that_of_a_loop_by_hand():
    settings = make_settings(train="all", rows=1, steps=13, weight_decay=0.0, clip_norm=0.0)
    tuned, losses = make_model(), []
    Finetuner(
        tuned, DOCUMENTS, START, settings, on_step=lambda m: losses.append(m.nats / m.num_targets)
    ).run()

    model = make_model()
    config = settings.make_training_config()
    gates = [p for name, p in model.named_parameters() if ".memory." in name]
    others = [p for name, p in model.named_parameters() if ".memory." not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "peak": config.learning_rate},
            {"params": gates, "peak": config.gate_learning_rate},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    loader = SegmentLoader(DOCUMENTS, 1, SEGMENT_LEN, START, settings.seed, repeat=True)
    expected: list[float] = []
    with open_memory(model) as memory:
        for step, batch in zip(range(1, 14), loader, strict=False):
            if bool(batch.doc_start[0]):
                cache = memory.new_cache()
            length = int(batch.valid.sum())
            logits = model(input_ids=batch.tokens[:, :length], **{CACHE: cache}).logits
            loss = torch.nn.functional.cross_entropy(logits[0], batch.targets[0, :length])
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * compute_schedule(config, step)
            optimizer.step()
            memory.commit(cache)
            expected.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert losses[-1] != losses[0]


def test_rows_do_not_change_what_a_document_costs():
    documents = make_documents(3 * SEGMENT_LEN, 3 * SEGMENT_LEN, seed=3)
    together: list[float] = []
    settings = make_settings(rows=2, steps=3, learning_rate=1e-12, gate_learning_rate=0.0)
    Finetuner(
        make_model(), documents, START, settings, on_step=lambda m: together.append(m.nats)
    ).run()
    alone = []
    for document in documents:
        nats: list[float] = []
        one = make_settings(rows=1, steps=3, learning_rate=1e-12, gate_learning_rate=0.0)
        Finetuner(
            make_model(), [document], START, one, on_step=lambda m, nats=nats: nats.append(m.nats)
        ).run()
        alone.append(nats)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone).sum(0))


@pytest.mark.parametrize("make", [make_base, make_gpt2])
@pytest.mark.parametrize("train", ["gates", "lora", "all"])
def test_what_is_trained_moves_and_nothing_else(train: str, make: Any):
    model = add_memory(make(), **MEMORY)
    before = list_weights(model)
    make_tuner(model, train=train).run()
    after = list_weights(model)
    moved = {n for n, p in before.items() if not torch.equal(p, _find(after, n))}
    gates = {name for name in before if ".memory." in name}
    assert gates <= moved
    if train == "all":
        assert moved == set(before)
    else:
        assert moved == gates
    lora = {name: p for name, p in after.items() if "lora_B" in name}
    assert bool(lora) == (train == "lora")
    assert all(bool(p.any()) for p in lora.values())


def _find(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """peft renames a weight that it adapts."""
    owner, _, last = name.rpartition(".")
    return weights[name] if name in weights else weights[f"{owner}.base_layer.{last}"]


@pytest.mark.parametrize(
    ("train", "memory"),
    [("gates", {}), ("lora", {}), ("all", {}), ("lora", PASSAGES), ("lora", BOTH)],
)
def test_gradient_checkpointing_changes_nothing(train: str, memory: dict[str, Any]):
    found: list[list[tuple[float, float]]] = []
    for is_on in (False, True):
        model, steps = make_model(**memory), []
        if is_on:
            turn_on = getattr(model, "activation_checkpointing_enable", None)
            (turn_on or model.gradient_checkpointing_enable)()
        Finetuner(
            model,
            DOCUMENTS,
            START,
            make_settings(train=train),
            on_step=lambda m, steps=steps: steps.append((m.nats, m.grad_norm)),
        ).run()
        found.append(steps)
    assert found[0] == found[1]


def test_lora_can_begin_with_the_memory_layer():
    model = make_model()
    make_tuner(model, lora_layers="from_memory", steps=1).run()
    layers = {name.split(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert layers == {"1", "2"}


def test_without_capacity_the_memory_does_nothing():
    losses: dict[bool, list[float]] = {}
    for is_open in (True, False):
        found: list[float] = []
        model = make_model(capacity=0) if is_open else make_model()
        tuner = Finetuner(
            model,
            DOCUMENTS,
            START,
            make_settings(train="lora"),
            on_step=lambda m, found=found: found.append(m.nats),
        )
        with tuner.attachment.change_mode(is_reading=is_open):
            tuner.run()
        losses[is_open] = found
    assert losses[True] == losses[False]
    with pytest.raises(ConfigError, match="capacity is 0"):
        make_tuner(make_model(capacity=0), train="gates")


@pytest.mark.parametrize(
    ("train", "dtype", "memory"),
    [
        ("gates", torch.float32, {}),
        ("lora", torch.bfloat16, {}),
        ("all", torch.bfloat16, {}),
        ("lora", torch.float32, PASSAGES),
        ("lora", torch.float32, BOTH),
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_whole_one(
    tmp_path: Path, train: str, dtype: torch.dtype, memory: dict[str, Any]
):
    def make() -> Any:
        return add_memory(make_base().to(dtype), **{**MEMORY, **memory})

    whole, losses = make(), []
    Finetuner(
        whole, DOCUMENTS, START, make_settings(train=train), on_step=lambda m: losses.append(m.nats)
    ).run()
    first = make_tuner(make(), train=train, run_dir=tmp_path)
    tmp_path.mkdir(exist_ok=True)
    first.run(until=4)
    resumed: list[float] = []
    model = make()
    second = Finetuner(
        model,
        DOCUMENTS,
        START,
        make_settings(train=train),
        run_dir=tmp_path,
        on_step=lambda m: resumed.append(m.nats),
    )
    second.load(tmp_path / "checkpoints" / "step-000004")
    second.run()
    assert resumed == losses[4:]
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
