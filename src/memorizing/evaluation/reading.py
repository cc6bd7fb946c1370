"""Whole documents read side by side, each with a memory of its own; every token's nats are kept.

With one memory, or with several and with wrong ones.

A start token precedes each document, so that every token of it is counted exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from memorizing.config import Control, check_capacity, check_control
from memorizing.devices import send
from memorizing.errors import ConfigError
from memorizing.evaluation.results import DocumentResult, EvaluationResult
from memorizing.loss import compute_token_nats
from memorizing.model import (
    MemorizingTransformer,
    ModelOutput,
    RetrievalControl,
    evaluation_mode,
)
from memorizing.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from memorizing.data import TokenizedDocument

Progress = Callable[[int, int], None]
"""Called after every segment with the tokens read so far, and those of the whole evaluation."""


def evaluate_documents(
    model: MemorizingTransformer,
    documents: Sequence[TokenizedDocument],
    start_token: int,
    *,
    capacity: int,
    rows: int = 8,
    control: Control | None = None,
    max_tokens: int = 0,
    seed: int = 0,
    on_output: Callable[[ModelOutput], None] | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    spread: bool = False,
) -> EvaluationResult:
    """Read documents from their first token to their last and keep the nats of every token.

    The model is in evaluation mode during the call. A document's nats do not depend on `rows` or on
    the other documents, except under `other_document`.

    Args:
        model: with or without memory layers.
        documents: tokens of each document, without the start token.
        start_token: precedes every document.
        capacity: entries of the memory, whatever it was in training; 0 turns it off.
        rows: documents read side by side; `other_document` takes at least two.
        control: `off` ignores `capacity`; with `other_document` every document reads the memory of
            another one that is read along with it; `shuffled` keeps keys and mixes up values.
        max_tokens: only the first tokens of each document are read; 0 reads them whole.
        seed: of `shuffled`.
        on_output: called with what the model makes of every segment, what it retrieved included.
        progress: see `Progress`.
        ranks: processes that read these documents together; each has the whole result.
        spread: all of them read every document, and each holds a part of every memory
            (`SpreadMemory`); otherwise documents are dealt among them.

    Raises:
        ConfigError: no document; a capacity below the model's neighbors or for a model without
            memory; `other_document` with a single document.
    """
    capacity = 0 if control == "off" else capacity
    check_evaluation(model, documents, capacity, rows, control)
    tokens = [d.tokens[:max_tokens] if max_tokens else d.tokens for d in documents]
    lengths, done = [len(part) for part in tokens], 0
    dealing, holding = (ALONE, ranks) if spread else (ranks, ALONE)
    groups = _make_groups(lengths, rows, control, dealing.size)[dealing.rank :: dealing.size]
    total = sum(lengths[i] for group in groups for i in group)

    def report(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        if progress is not None:
            progress(done, total)

    token_nats: dict[int, NDArray[np.float32]] = {}
    with evaluation_mode(model):
        for group in groups:
            texts = [tokens[i] for i in group]
            nats = _read_group(
                model, texts, start_token, capacity, control, seed, on_output, report, holding
            )
            token_nats |= dict(zip(group, nats, strict=True))
    results = []
    all_nats = dealing.join_arrays(token_nats, lengths)
    for document, nats in zip(documents, all_nats, strict=True):
        num_bytes = document.num_bytes if len(nats) == len(document.tokens) else None
        results.append(DocumentResult(document.name, nats, num_bytes))
    return EvaluationResult(tuple(results), capacity, control)


def evaluate_capacities(
    model: MemorizingTransformer,
    documents: Sequence[TokenizedDocument],
    start_token: int,
    *,
    capacities: Sequence[int],
    controls: Sequence[Control] = (),
    rows: int = 8,
    max_tokens: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    spread: bool = False,
) -> dict[str, EvaluationResult]:
    """Evaluate one model with several memories, and with controls at the largest.

    What must come out the same is read once: capacities that all hold the longest document, and
    `off` beside capacity 0.

    Returns:
        Results by name: the capacities as text, rising, then the controls.

    Raises:
        ConfigError: as `evaluate_documents`; nothing to evaluate.
    """
    plan = check_capacities(model, documents, capacities, controls, rows)
    longest = max(len(document.tokens) for document in documents)
    reachable = count_reachable(min(longest, max_tokens or longest), model)
    # Runs with equal settings give equal results.
    settings: dict[str, tuple[int, Control | None]] = {
        name: (min(capacity, reachable), None if control == "off" else control)
        for name, (capacity, control) in plan.items()
    }
    num_runs = len(set(settings.values()))
    done: dict[tuple[int, Control | None], EvaluationResult] = {}
    for capacity, control in settings.values():
        if (capacity, control) not in done:
            done[capacity, control] = evaluate_documents(
                model,
                documents,
                start_token,
                capacity=capacity,
                control=control,
                rows=rows,
                max_tokens=max_tokens,
                seed=seed,
                progress=None if progress is None else _shift(progress, len(done), num_runs),
                ranks=ranks,
                spread=spread,
            )
    return {
        name: replace(done[settings[name]], capacity=capacity, control=control)
        for name, (capacity, control) in plan.items()
    }


def check_capacities(
    model: MemorizingTransformer,
    documents: Sequence[TokenizedDocument],
    capacities: Sequence[int],
    controls: Sequence[Control],
    rows: int,
) -> dict[str, tuple[int, Control | None]]:
    """Refuse what `evaluate_capacities` cannot evaluate; else capacity and control by name.

    Raises:
        ConfigError: see `evaluate_capacities`.
    """
    if not capacities:
        raise ConfigError("there is no capacity to evaluate; give one or more, such as 0,512,8192")
    plan: dict[str, tuple[int, Control | None]] = {str(c): (c, None) for c in sorted(capacities)}
    for control in controls:
        plan[control] = (0 if control == "off" else max(capacities), control)
    for capacity, control in plan.values():
        check_evaluation(model, documents, capacity, rows, control)
    return plan


def _shift(progress: Progress, num_done: int, num_runs: int) -> Progress:
    """Progress of one run as that of all."""
    return lambda done, total: progress(num_done * total + done, num_runs * total)


def check_evaluation(
    model: MemorizingTransformer,
    documents: Sequence[TokenizedDocument],
    capacity: int,
    rows: int,
    control: Control | None,
) -> None:
    """Refuse what cannot be evaluated.

    Raises:
        ConfigError: see `evaluate_documents`.
    """
    if not any(len(document.tokens) for document in documents):
        raise ConfigError("there are no tokens to evaluate; give documents with text")
    if rows < 1:
        raise ConfigError(f"rows is {rows}; allowed: 1 or more")
    check_capacity(capacity, model.config.num_neighbors)
    if capacity and not model.config.memory_layers:
        raise ConfigError(f"capacity is {capacity}, but the model has no memory layer; use 0")
    check_control(control, capacity, len(documents))


def count_reachable(longest: int, model: MemorizingTransformer) -> int:
    """Slots that a document of `longest` tokens can fill and search; more would stay empty."""
    segment_len = model.config.segment_len
    return max(model.config.num_neighbors, (longest - 1) // segment_len * segment_len)


def _make_groups(
    lengths: list[int], rows: int, control: Control | None, num_ranks: int
) -> list[list[int]]:
    """Documents of like length side by side, longest first: none of them idles for long.

    As many groups as there are ranks, where a document does not read the memory of its neighbor.
    """
    num_groups = -(-len(lengths) // rows)
    if control == "other_document":
        num_groups = min(num_groups, len(lengths) // 2)  # no group of one
    else:
        num_groups = max(num_groups, min(num_ranks, len(lengths)))
    order = np.argsort(-np.array(lengths), kind="stable")
    return [group.tolist() for group in np.array_split(order, num_groups)]


def _read_group(
    model: MemorizingTransformer,
    documents: Sequence[NDArray[np.integer[Any]]],
    start_token: int,
    capacity: int,
    control: Control | None,
    seed: int,
    on_output: Callable[[ModelOutput], None] | None,
    report: Callable[[int], None],
    ranks: Ranks,
) -> list[NDArray[np.float32]]:
    """Read documents that start together to their ends: the nats of each one's tokens.

    Row r reads document r; the donor of its memory is the document after it.
    """
    segment_len, device = model.config.segment_len, model.embedding.weight.device
    lengths = [len(document) for document in documents]
    targets = [document.astype(np.int64) for document in documents]
    inputs = [np.concatenate([[start_token], t])[: len(t)] for t in targets]
    nats = [np.zeros(length, dtype=np.float32) for length in lengths]
    reachable = count_reachable(max(lengths), model)
    if capacity >= reachable:
        # Nothing gives way; the ranks hold equal parts.
        capacity = -(-reachable // ranks.size) * ranks.size
    rows = list(range(len(lengths)))
    donors = [*rows[1:], 0]
    state = model.init_state(len(rows), capacity, device, ranks=ranks)
    for begin in range(0, max(lengths), segment_len):
        # Rows that still read, and finished ones whose memory another row still reads.
        reading = {row for row in rows if lengths[row] > begin}
        if control == "other_document":
            reading |= {donors[row] for row in reading}
        kept = [line for line, row in enumerate(rows) if row in reading]
        if len(kept) < len(rows):
            state, rows = state.select_rows(torch.tensor(kept)), [rows[line] for line in kept]
        counts = [min(max(lengths[row] - begin, 0), segment_len) for row in rows]
        tokens = _fill_rows(inputs, rows, begin, segment_len)
        valid = torch.arange(tokens.shape[1]) < torch.tensor(counts).unsqueeze(1)
        retrieval = None
        if control == "shuffled":
            retrieval = RetrievalControl(None, shuffle_values=True, seed=seed + begin)
        elif control == "other_document":
            # A finished row reads nothing, and its own donor may be gone.
            read = [donors[r] if count else r for r, count in zip(rows, counts, strict=True)]
            retrieval = RetrievalControl(torch.tensor([rows.index(row) for row in read]))
        output = model(
            send(tokens, device),
            state,
            valid=None if valid.all() else valid,
            control=retrieval,
            return_retrievals=on_output is not None,
        )
        if on_output is not None:
            on_output(output)
        state = output.state.commit()
        wanted = send(_fill_rows(targets, rows, begin, segment_len), device)
        found = compute_token_nats(output.logits, wanted).cpu().numpy()
        for line, (row, count) in enumerate(zip(rows, counts, strict=True)):
            nats[row][begin : begin + count] = found[line, :count]
        report(sum(counts))
    return nats


def _fill_rows(
    documents: list[NDArray[np.int64]], rows: list[int], begin: int, segment_len: int
) -> torch.Tensor:
    """The next tokens of each row, as wide as the longest."""
    parts = [torch.from_numpy(documents[row][begin : begin + segment_len]) for row in rows]
    return pad_sequence(parts, batch_first=True)
