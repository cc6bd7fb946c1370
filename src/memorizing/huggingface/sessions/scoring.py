"""What a model with memory makes of texts: nats of every token, segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memorizing.config import Control, check_capacity, check_control
from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import Attachment, get_attachment, unwrap
from memorizing.huggingface.attaching.passage_room import look_up_start_token
from memorizing.index_settings import ExactSettings
from memorizing.loss import compute_token_nats
from memorizing.model import RetrievalControl, evaluation_mode
from memorizing.ranks import ALONE, Ranks

Tokens = NDArray[np.integer[Any]]
Progress = Callable[[int, int], None]
"""Called after every segment with the tokens read so far, and those of all texts."""


def find_start_token(model: Any, tokenizer: Any = None) -> int:
    """Id of the token that precedes every text: what the model knows as a text's beginning.

    The `bos_token_id` of the tokenizer, or of the model's configuration; else an `eos_token_id`,
    which stands between texts in the training of most models that have no other.

    Raises:
        ConfigError: there is none.
    """
    token = look_up_start_token(tokenizer, unwrap(model).config)
    if token is None:
        raise ConfigError(
            "neither the tokenizer nor the model has a bos_token_id or eos_token_id, one of which "
            "precedes every text; set tokenizer.bos_token"
        )
    return token


def score_texts(
    model: Any,
    texts: Sequence[Tokens],
    start_token: int,
    *,
    control: Control | None = None,
    capacity: int | None = None,
    max_tokens: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> list[NDArray[np.float32]]:
    """Nats of every token of every text, each read from its first token with a memory of its own.

    A text's nats do not depend on the other texts, except under `other_document`. What
    `open_memory` has open is read too; where entries are read, controls replace all memory.

    Where passages are read, they are found by tokens before those that are scored, every
    `search_every` tokens.

    Args:
        model: with `add_memory`. In evaluation mode during the call.
        texts: token ids, without the start token.
        start_token: precedes every text, so that its first token is counted.
        control: `off` reads no memory; with `other_document` a text reads the memory of another
            one, which is read beside it (the next longer one; the longest reads the second longest,
            repeated), or the passages that the other one finds, in itself and in what is open;
            `shuffled` keeps keys and mixes up values, or the tokens of every passage.
        capacity: entries of a text's own memory; None is that of `add_memory`, 0 turns it off.
        max_tokens: only the first tokens of each text are read; 0 reads all.
        seed: of `shuffled`.
        progress: see `Progress`.
        ranks: processes that read these texts together; each has all nats.

    Raises:
        ConfigError: no text for `other_document`, a capacity below the neighbors, or no memory.
    """
    model = unwrap(model)
    attachment = get_attachment(model)
    if capacity is None:
        capacity = attachment.settings.capacity
    check_capacity(capacity, attachment.settings.num_neighbors)
    cut = [text[:max_tokens] if max_tokens else text for text in texts]
    check_control(control, capacity, len(cut))
    lengths, done = [len(text) for text in cut], 0
    donors = _choose_donors(lengths) if control == "other_document" else None
    # By length, so that ranks read about as much.
    order = sorted(range(len(cut)), key=lambda index: -lengths[index])
    mine = sorted(order[ranks.rank :: ranks.size])
    total = sum(lengths[index] for index in mine)
    scored: dict[int, NDArray[np.float32]] = {}
    with evaluation_mode(model), read_memory(attachment, 0 if control == "off" else capacity):
        for index in mine:
            text = cut[index]
            rows = [text] if donors is None else [text, np.resize(cut[donors[index]], len(text))]
            nats = [np.zeros(0, dtype=np.float32)]
            for piece in _score_rows(model, attachment, rows, start_token, control, seed):
                nats.append(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
            scored[index] = np.concatenate(nats)
    return ranks.join_arrays(scored, lengths)


def _score_rows(
    model: Any,
    attachment: Attachment,
    rows: Sequence[Tokens],
    start_token: int,
    control: Control | None,
    seed: int,
) -> Iterator[NDArray[np.float32]]:
    """Nats of the first row, a segment at a time; the others are read beside it."""
    device = model.get_input_embeddings().weight.device
    targets = torch.from_numpy(np.stack([row.astype(np.int64) for row in rows]))
    inputs = torch.cat([torch.full((len(rows), 1), start_token), targets[:, :-1]], 1)
    inputs = inputs[:, : targets.shape[1]]
    cache = attachment.make_cache()
    for span in _cut_calls(attachment, targets.shape[1]):
        wrong = _make_control(control, len(rows), seed + span.start)
        with attachment.change_mode(control=wrong, looks_ahead=False):
            logits = model(
                input_ids=inputs[:, span].to(device), **attachment.pass_cache(cache)
            ).logits
        yield compute_token_nats(logits[:1], targets[:1, span].to(device))[0].cpu().numpy()


def _cut_calls(attachment: Attachment, num_tokens: int) -> Iterator[slice]:
    """What is read at once: a segment; where passages are read, as much as goes by the same ones.

    So passages are looked for as often as where a text is written.
    """
    settings = attachment.settings
    segment_len, call_len = settings.segment_len, settings.segment_len
    if settings.finds_passages and attachment.mode.is_reading:
        call_len = min(call_len, settings.search_every)
    for begin in range(0, num_tokens, segment_len):
        end = min(begin + segment_len, num_tokens)
        for start in range(begin, end, call_len):
            yield slice(start, min(start + call_len, end))


def _choose_donors(lengths: list[int]) -> list[int]:
    """For every text the next longer one; for the longest the second longest."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    donors = {index: order[place - 1] for place, index in enumerate(order)}
    donors[order[0]] = order[1]
    return [donors[index] for index in range(len(lengths))]


def _make_control(control: Control | None, num_rows: int, seed: int) -> RetrievalControl | None:
    if control == "shuffled":
        return RetrievalControl(None, shuffle_values=True, seed=seed)
    if control == "other_document":
        # The donor reads its own memory.
        return RetrievalControl(torch.full((num_rows,), num_rows - 1, dtype=torch.int64))
    return None


@contextmanager
def read_memory(attachment: Attachment, capacity: int | None = None) -> Iterator[None]:
    """Inside, texts have memories of their own, whether or not `open_memory` has one open.

    Args:
        attachment: of the model.
        capacity: of the memories of texts that begin inside; None is that of `add_memory`. 0 reads
            nothing at all, not even what is open.
    """
    changes: dict[str, Any] = {"opened": attachment.opened or attachment.plan_opening({})}
    if capacity is not None:
        is_reading = attachment.mode.is_reading and capacity > 0
        changes |= {"capacity": capacity, "is_reading": is_reading}
    with attachment.change_mode(**changes):
        yield


@contextmanager
def search_exactly(attachment: Attachment) -> Iterator[None]:
    """Inside, what is open and the memories of texts that begin are searched without an index."""
    opened = attachment.opened or attachment.plan_opening({})
    base = {layer: memory.search_exactly() for layer, memory in opened.base.items()}
    with attachment.change_mode(opened=replace(opened, base=base), index=ExactSettings()):
        yield
