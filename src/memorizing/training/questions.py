"""Training on documents with questions, where nothing but the answers counts in the loss.

`Trainer` learns every token of every document. Here blocks are read into the memory without
gradient, and only the last segment, the questions, is learned from.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memorizing.config import ModelConfig, TrainingConfig
from memorizing.data.synthetic.batch import QuestionBatch
from memorizing.devices import send
from memorizing.evaluation.answers import read_blocks, split_questions
from memorizing.loss import sum_nats
from memorizing.model import MemorizingTransformer
from memorizing.model.block import Block
from memorizing.training.checkpoint import (
    TrainingState,
    load_training_state,
    load_weights,
    save_model,
)
from memorizing.training.optimizer import Optimizer, group_parameters

FIRST_TRAINING_SEED = 1_000_000_000
"""Documents with lower seeds are for evaluation."""


@dataclass(frozen=True)
class QuestionStep:
    """What one step of `train_on_questions` gave."""

    step: int
    num_taken: int
    """Steps since training began, or went on."""
    nats: float
    """Mean over answer tokens."""
    whole: float
    """Share of first questions whose whole answer is right."""
    seconds: float
    """Time of these steps."""


def build_gathering_model(config: ModelConfig, seed: int) -> MemorizingTransformer:
    """A model whose first layer starts by looking at the tokens just before.

    Head h of layer 0 starts with a position bias of -2^-h per token of distance (Press et al. 2022,
    ALiBi): the tokens of a key are gathered from nearby, and without this start it is most of what
    has to be learned. With a memory or without it, the same seed gives the same weights.
    """
    torch.manual_seed(seed)
    model = MemorizingTransformer(config)
    gathering = model.blocks[0]
    assert isinstance(gathering, Block)
    with torch.no_grad():
        for head, biases in enumerate(gathering.attention.position_bias.table):
            biases.copy_(-(2.0**-head) * torch.arange(len(biases)))
    return model


def train_on_questions(
    model: MemorizingTransformer,
    config: TrainingConfig,
    make_batch: Callable[[int, Sequence[int]], QuestionBatch],
    *,
    keeps_documents: bool = False,
    folder: Path | None = None,
    on_step: Callable[[QuestionStep], None] | None = None,
) -> None:
    """Train a model in place, on documents that it sees once each.

    Models with and without memory see the same documents with the same `config.seed`. What is saved
    is the same whether or not training was interrupted, bit for bit.

    Args:
        model: its memory has the capacity of its configuration.
        config: steps, rows and rates; `checkpoint_every`.
        make_batch: of a step, counted from 1, and seeds: one document per seed.
        keeps_documents: after a sixth of the steps the memory is not emptied any more: it holds the
            last documents beside the own one, as distractors, up to its capacity.
        folder: for `checkpoint`, while training, and `model`, when it is done. Where these are,
            training goes on from there. None saves nothing.
        on_step: called after every step.

    Raises:
        CheckpointError: what is saved is of another model, or was altered.
    """
    if folder is not None and (folder / "model").exists():
        load_weights(folder / "model", model)
        return
    groups = group_parameters(model, [model.embedding.weight], model.memory_parameters())
    optimizer = Optimizer(groups, config)
    state = model.init_state(config.rows)
    first_step = 1
    if folder is not None and (folder / "checkpoint").exists():
        saved = load_training_state(folder / "checkpoint")
        load_weights(folder / "checkpoint", model)
        optimizer.load_state_dict(saved.optimizer, saved.trainer["optimizer"])
        state = state.load_state_dict(saved.state)
        first_step = saved.trainer["step"] + 1
    device = model.embedding.weight.device
    every_row = torch.ones(config.rows, dtype=torch.bool)
    start_s = time.perf_counter()
    for step in range(first_step, config.steps + 1):
        first_seed = FIRST_TRAINING_SEED * (config.seed + 1) + step * config.rows
        batch = make_batch(step, range(first_seed, first_seed + config.rows))
        blocks, questions = split_questions(batch, model.config.segment_len)
        if not keeps_documents or step <= config.steps // 6:
            state = state.start_documents(every_row)
        state = read_blocks(model, blocks, state)
        # Of the questions nothing is kept: their state is dropped, uncommitted.
        tokens, targets, valid = (
            send(part, device) for part in (questions.tokens, questions.targets, questions.valid)
        )
        logits = model(tokens, state).logits
        loss = sum_nats(logits, targets, valid) / questions.valid.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.set_step(step)
        optimizer.step()
        optimizer.zero_grad()
        if on_step is not None:
            right = (logits.argmax(-1) == targets).cpu()[questions.valid]
            whole = right.view(*questions.is_first.shape, -1).all(-1)[questions.is_first]
            seconds = time.perf_counter() - start_s
            share = whole.float().mean().item()
            on_step(QuestionStep(step, step - first_step + 1, loss.item(), share, seconds))
        if folder is not None and config.checkpoint_every and step % config.checkpoint_every == 0:
            tensors, numbers = optimizer.state_dict()
            trainer = {"step": step, "optimizer": numbers}
            training = TrainingState(tensors, state.state_dict(), trainer)
            save_model(folder / "checkpoint", model, None, training)
    if folder is not None:
        save_model(folder / "model", model, None)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
