"""Answers to the questions of synthetic tasks, out of a memory or not.

Every token of an answer is predicted after the right ones before it. A whole answer is right so if
and only if greedy decoding would have written it: up to its first wrong token the two read the
same.

Shapes: D documents, Q questions of a document, A answer tokens of a question.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memorizing.config import Control
from memorizing.devices import send
from memorizing.evaluation.lanes import read_in_lanes
from memorizing.loss import compute_token_nats
from memorizing.model import MemorizingTransformer, ModelState, RetrievalControl

if TYPE_CHECKING:
    from memorizing.data.synthetic.batch import QuestionBatch


@dataclass(frozen=True)
class Answers:
    """What a model answered in D documents."""

    is_right: Tensor
    """(D, Q, A) bool: the likeliest token is the right one."""
    nats: Tensor
    """(D, Q, A) fp32."""
    own_share: Tensor | None
    """(D, Q, A) fp32: share of the attention to retrieved entries that falls on entries of the own
    document, mean over heads and memory layers; None without a memory."""


def read_blocks(
    model: MemorizingTransformer, blocks: Iterable[QuestionBatch], state: ModelState
) -> ModelState:
    """The state after reading whole segments, without gradient: in memory, if the state has one.

    Entries of the first memory layer do not depend on what is retrieved, so that a model with one
    reads with its memory closed: the same, but faster.
    """
    is_open = len(model.config.memory_layers) > 1
    device = model.embedding.weight.device
    with torch.no_grad():
        for block in blocks:
            state = model(send(block.tokens, device), state, memory_open=is_open).state.commit()
    return state


def split_questions(
    batch: QuestionBatch, segment_len: int
) -> tuple[list[QuestionBatch], QuestionBatch]:
    """The blocks of documents by segment, and their last segment, which holds all questions.

    Raises:
        ValueError: questions do not fit the last segment.
    """
    *blocks, questions = batch.iterate_segments(segment_len)
    if any(bool(block.valid.any()) for block in blocks):
        raise ValueError(
            f"the questions of documents of {batch.tokens.shape[1]} tokens do not fit the last of "
            f"their segments of {segment_len}; ask fewer questions, or give blocks of segment_len"
        )
    return blocks, questions


@dataclass(frozen=True)
class ReadDocuments:
    """Documents whose blocks are read, and whose questions can be asked."""

    questions: QuestionBatch
    """The last segment of every document."""
    state: ModelState
    """What was read; asking leaves it as it is."""
    num_distracting: int
    """Tokens of other documents in the memory of each row, written before its own."""


@torch.no_grad()
def read_documents(
    model: MemorizingTransformer,
    batch: QuestionBatch,
    *,
    others: Sequence[QuestionBatch] = (),
    has_memory: bool = True,
) -> ReadDocuments:
    """Read documents, but for their questions, into an empty memory that holds all of them.

    Args:
        model: without a memory it reads no more than the questions can reach.
        batch: documents; each is read in a row of its own.
        others: documents of as many rows whose blocks are in the memory too, written before.
        has_memory: False leaves out the memory of a model that has one.

    Raises:
        ValueError: questions that do not fit the last segment.
    """
    shape = model.config
    blocks, questions = split_questions(batch, shape.segment_len)
    num_rows = batch.tokens.shape[0]
    has_memory = has_memory and shape.has_memory
    distracting = [b for other in others for b in split_questions(other, shape.segment_len)[0]]
    if not has_memory and not shape.xl_cache:
        blocks, distracting = blocks[-1:], []
    read = [*distracting, *blocks]
    num_read = len(read) * shape.segment_len
    state = model.init_state(num_rows, max(num_read, shape.num_neighbors) if has_memory else 0)
    # Questions that fill a whole document leave nothing to read.
    tokens = torch.cat([batch.tokens[:, :0], *(b.tokens for b in read)], 1)
    state, num_done = read_in_lanes(model, tokens, state)
    state = read_blocks(model, read[num_done // shape.segment_len :], state)
    return ReadDocuments(questions, state, len(distracting) * shape.segment_len)


@torch.no_grad()
def ask_questions(
    model: MemorizingTransformer, read: ReadDocuments, control: Control | None = None
) -> Answers:
    """Answer the questions of documents that are read.

    Args:
        model: the one that read them, or one that would have written the same entries.
        read: of `read_documents`.
        control: retrieval that is wrong on purpose; `off` is documents read without a memory.
    """
    questions = read.questions
    num_rows = len(questions.tokens)
    retrieval = {
        "other_document": RetrievalControl(donor_rows=torch.arange(num_rows).roll(-1)),
        "shuffled": RetrievalControl(shuffle_values=True),
    }.get(control or "")
    device = model.embedding.weight.device
    targets = send(questions.targets, device)
    output = model(
        send(questions.tokens, device),
        read.state,
        control=retrieval,
        return_retrievals=bool(read.state.memories),
    )
    by_question = (*questions.is_first.shape, -1)

    def pick(values: Tensor) -> Tensor:
        return values.cpu()[questions.valid].view(by_question)

    own = None
    if output.retrievals:
        shares = [
            (r.weights * (r.valid & (r.positions >= read.num_distracting))).sum(-1).mean(1).float()
            for r in output.retrievals.values()
        ]
        own = pick(torch.stack(shares).mean(0))
    return Answers(
        pick(output.logits.argmax(-1) == targets),
        pick(compute_token_nats(output.logits, targets)),
        own,
    )


def answer_questions(
    model: MemorizingTransformer,
    batch: QuestionBatch,
    *,
    control: Control | None = None,
    others: Sequence[QuestionBatch] = (),
) -> Answers:
    """`read_documents`, then `ask_questions`."""
    read = read_documents(model, batch, others=others, has_memory=control != "off")
    return ask_questions(model, read, control)


def compute_wilson_interval(num_right: int, num_asked: int) -> tuple[float, float]:
    """The 95% interval of a share that was seen as num_right of num_asked (Wilson 1927).

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96.

    Raises:
        ValueError: nothing was asked, or more were right than asked.
    """
    if not 0 <= num_right <= num_asked or num_asked < 1:
        raise ValueError(f"{num_right} right of {num_asked}; ask 1 or more, right are 0 to all")
    z, n, p = 1.959964, num_asked, num_right / num_asked
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    # Where none or all were right, a bound is exactly 0 or 1; rounding must not pass it.
    return max(0.0, low), min(1.0, high)
