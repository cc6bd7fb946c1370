"""Small memories whose entries follow from the names of their documents."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from memorizing.knn.int8 import encode_int8
from memorizing.memory import FolderDescription, MemoryFolder, NewDocument, hash_text
from memorizing.memory.disk.manifest import hash_values
from memorizing.memory.disk.segment import decode_int8
from memorizing.storage.tensors import view_bytes

LAYERS, HEADS, DIM = (3, 7), 2, 13


def describe(dtype: str = "bfloat16", fingerprint: str = "of a model") -> FolderDescription:
    return FolderDescription(fingerprint, LAYERS, HEADS, DIM, dtype, {"top": 3})


def count_entries(name: str) -> int:
    """From 3 to 23."""
    return 3 + zlib.crc32(name.encode()) % 21


def draw_entries(name: str) -> dict[int, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = (2, HEADS, count_entries(name), DIM)
    drawn = (torch.randn(shape, generator=generator) for _ in LAYERS)
    return {layer: (keys, values) for layer, (keys, values) in zip(LAYERS, drawn, strict=True)}


def write_text(name: str) -> str:
    """Two characters for every token, one of them of two bytes."""
    first = zlib.crc32(name.encode()) % 89
    return "".join(
        f"{chr(0xE0 + first + place)}{place % 10}" for place in range(count_entries(name))
    )


def make_document(name: str, *, keep_text: bool = False) -> NewDocument:
    count, text = count_entries(name), write_text(name)
    if not keep_text:
        return NewDocument(name, count, count, hash_text(text))
    offsets = [(2 * place, 2 * place + 2) for place in range(count)]
    return NewDocument(name, count, count, hash_text(text), text, offsets)


def append(
    folder: MemoryFolder,
    names: Iterable[str],
    *,
    keep_text: bool = False,
    replaced: Collection[str] = (),
) -> None:
    names = list(names)
    drawn = [draw_entries(name) for name in names]
    entries = {}
    for layer in LAYERS:
        keys, values = (
            torch.cat([torch.empty(HEADS, 0, DIM), *(one[layer][kind] for one in drawn)], 1)
            for kind in (0, 1)
        )
        entries[layer] = (keys, values)
    documents = [make_document(name, keep_text=keep_text) for name in names]
    folder.append(documents, entries, replaced=replaced)


def make_folder(path: Path, *appends: Iterable[str], dtype: str = "bfloat16") -> MemoryFolder:
    folder = MemoryFolder.create(path, describe(dtype))
    for names in appends:
        append(folder, names)
    return folder


def round_trip(vectors: Tensor, dtype: str) -> Tensor:
    """As a folder gives them back."""
    if dtype == "int8":
        codes, factors = encode_int8(vectors)
        return decode_int8(codes, factors.squeeze(-1), torch.bfloat16)
    return vectors.to(getattr(torch, dtype))


def read_entries(folder: MemoryFolder, layer: int) -> tuple[Tensor, Tensor]:
    """All keys and values (H, n, D)."""
    blocks = [block.load() for block in folder.open_layer(layer).blocks]
    empty = [torch.empty(HEADS, 0, DIM, dtype=folder.description.searched_dtype)]
    keys = torch.cat([*empty, *(block.keys[0] for block in blocks)], 1)
    return keys, torch.cat([*empty, *(block.values[0] for block in blocks)], 1)


def check_holds(folder: MemoryFolder, names: Iterable[str]) -> None:
    """Exactly these documents, with their own entries, in this order."""
    names = list(names)
    assert [document.name for document in folder.documents] == names
    assert folder.num_entries == sum(map(count_entries, names))
    owners = folder.contents.document_of(torch.arange(folder.num_entries))
    tokens = folder.contents.token_of(torch.arange(folder.num_entries))
    for layer in LAYERS:
        keys, values = read_entries(folder, layer)
        for number, name in enumerate(names):
            mine = owners == number
            expected = draw_entries(name)[layer]
            for found, vectors in zip((keys, values), expected, strict=True):
                assert torch.equal(found[:, mine], round_trip(vectors, folder.description.dtype))
            assert tokens[mine].tolist() == list(range(count_entries(name)))
    for document in folder.documents:
        assert document.sha256 == hash_text(write_text(document.name))
        if document.text is not None:
            assert folder.contents.read_text(document.name) == write_text(document.name)


def list_files(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


def edit_segment(path: Path, name: str, edit: Callable[[Tensor], object]) -> None:
    """Change a tensor of the last segment, and its checksum, as someone might who knows how."""
    segment = max(path.glob("segment-*"))
    tensors = load_file(segment)
    content = bytearray(segment.read_bytes())
    length = int.from_bytes(content[:8], "little")
    first, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    edit(tensors[name])
    changed = view_bytes(tensors[name])
    content[8 + length + first : 8 + length + first + len(changed)] = changed
    segment.write_bytes(content)
    edit_manifest(
        path, lambda values: values["segments"][-1].update(sha256=sha256(content).hexdigest())
    )


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its checksum, as someone might who knows how it is made."""
    values = json.loads((path / "manifest.json").read_text())
    edit(values)
    values["checksum"] = hash_values(values)
    (path / "manifest.json").write_text(json.dumps(values))
