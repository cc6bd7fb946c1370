"""Sealed blocks on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memorizing.errors import StateError
from memorizing.index_settings import parse_index
from memorizing.knn import StoredKeys, make_index
from tests.knn.test_sealed import BLOCK, CAPACITY, ROWS, SAVED, K, draw_queries, make_ring


def alter_file(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate_file(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def remove_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def truncate_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])


def stamp(folder: Path) -> None:
    """Write the manifest anew, as somebody would who wants the folder to be read."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name, described in manifest["files"].items():
        content = (folder / name).read_bytes()
        described.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    path.write_text(json.dumps(manifest), encoding="utf-8")


def change_description(**changes):
    def change(folder: Path) -> None:
        path = folder / "index.json"
        values = json.loads(path.read_bytes())
        target = values if set(changes) & set(values) else values["blocks"][0]
        target.update(changes)
        path.write_text(json.dumps(values), encoding="utf-8")
        stamp(folder)

    return change


def change_arrays(change_one):
    def change(folder: Path) -> None:
        path = folder / "0-0.safetensors"
        arrays = load_file(path)
        for name in list(arrays):
            arrays[name] = change_one(arrays[name])
        save_file(arrays, path)
        stamp(folder)

    return change


def rename_arrays(folder: Path) -> None:
    path = folder / "0-0.safetensors"
    save_file({f"9{name}": array for name, array in load_file(path).items()}, path)
    stamp(folder)


DAMAGES = {
    "altered": alter_file,
    "truncated": truncate_file,
    "removed": remove_file,
    "manifest truncated": truncate_manifest,
    "manifest removed": lambda folder: (folder / "manifest.json").unlink(),
    "description removed": lambda folder: (folder / "index.json").unlink(),
    "other format": change_description(format=1),
    "other settings": change_description(index="faiss_flat"),
    "no blocks": change_description(blocks=7),
    "other row": change_description(row=ROWS),
    "twice the row": change_description(row=1),
    "other entries": change_description(entries=[1, 54]),
    "no entries": change_description(entries=[0, 0]),
    "one end": change_description(entries=[53]),
    "entries of the future": change_description(entries=[0, 10**9]),
    "entries without bound": change_description(entries=[0, 1e400]),
    "arrays of other heads": rename_arrays,
    "arrays of fewer keys": change_arrays(lambda array: array[:-1].clone()),
    "arrays of no keys": change_arrays(lambda array: array[:0].clone()),
    "arrays of larger numbers": change_arrays(lambda array: array + 1000),
    "arrays of lower numbers": change_arrays(lambda array: array - 1000),
    "arrays of ones": change_arrays(torch.ones_like),
    "arrays of zeros": change_arrays(torch.zeros_like),
    "arrays turned": change_arrays(lambda array: array.flip(0)),
    "arrays of another dtype": change_arrays(lambda array: array.double()),
    "arrays of another shape": change_arrays(lambda array: array[None]),
}
HARMLESS = {
    # Every key in the first list, or lists in another order: slow or bad, but a valid index.
    ("faiss_ivf", "arrays of zeros"),
    ("faiss_ivf", "arrays turned"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("index", SAVED)
def test_a_damaged_folder_is_refused_and_changes_nothing(index: str, damage: str, tmp_path: Path):
    ring = make_ring(index, 2 * BLOCK)
    before = ring.search(draw_queries(), K)
    ring.index.save(tmp_path, ring.stored)
    DAMAGES[damage](tmp_path)
    if (index.partition(":")[0], damage) in HARMLESS:
        ring.index.load(tmp_path, ring.stored)
        ring.search(draw_queries(), K)
        return
    with pytest.raises(StateError, match="again"):
        ring.index.load(tmp_path, ring.stored)
    after = ring.search(draw_queries(), K)
    assert torch.equal(after.slots, before.slots)
    assert torch.equal(after.scores, before.scores)


def test_other_keys_settings_or_dtypes_are_refused(tmp_path: Path):
    ring = make_ring("faiss_hnsw:block_len=53", 2 * BLOCK)
    ring.index.save(tmp_path, ring.stored)
    stored = ring.stored
    other = stored.keys.clone()
    other[1, 2, 3, 5] += 0.5
    refused = [
        StoredKeys(other, stored.num_appended),
        StoredKeys(stored.keys.bfloat16(), stored.num_appended),
        StoredKeys(stored.keys, (2 * BLOCK, BLOCK)),
        StoredKeys(stored.keys[:1], stored.num_appended[:1]),
        StoredKeys(stored.keys[:, :2], stored.num_appended),
        StoredKeys(stored.keys, (2 * BLOCK, 2 * BLOCK + CAPACITY)),
    ]
    for wrong in refused:
        with pytest.raises(StateError, match="memory"):
            ring.index.load(tmp_path, wrong)
    index = make_index(parse_index("faiss_hnsw:block_len=53,num_links=7"))
    with pytest.raises(StateError, match="num_links=7"):
        index.load(tmp_path, stored)
