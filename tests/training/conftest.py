"""Tiny models and documents. Sizes are distinct primes, so that a mixed-up dimension shows."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memorizing.config import Config, DataConfig, ModelConfig, TokenizerConfig, TrainingConfig
from memorizing.data import SegmentLoader, TokenizedDocument
from memorizing.model import MemorizingTransformer
from memorizing.training import StepMetrics, Trainer

LENGTHS = (67, 17, 29, 73, 5, 41, 53, 61, 3)
SEGMENT_LEN = 11
TIMES = {"seconds", "tokens_per_s"}


def raise_after(step: int, number: int) -> Callable[[StepMetrics], None]:
    """What sends the process a signal after a step."""

    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == step:
            signal.raise_signal(number)

    return on_step


def drop_times(value: Any) -> Any:
    """Values of JSON without what another run cannot repeat."""
    if isinstance(value, dict):
        return {key: drop_times(part) for key, part in value.items() if key not in TIMES}
    return [drop_times(part) for part in value] if isinstance(value, list) else value


@pytest.fixture
def model_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=31,
        num_layers=3,
        model_dim=13,
        num_heads=2,
        head_dim=7,
        ffn_dim=37,
        segment_len=SEGMENT_LEN,
        window=SEGMENT_LEN,
        memory_layers=(1,),
        capacity=23,
        num_neighbors=5,
        smear_keys=True,
        pointer=True,
    )


@pytest.fixture
def training_config() -> TrainingConfig:
    return TrainingConfig(
        steps=7, rows=6, warmup_steps=3, learning_rate=3e-3, log_every=2, precision="fp32"
    )


@pytest.fixture
def documents() -> list[TokenizedDocument]:
    rng = np.random.default_rng(0)
    return [
        TokenizedDocument(f"document {i}", rng.integers(1, 31, n).astype(np.int32), 2 * n)
        for i, n in enumerate(LENGTHS)
    ]


@pytest.fixture
def config(tmp_path: Path, model_config: ModelConfig) -> Config:
    """A run over texts of its own folder."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(43)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(7):
        text = " ".join(rng.choice(words) for _ in range(60 + 31 * index))
        (folder / f"text{index}.txt").write_text(text)
    return Config(
        name="tiny",
        model=replace(model_config, vocab_size=307),
        tokenizer=TokenizerConfig(vocab_size=307),
        data=DataConfig(corpus=f"files:{folder}", validation=("text3*",)),
        training=TrainingConfig(
            steps=6, rows=4, accumulation=2, evaluate_every=3, evaluate_tokens=101,
            log_every=1, checkpoint_every=2, precision="fp32", memory_closed_share=0.3,
        ),
    )  # fmt: skip


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(
    model_config: ModelConfig,
    training_config: TrainingConfig,
    documents: list[TokenizedDocument],
) -> MakeTrainer:
    """A trainer of a fresh model; keywords change the settings, `run_dir` etc. go to it."""

    def make(
        *,
        model: dict[str, Any] | None = None,
        run_dir: Path | None = None,
        on_step: Any = None,
        on_begin: Any = None,
        validation: Any = (),
        **training: Any,
    ) -> Trainer:
        config = replace(training_config, **training)
        torch.manual_seed(config.seed)
        network = MemorizingTransformer(replace(model_config, **(model or {})))
        loader = SegmentLoader(
            documents, config.rows, SEGMENT_LEN, start_token=0, seed=config.seed, repeat=True
        )
        return Trainer(
            network,
            loader,
            config,
            run_dir=run_dir,
            on_step=on_step,
            on_begin=on_begin,
            validation=validation,
        )

    return make
