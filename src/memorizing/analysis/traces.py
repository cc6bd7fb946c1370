"""What the memory layers retrieved for single tokens of a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from memorizing.config import check_capacity
from memorizing.errors import ConfigError
from memorizing.model import MemorizingTransformer, Retrieval, evaluation_mode

if TYPE_CHECKING:
    from memorizing.data import TokenizedDocument


@dataclass(frozen=True)
class RetrievedEntry:
    """An entry that some heads of a layer retrieved."""

    layer: int
    position: int
    """Of the input token that was stored. Input 0 is the start token, so the entry holds the
    document's token `position - 1`, and token `position` follows it."""
    weight: float
    """Mean over heads of gate x softmax weight: its share in what the layer's attention puts out.
    The joint softmax has no gate: there it is the mean weight among what was retrieved."""


@dataclass(frozen=True)
class TokenTrace:
    """How a token of a document was predicted."""

    position: int
    """Of the token in its document, and of the query: its input is the token before."""
    token: int
    nats: float
    retrieved: tuple[RetrievedEntry, ...]
    """The heaviest first; empty before the first segment is in the memory."""


def trace_document(
    model: MemorizingTransformer,
    document: TokenizedDocument,
    start_token: int,
    capacity: int,
    positions: Sequence[int],
) -> list[TokenTrace]:
    """Read a document and record what was retrieved in predicting some of its tokens.

    The document is read from its start to the last segment that is asked for, with an empty memory
    in the beginning, as in `evaluate_documents`.

    Args:
        model: with memory layers.
        document: the document.
        start_token: precedes it.
        capacity: entries of the memory.
        positions: of the tokens, counted from 0 in the document.

    Returns:
        A trace for each of `positions`, in that order.

    Raises:
        ConfigError: a position outside the document; a capacity that the model cannot have.
    """
    num_tokens, segment_len = len(document.tokens), model.config.segment_len
    for position in positions:
        if not 0 <= position < num_tokens:
            raise ConfigError(
                f"position {position} is outside document {document.name!r} of {num_tokens:,} "
                f"tokens; allowed: 0 to {num_tokens - 1}"
            )
    check_capacity(capacity, model.config.num_neighbors)
    device = model.embedding.weight.device
    targets = torch.from_numpy(document.tokens.astype(np.int64)).to(device)
    inputs = torch.cat([targets.new_tensor([start_token]), targets[:-1]])
    wanted = {position // segment_len for position in positions}
    # What a single memory layer stores comes from the layers below it; what it retrieved reaches
    # later tokens through the local contexts of the layers above, no further than all windows
    # together. Only there the memory is read. A second layer would store what the first retrieved.
    reach = -(-model.config.num_layers * model.config.window // segment_len)
    is_read = {segment - back for segment in wanted for back in range(reach + 1)}
    always = len(model.config.memory_layers) > 1
    gates = {layer: gate.cpu() for layer, gate in model.gates().items()}
    traces = {}
    with evaluation_mode(model):
        state = model.init_state(1, capacity, device)
        for segment in range(max(wanted, default=-1) + 1):
            begin, end = segment * segment_len, min((segment + 1) * segment_len, num_tokens)
            output = model(
                inputs[None, begin:end],
                state,
                memory_open=always or segment in is_read,
                return_retrievals=segment in wanted,
            )
            state = output.state.commit()
            if segment not in wanted:
                continue
            log_probs = torch.log_softmax(output.logits[0].float(), dim=-1)
            for position in positions:
                if begin <= position < end:
                    index = position - begin
                    entries = [
                        entry
                        for layer, retrieval in (output.retrievals or {}).items()
                        for entry in _combine_heads(retrieval, layer, index, gates.get(layer))
                    ]
                    entries.sort(key=lambda entry: -entry.weight)
                    token = int(document.tokens[position])
                    traces[position] = TokenTrace(
                        position, token, -float(log_probs[index, token]), tuple(entries)
                    )
    return [traces[position] for position in positions]


def _combine_heads(
    retrieval: Retrieval, layer: int, index: int, gate: Tensor | None
) -> list[RetrievedEntry]:
    """Entries that the heads of query `index` retrieved, each once."""
    valid = retrieval.valid[0, :, index].cpu()
    weights = retrieval.weights[0, :, index].float().cpu()
    if gate is not None:
        weights = weights * gate.float().unsqueeze(-1)
    positions, which = torch.unique(
        retrieval.positions[0, :, index].cpu()[valid], return_inverse=True
    )
    sums = torch.zeros(len(positions)).index_add_(0, which, weights[valid]) / len(weights)
    return [
        RetrievedEntry(layer, position, weight)
        for position, weight in zip(positions.tolist(), sums.tolist(), strict=True)
    ]
