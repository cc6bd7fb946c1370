"""The model of the synthetic tasks and how it is trained: one place for all their scripts."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from device_option import add_device_option

from memorizing.config import ModelConfig, TrainingConfig
from memorizing.data.synthetic.batch import BLOCK_LEN, VOCAB_SIZE, QuestionBatch
from memorizing.model import MemorizingTransformer
from memorizing.training.questions import QuestionStep, build_gathering_model, train_on_questions

SHARPNESS = 3.0
"""Far beyond the lengths of training, the memory's scale is multiplied by this. The scale is what
tells one right entry from a million that are a little alike; training on short documents needs, and
learns, a small one, and keys that are trained with a large one come out worse (`docs/log.md`)."""


@dataclass(frozen=True)
class SmallModel:
    """A model of two layers, and its training; 271K weights as it stands here."""

    steps: int = 400
    rows: int = 8
    model_dim: int = 128
    head_dim: int = 32
    conv_len: int = 6
    """Queries and keys compare the last tokens one by one: what is like a key of several tokens is
    found before anything is learned."""
    scale_init: float = 8.0
    gate_learning_rate: float = 0.05
    """Of gates and scales."""
    vocab_size: int = VOCAB_SIZE

    def to_model(self, capacity: int, block_len: int = BLOCK_LEN) -> ModelConfig:
        """Two layers: one to gather the tokens of a key, and one that finds the like of it.

        The local context is one block, so that what stands before is in the memory or nowhere.
        """
        return ModelConfig(
            vocab_size=self.vocab_size,
            num_layers=2,
            model_dim=self.model_dim,
            num_heads=4,
            head_dim=self.head_dim,
            ffn_dim=2 * self.model_dim,
            segment_len=block_len,
            window=block_len,
            xl_cache=False,
            memory_layers=(1,),
            capacity=capacity,
            num_neighbors=32,
            conv_len=self.conv_len,
            induction_init=True,
            scale_init=self.scale_init,
            gate_bias_init=1.0,
        )

    def to_training(self, seed: int) -> TrainingConfig:
        """Muon for the matrices; rates that learned fastest in 100 to 150 steps."""
        return TrainingConfig(
            steps=self.steps,
            rows=self.rows,
            seed=seed,
            optimizer="muon",
            learning_rate=0.02,
            vector_learning_rate=0.01,
            gate_learning_rate=self.gate_learning_rate,
            schedule="linear",
            warmup_steps=20,
            final_share=0.2,
            checkpoint_every=100,
        )

    def train(
        self,
        make_batch: Callable[[int, Sequence[int]], QuestionBatch],
        seed: int,
        *,
        num_blocks: int,
        block_len: int = BLOCK_LEN,
        keeps_documents: bool = False,
        folder: Path | None = None,
        num_reports: int = 0,
        device: torch.device | str = "cpu",
    ) -> MemorizingTransformer:
        """Train a model, or go on, or take the one that is kept in the folder.

        Args:
            make_batch: of a step and seeds, one document per seed.
            seed: of weights and documents; whatever the memory, the same for the same seed.
            num_blocks: that the memory holds; 0 is no memory.
            block_len: tokens of a block.
            keeps_documents: as `train_on_questions`.
            folder: None keeps nothing.
            num_reports: how many lines are printed.
            device: where it is trained; it starts with the same weights on any.
        """

        def report(step: QuestionStep) -> None:
            every = max(1, self.steps // max(1, num_reports))
            if num_reports and (step.step == 10 or step.step % every == 0):
                left = step.seconds / step.num_taken * (self.steps - step.step)
                print(
                    f"  step {step.step}: {step.nats:.3f} nats, whole answers {step.whole:.1%}, "
                    f"{step.seconds:.0f} s, about {left / 60:.0f} min left",
                    flush=True,
                )

        model = build_gathering_model(self.to_model(num_blocks * block_len, block_len), seed)
        model.to(device)
        train_on_questions(
            model,
            self.to_training(seed),
            make_batch,
            keeps_documents=keeps_documents,
            folder=folder,
            on_step=report,
        )
        return model


def sharpen(model: MemorizingTransformer, factor: float) -> MemorizingTransformer:
    """A copy of the model whose memory layers compare `factor` times as sharply.

    It writes the same entries: scales are of queries only.
    """
    copy = MemorizingTransformer(model.config).to(model.embedding.weight.device)
    weights = dict(model.state_dict())
    for layer in model.config.memory_layers:
        name = f"blocks.{layer}.attention.scale"
        weights[name] = weights[name] * factor
    copy.load_state_dict(weights)
    return copy


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """`--device`, which becomes a torch device, and `--jobs`. In place."""
    add_device_option(parser)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")


def list_machines(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machines that results name, each once."""
    machines = [result["machine"] for result in results]
    return [machine for i, machine in enumerate(machines) if machine not in machines[:i]]


def run_side_by_side(
    function: Callable[..., None], calls: Sequence[tuple[Any, ...]], jobs: int
) -> None:
    """Call a function of a module with each of the arguments; with several jobs, in processes.

    Small models leave most of a GPU idle: what takes their time is one core that starts its work.
    All calls are made, also where one fails; the first error is raised then.
    """
    if jobs == 1:
        for arguments in calls:
            function(*arguments)
        return
    with ProcessPoolExecutor(
        min(jobs, len(calls)),
        mp_context=multiprocessing.get_context("spawn"),  # CUDA cannot be forked
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
    for future in futures:
        future.result()
