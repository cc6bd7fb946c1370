"""A call of any length over rows with any padding, split where the memory's clock wants it.

Shapes: B rows, T columns of the call, K columns whose logits are kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memorizing.model import MemorizingTransformer, ModelState


@dataclass(frozen=True)
class _Step:
    """What the rows read at once: each from its next token up to the end of its segment.

    Rows are aligned on the left whatever the padding of the call was, so that all of them reach
    the ends of their segments in as few steps as the longest takes.
    """

    columns: Tensor
    """(B, W) int64 on the CPU: the column of the call that each token comes from."""
    inside: Tensor
    """(B, W) bool on the CPU: False where a row has no more."""


def read_columns(
    model: MemorizingTransformer,
    tokens: Tensor,
    valid: Tensor,
    state: ModelState,
    is_kept: Tensor,
) -> tuple[Tensor, ModelState]:
    """Read tokens that follow what the state has read, however many.

    What is due is committed before a segment begins, so that the entries of the call's last segment
    wait: with gradient, `backward` comes before the next call. Where the call itself goes on to
    another segment with gradient, it writes to a copy of the memories, because the backward pass
    reads those of the segment before once more.

    Args:
        model: its `compute_dtype` must be that of the state.
        tokens: (B, T) int64.
        valid: (B, T) bool on the CPU: what is False is skipped, wherever it stands.
        state: the history of these rows; void afterwards, where a memory was written.
        is_kept: (T,) bool on the CPU: columns whose logits are wanted.

    Returns:
        Logits (B, K, V), 0 where not valid, and the history after the call.
    """
    is_whole = bool(valid.all())
    in_graph = False
    kept: list[Tensor] = []
    places: list[tuple[Tensor, Tensor]] = []
    for step in _plan(state.position, valid, state.segment_len):
        state = _commit(state, copy=in_graph)
        columns = step.columns.to(tokens.device)
        inside = None if bool(step.inside.all()) else step.inside
        output = model(tokens.gather(1, columns), state, valid=inside)
        state = output.state
        in_graph = torch.is_grad_enabled()
        wanted = step.inside & is_kept[step.columns]
        is_whole = is_whole and inside is None
        if not bool(wanted.any()):
            continue
        if is_whole:  # Then all rows read the same columns.
            kept.append(output.logits if bool(wanted.all()) else output.logits[:, wanted[0]])
        else:
            kept.append(output.logits[wanted])
        places.append((wanted.nonzero()[:, 0], step.columns[wanted]))
    if is_whole and kept:
        return (kept[0] if len(kept) == 1 else torch.cat(kept, 1)), state
    shape = (tokens.shape[0], int(is_kept.sum()), model.config.vocab_size)
    logits = torch.zeros(shape, dtype=model.compute_dtype, device=tokens.device)
    if kept:
        rows, columns = (torch.cat(part) for part in zip(*places, strict=True))
        kept = [part.flatten(0, -2) for part in kept]
        column_of_kept = is_kept.cumsum(0) - 1
        logits[rows, column_of_kept[columns]] = torch.cat(kept)
    return logits, state


def _plan(position: Tensor, valid: Tensor, segment_len: int) -> Iterator[_Step]:
    num_valid = valid.sum(1)
    # The columns of a row's tokens, in order, then those of its padding.
    order = (~valid).to(torch.int8).sort(dim=1, stable=True).indices
    done = torch.zeros_like(num_valid)
    while bool((done < num_valid).any()):
        room = segment_len - (position + done) % segment_len
        take = torch.minimum(room, num_valid - done)
        offsets = torch.arange(int(take.max()))
        columns = (done.unsqueeze(1) + offsets).clamp(max=valid.shape[1] - 1)
        yield _Step(order.gather(1, columns), offsets < take.unsqueeze(1))
        done = done + take


def _commit(state: ModelState, copy: bool) -> ModelState:
    """Write what is due; to copies of the memories, where the old ones are still needed."""
    at_boundary = (state.position % state.segment_len == 0) & (state.count_pending() > 0)
    if not bool(at_boundary.any()):
        return state
    if copy:
        rows = torch.arange(state.num_rows)
        copies = {layer: memory.select_rows(rows) for layer, memory in state.memories.items()}
        state = replace(state, memories=copies)
    return state.commit()
