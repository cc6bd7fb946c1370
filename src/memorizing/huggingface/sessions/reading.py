"""Documents through a model into memory: tokens, entries, nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memorizing.data import Document
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.sessions.texts import encode_text, encode_with_offsets
from memorizing.memory.disk import LayerEntries, NewDocument, hash_text
from memorizing.terminal import is_terminal, make_display

OnRead = Callable[[str, int], None]
"""Called after every segment that was read: name of its document, and its tokens."""


class Readers(Protocol):
    """Other processes that read, each into folders of its own."""

    def read(
        self, documents: Iterator[Document], memory: Path, *, keep_text: bool, on_read: OnRead
    ) -> Iterator[Path]:
        """Read documents, in any order, each once.

        Args:
            documents: are taken as they are needed.
            memory: the folder of a memory that says how they are read.
            keep_text: also keep their texts.
            on_read: is called when a document was read whole.

        Yields:
            Folders on the disk of the memory, with documents that were read whole.
        """
        ...

    def stop(self) -> Iterator[Path]:
        """End, also before all was read. Gives what was read whole since."""
        ...


@dataclass(frozen=True)
class ReadDocument:
    """A document that was read whole."""

    description: NewDocument
    pieces: list[LayerEntries]


def read_document(
    attachment: Attachment, tokenizer: Any, document: Document, on_read: OnRead, *, keep_text: bool
) -> ReadDocument:
    """Read a document, with the special tokens that the tokenizer puts around a text."""
    offsets = None
    if keep_text:
        tokens, offsets = encode_with_offsets(tokenizer, document.text)
    else:
        tokens = encode_text(tokenizer, document.text, is_whole=True)
    pieces, first = [], min(attachment.settings.num_sinks, len(tokens))
    for entries in read_tokens(attachment, torch.from_numpy(tokens).long()):
        num_new = next(iter(entries.values()))[0].shape[1]
        on_read(document.name, num_new if pieces else num_new + first)
        pieces.append(entries)
    description = NewDocument(
        document.name,
        len(tokens),
        len(tokens) - first,
        hash_text(document.text),
        text=document.text if keep_text else None,
        token_offsets=None if offsets is None else torch.from_numpy(offsets),
        entry_tokens=torch.arange(first, len(tokens)),
    )
    return ReadDocument(description, pieces)


def read_tokens(attachment: Attachment, tokens: Tensor) -> Iterator[LayerEntries]:
    """The entries of a document, a segment at a time; (H, n, D) per layer.

    A document is read alone: its entries do not depend on what else is in memory. Nothing above the
    last layer that is kept is computed.

    Args:
        attachment: of the model. Not changed.
        tokens: (n,) int64.
    """
    model, settings = attachment.model(), attachment.settings
    was_training = model.training
    model.eval()
    try:
        if settings.read == "entries":
            yield from _read_stretch(attachment, tokens, settings.num_sinks)
            return
        # Passages are found by what was read in the model's own context, as far as that goes.
        with attachment.change_mode(window=attachment.max_window):
            for stretch, num_left_out in _split_stretches(attachment, tokens):
                yield from _read_stretch(attachment, stretch, num_left_out)
    finally:
        model.train(was_training)


def _split_stretches(attachment: Attachment, tokens: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Stretches of a document as long as the model's context, and what of each is left out.

    Each but the first begins with the document's sinks, and with the second half of the one before.
    """
    most, num_sinks = attachment.max_window, attachment.settings.num_sinks
    yield tokens[:most], num_sinks
    num_read, num_again = most, (most - num_sinks) // 2
    while num_read < len(tokens):
        end = min(len(tokens), num_read + most - num_sinks - num_again)
        stretch = torch.cat([tokens[:num_sinks], tokens[num_read - num_again : end]])
        yield stretch, num_sinks + num_again
        num_read = end


def _read_stretch(
    attachment: Attachment, tokens: Tensor, num_left_out: int
) -> Iterator[LayerEntries]:
    """The entries of tokens, a segment at a time, but for the first ones."""
    device = attachment.model().get_input_embeddings().weight.device
    cache, dtype = attachment.make_cache(), attachment.stored_dtype
    for piece in tokens.split(attachment.settings.segment_len) if len(tokens) else ():
        with attachment.collect() as collected:
            attachment.decoder.base(
                input_ids=piece.unsqueeze(0).to(device), **attachment.pass_cache(cache)
            )
        # Made in inference mode they could not be used with gradients outside of it.
        with torch.inference_mode(False), torch.no_grad():
            entries = {
                layer: (
                    keys[0, :, num_left_out:].to("cpu", dtype),
                    values[0, :, num_left_out:].to("cpu", dtype),
                )
                for layer, (keys, values) in collected.items()
            }
        yield entries
        num_left_out = max(0, num_left_out - len(piece))


def join_entries(
    attachment: Attachment, documents: Sequence[ReadDocument]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Entries (H, n, D) of all layers that are kept one after another; of no documents, none."""
    num_heads, head_dim = attachment.entry_shape
    nothing = torch.zeros(num_heads, 0, head_dim, dtype=attachment.stored_dtype)
    pieces = [piece for document in documents for piece in document.pieces]
    return {
        layer: (
            torch.cat([nothing, *(piece[layer][0] for piece in pieces)], 1),
            torch.cat([nothing, *(piece[layer][1] for piece in pieces)], 1),
        )
        for layer in attachment.kept_layers
    }


@contextmanager
def show_progress(is_shown: bool) -> Iterator[OnRead]:
    """Show how many tokens were read, how fast, and of which document; gives what counts them."""
    display = make_display(is_shown and is_terminal(), is_transient=True)
    start_s, num_tokens = time.perf_counter(), 0

    def advance(name: str, count: int) -> None:
        nonlocal num_tokens
        num_tokens += count
        speed = num_tokens / max(time.perf_counter() - start_s, 1e-9)
        display.update(num_tokens, {"tokens/s": f"{speed:,.0f}", "reading": name[-60:]})

    display.start(0, None, "tokens")
    try:
        yield advance
    finally:
        display.stop()
