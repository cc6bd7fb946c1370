"""A manifest that is not what a writer made is refused, with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.errors import MemoryFolderError
from memorizing.memory import (
    FolderDescription,
    MemoryFolder,
)
from tests.memory.disk.examples import (
    DIM,
    HEADS,
    LAYERS,
    edit_manifest,
)


def test_every_altered_byte_of_a_manifest_is_seen(path: Path) -> None:
    content = (path / "manifest.json").read_bytes()
    assert content.count(b"\n") > 10
    for place in range(0, len(content), 7):
        altered = bytearray(content)
        altered[place] ^= 1
        (path / "manifest.json").write_bytes(altered)
        with pytest.raises(MemoryFolderError, match=r"manifest.json is refused"):
            MemoryFolder.open(path)
    for num_bytes in (0, 1, len(content) // 2, len(content) - 3):
        (path / "manifest.json").write_bytes(content[:num_bytes])
        with pytest.raises(MemoryFolderError, match=r"manifest.json is refused"):
            MemoryFolder.open(path)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"format": "other"}', "[" * 100_000])
def test_another_file_is_no_manifest(path: Path, content: str) -> None:
    (path / "manifest.json").write_text(content)
    with pytest.raises(MemoryFolderError, match=r"manifest.json is refused"):
        MemoryFolder.open(path)


def test_another_format_version_is_refused_with_what_to_do(path: Path) -> None:
    edit_manifest(path, lambda values: values.update(version=2))
    with pytest.raises(MemoryFolderError, match=r"version 2, .* reads 1; use the version that"):
        MemoryFolder.open(path)


def set_in(part: str, number: int, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest[part][number].update(values)


def move_file(name: str) -> Callable[[dict[str, Any]], object]:
    """Name the segment otherwise, everywhere."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["segments"][0]["file"] = name
        for document in manifest["documents"]:
            document["segment"] = name

    return edit


NONSENSE = {
    "no layers": lambda manifest: manifest.update(layers=[]),
    "layers that are no list": lambda manifest: manifest.update(layers=7),
    "layers twice": lambda manifest: manifest.update(layers=[3, 3]),
    "a layer that is no number": lambda manifest: manifest.update(layers=[3, "7"]),
    "no heads": lambda manifest: manifest.update(num_heads=0),
    "heads that are true": lambda manifest: manifest.update(num_heads=True),
    "other heads": lambda manifest: manifest.update(num_heads=HEADS + 1),
    "half a dimension": lambda manifest: manifest.update(head_dim=0.5),
    "another dtype": lambda manifest: manifest.update(dtype="float32"),
    "an unknown dtype": lambda manifest: manifest.update(dtype="float8"),
    "a dtype that is a list": lambda manifest: manifest.update(dtype=["int8"]),
    "no fingerprint": lambda manifest: manifest.update(fingerprint=""),
    "settings that are no dict": lambda manifest: manifest.update(settings=[]),
    "a key too many": lambda manifest: manifest.update(more=1),
    "a key too few": lambda manifest: manifest.pop("settings"),
    "segments that are no list": lambda manifest: manifest.update(segments={}),
    "segments that are texts": lambda manifest: manifest.update(segments=["a"]),
    "a negative number of segments": lambda manifest: manifest.update(next_segment=-1),
    "a name that was given": lambda manifest: manifest.update(next_segment=1),
    "a path upwards": move_file("../segment-000001.safetensors"),
    "an absolute path": move_file("/tmp/segment-000001.safetensors"),
    "a path downwards": move_file("index/segment-000001.safetensors"),
    "a line break": move_file("segment-000001.safetensors\n"),
    "another file": move_file("manifest.json"),
    "no path": move_file(""),
    "a file twice": lambda manifest: manifest.update(segments=manifest["segments"] * 2),
    "a segment of another size": set_in("segments", 0, num_bytes=10**6),
    "too many entries": set_in("segments", 0, num_entries=10**12),
    "more than numbers can be": set_in("segments", 0, num_entries=10**30),
    "a negative size": set_in("segments", 0, num_entries=-5),
    "a size that is no number": set_in("segments", 0, num_entries="5"),
    "a checksum that is none": set_in("segments", 0, sha256="0" * 63),
    "a document twice": lambda manifest: manifest["documents"].append(manifest["documents"][0]),
    "a document less": lambda manifest: manifest["documents"].pop(),
    "documents in another order": lambda manifest: manifest["documents"].reverse(),
    "a document elsewhere": set_in("documents", 1, segment="segment-000000.safetensors"),
    "a document before all": set_in("documents", 0, first_entry=-1),
    "documents over another": set_in("documents", 1, first_entry=0),
    "a text that is not there": set_in("documents", 1, text=[0, 5]),
    "a text that ends before it begins": set_in("documents", 1, text=[5, 0]),
    "a text that is a number": set_in("documents", 1, text=5),
    "spans without text": set_in("documents", 1, spans=[0, 0]),
    "a document without name": lambda manifest: manifest["documents"][0].pop("name"),
    "a name that is a number": set_in("documents", 0, name=5),
    "more entries than tokens": set_in("documents", 0, num_tokens=0),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_in_a_manifest_is_refused(path: Path, nonsense: str) -> None:
    edit_manifest(path, NONSENSE[nonsense])
    with pytest.raises(MemoryFolderError, match=r"manifest.json is refused"):
        MemoryFolder.open(path)


def test_a_manifest_that_was_edited_by_hand_is_refused(path: Path) -> None:
    values = json.loads((path / "manifest.json").read_text())
    values["documents"][0]["name"] = "another"
    (path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(MemoryFolderError, match="it was altered"):
        MemoryFolder.open(path)


@pytest.mark.parametrize(
    "values",
    [
        {"fingerprint": ""},
        {"layers": ()},
        {"layers": (7, 3)},
        {"layers": (-1,)},
        {"num_heads": 0},
        {"head_dim": 1.5},
        {"dtype": "float64"},
        {"settings": {"a": torch.nan}},
        {"settings": {"a": object()}},
    ],
)
def test_a_description_that_cannot_work_is_refused(values: dict[str, Any]) -> None:
    right = {"fingerprint": "a", "layers": LAYERS, "num_heads": HEADS, "head_dim": DIM}
    with pytest.raises(MemoryFolderError, match=next(iter(values))):
        FolderDescription(**right | values)
