"""What calls of our own model and its `generate` take, what they refuse, and how they are read.

A call may be of any length, over rows with any padding; it is split where the memory's clock wants
it. Shapes: B rows, T columns of the call, K columns whose logits are kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface.own_model.cache import MemorizingCache
from memorizing.huggingface.releases import CACHE_NAME, take_cache
from memorizing.loss import sum_nats
from memorizing.model import MemorizingTransformer, ModelState

IGNORED_LABEL = -100
"""The label of a token that is not predicted, as `transformers` has it."""

_REASONS = {
    "inputs_embeds": "tokens are embedded by the model itself: give input_ids",
    "position_ids": "positions follow from attention_mask and the history",
    "output_attentions": "this model does not return attentions",
    "output_hidden_states": "this model does not return hidden states",
}


def refuse_unknown(inputs: Mapping[str, Any]) -> None:
    """Refuse inputs of a call that would have no effect.

    Raises:
        ConfigError: for the first that is neither None nor False.
    """
    for name, value in inputs.items():
        if value is not None and value is not False:
            reason = _REASONS.get(name, "this model does not know it")
            raise ConfigError(f"{name} cannot be used here: {reason}")


def choose_cache(arguments: dict[str, Any]) -> MemorizingCache | None:
    """The history of a call, taken out of its arguments; see `take_cache`. None is none.

    Raises:
        ConfigError: it was given under two names.
        StateError: a cache of another kind.
    """
    given = take_cache(arguments)
    if given is not None and not isinstance(given, MemorizingCache):
        raise StateError(
            f"{CACHE_NAME} is a {type(given).__name__}; the history of this model is a "
            "MemorizingCache: pass what a call returned or model.init_cache(num_rows), or leave it "
            "out"
        )
    return given


def find_valid(mask: Tensor | None, tokens: Tensor, num_before: int) -> Tensor:
    """Which columns of a call are tokens: (B, T) bool on the CPU.

    Args:
        mask: (B, T), or with the columns before; not 0 where there is a token. None is all.
        tokens: (B, T).
        num_before: columns read before.

    Raises:
        ConfigError: a mask of another shape.
    """
    num_rows, num_columns = tokens.shape
    if mask is None:
        return torch.ones(num_rows, num_columns, dtype=torch.bool)
    widths = {num_columns, num_before + num_columns}
    if mask.dim() != 2 or mask.shape[0] != num_rows or mask.shape[1] not in widths:
        allowed = " or ".join(f"({num_rows}, {width})" for width in sorted(widths))
        raise ConfigError(f"attention_mask is {tuple(mask.shape)}; it must be {allowed}")
    return mask[:, -num_columns:].cpu() != 0


def choose_columns(num_columns: int, wanted: int | Tensor) -> tuple[Tensor, Tensor | None]:
    """Columns whose logits are returned: (T,) bool on the CPU, and their order.

    Args:
        num_columns: T.
        wanted: the last so many, 0 for all; or the columns themselves, in any order.

    Returns:
        The mask, and for each column of a tensor its place among those of the mask.
    """
    is_kept = torch.zeros(num_columns, dtype=torch.bool)
    if isinstance(wanted, int):
        is_kept[-wanted if wanted else 0 :] = True
        return is_kept, None
    columns = torch.arange(num_columns)[wanted.cpu()]
    is_kept[columns] = True
    return is_kept, (is_kept.cumsum(0) - 1)[columns]


def compute_loss(
    logits: Tensor, labels: Tensor, valid: Tensor, num_items: int | Tensor | None
) -> Tensor:
    """Nats of the next token, summed and divided by `num_items`, or by the targets counted here.

    A target counts where its label is not `IGNORED_LABEL` and neither it nor the token before it is
    padding.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, not shifted.
        valid: (B, T) bool: tokens that are not padding.
        num_items: targets of all calls that are added up before a step.
    """
    valid = valid.to(logits.device)
    targets = torch.full_like(labels, IGNORED_LABEL, device=logits.device)
    targets[:, :-1] = labels[:, 1:]
    counted = (targets != IGNORED_LABEL) & valid
    counted[:, :-1] &= valid[:, 1:]
    nats = sum_nats(logits, targets, counted)
    if num_items is None:
        return nats / counted.sum().clamp(min=1)
    return nats / (num_items.to(nats.device) if isinstance(num_items, Tensor) else num_items)


def check_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: MemorizingCache | None,
    settings: GenerationConfig,
) -> None:
    """Refuse tokens, mask and history that do not belong together.

    Raises:
        ConfigError: padding on the right, or padding that no mask tells.
        StateError: tokens that do not go on where the history ends.
    """
    width = input_ids.shape[1]
    if attention_mask is not None:
        if not bool(attention_mask[:, -1].all()):
            raise ConfigError(
                "attention_mask has padding on the right, where the next token belongs; use "
                "tokenizer.padding_side = 'left'"
            )
    elif _begins_with_padding(input_ids, settings):
        raise ConfigError(
            f"a row begins with padding, token {settings.pad_token_id}; give the attention_mask "
            "that the tokenizer returned"
        )
    if cache is None:
        return
    num_rows = len(input_ids) * (settings.num_return_sequences or 1)
    if cache.batch_size != num_rows:
        raise StateError(
            f"{CACHE_NAME} has {cache.batch_size} rows and {num_rows} sequences are asked for; "
            "copy its rows with cache.batch_repeat_interleave(num_return_sequences)"
        )
    num_read = cache.get_seq_length()
    mask_width = width if attention_mask is None else attention_mask.shape[1]
    if mask_width != width:  # Only new tokens; the mask is over all.
        if mask_width != num_read + width:
            raise StateError(
                f"{CACHE_NAME} has read {num_read} columns and {width} follow, but "
                f"attention_mask has {mask_width}; it must have {num_read + width}"
            )
        return
    if width <= num_read:
        raise StateError(
            f"{CACHE_NAME} has read {num_read} columns and input_ids has {width}; give the "
            "whole conversation with new tokens at its end, or only the new tokens with an "
            "attention_mask over the whole"
        )
    if cache.last_tokens is not None:
        last = input_ids[:, num_read - 1].repeat_interleave(num_rows // len(input_ids))
        if not bool((last.to(cache.last_tokens.device) == cache.last_tokens).all()):
            raise StateError(
                f"column {num_read - 1} of input_ids is not what {CACHE_NAME} read there; give "
                "the same conversation with new tokens at its end"
            )


def _begins_with_padding(tokens: Tensor, settings: GenerationConfig) -> bool:
    padding = settings.pad_token_id
    if padding is None:
        return False
    # One start token is no padding, though its id may be the same.
    num_first = 2 if settings.bos_token_id in (None, padding) else 1
    first = tokens[:, :num_first]
    return first.shape[1] == num_first and bool((first == padding).all(1).any())


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
    for columns, inside in _plan(state.position, valid, state.segment_len):
        # What is due, to copies where the backward pass reads the memories before once more.
        state = state.commit(in_copies=in_graph)
        is_full = bool(inside.all())
        output = model(
            tokens.gather(1, columns.to(tokens.device)), state, valid=None if is_full else inside
        )
        state = output.state
        in_graph = torch.is_grad_enabled()
        wanted = inside & is_kept[columns]
        is_whole = is_whole and is_full
        if not bool(wanted.any()):
            continue
        if is_whole:  # Then all rows read the same columns.
            kept.append(output.logits if bool(wanted.all()) else output.logits[:, wanted[0]])
        else:
            kept.append(output.logits[wanted])
        places.append((wanted.nonzero()[:, 0], columns[wanted]))
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


def _plan(position: Tensor, valid: Tensor, segment_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What the rows read at once: each from its next token up to the end of its segment.

    Rows are aligned on the left whatever the padding of the call was, so that all of them reach
    the ends of their segments in as few steps as the longest takes.

    Yields:
        (B, W) int64 on the CPU: the column of the call that each token comes from; and (B, W) bool
        on the CPU: False where a row has no more.
    """
    num_valid = valid.sum(1)
    # The columns of a row's tokens, in order, then those of its padding.
    order = (~valid).to(torch.int8).sort(dim=1, stable=True).indices
    done = torch.zeros_like(num_valid)
    while bool((done < num_valid).any()):
        room = segment_len - (position + done) % segment_len
        take = torch.minimum(room, num_valid - done)
        offsets = torch.arange(int(take.max()))
        columns = (done.unsqueeze(1) + offsets).clamp(max=valid.shape[1] - 1)
        yield order.gather(1, columns), offsets < take.unsqueeze(1)
        done = done + take
