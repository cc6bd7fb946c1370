"""Passages in the room as they were kept: the entries of all layers, which nothing reads again.

Keys are kept free of positions and turned to where they stand. What was not kept, a start token and
passages of the text itself, is read as one text of its own, and moved there likewise. A passage so
has what it saw when its document was read, where one that is read again sees the start token and
the passages before it.

Shapes: B rows, H heads of keys, R places of the room, n tokens that are read, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from memorizing.huggingface.attaching.decoder import Decoder
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passage_room import Room, look_up_start_token
from memorizing.settings import require


def check_kept(decoder: Decoder, settings: MemorySettings) -> None:
    """Refuse models whose entries cannot be kept and moved.

    Raises:
        ConfigError: with the reason.
    """
    shapes = {decoder.shapes[layer][1:] for layer in settings.list_kept(decoder.num_cached)}
    has_start = look_up_start_token(decoder.base.config) is not None
    for is_allowed, reason in (
        (decoder.family.positions != "learned", "adds positions to what its layers read"),
        (len(shapes) == 1, f"has layers with other heads ({sorted(shapes)})"),
        (has_start, "has no bos_token_id or eos_token_id for entries to stand behind"),
    ):
        require(is_allowed, "keep", settings.keep, f"text, since this model {reason}")


def find_read(room: Room) -> tuple[Tensor, Tensor]:
    """Columns (B, n) of the room whose tokens are read, at the end, and which of them are."""
    is_read = (room.ids >= 0) & (torch.arange(room.length) >= room.first.view(-1, 1))
    columns = is_read.to(torch.int8).argsort(dim=1, stable=True)
    columns = columns[:, room.length - int(is_read.sum(1).max()) :]
    return columns, is_read.gather(1, columns)


def put_entries(
    room: Room,
    read: Sequence[tuple[Tensor, Tensor]],
    columns: Tensor,
    decoder: Decoder,
    room_len: int,
) -> Room:
    """The room with what was read and what was kept, all at their places.

    Args:
        room: without layers.
        read: per layer, keys and values (B, H, n, D) of what was read at the last n places.
        columns: (B, n): where it belongs.
        decoder: the model.
        room_len: places that are kept free in front of the text.

    Raises:
        MemoryFolderError: a file of the folder is damaged.
    """
    place = (torch.arange(room.length) + room_len - room.length).unsqueeze(0)
    rows = torch.arange(len(columns)).unsqueeze(1)
    layers = []
    for number, (keys, values) in enumerate(read):
        if decoder.rotated[number]:
            keys = decoder.rotate_back(number, keys, place[:, -columns.shape[1] :])
        pair = [
            part.new_zeros(*part.shape[:2], room.length, part.shape[3]) for part in (keys, values)
        ]
        for whole, part in zip(pair, (keys, values), strict=True):
            whole[rows, :, columns] = part.transpose(1, 2)
        layers.append(pair)
    for row, passages in enumerate(room.passages):
        end = room.length
        for passage in passages:
            span = slice(end - len(passage.ids), end)
            end = span.start
            for number, parts in () if passage.kept is None else passage.kept():
                for whole, part in zip(layers[number], parts, strict=True):
                    whole[row, :, span] = part[..., : whole.shape[3]]
    for number, pair in enumerate(layers):
        if decoder.rotated[number]:
            pair[0] = decoder.rotate_back(number, pair[0], -place)
    return replace(room, read=tuple((keys, values) for keys, values in layers))
