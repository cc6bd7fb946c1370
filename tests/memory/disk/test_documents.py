"""Documents and their entries are checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.errors import MemoryFolderError
from memorizing.memory import (
    MemoryFolder,
    NewDocument,
    hash_text,
)
from tests.memory.disk.examples import (
    DIM,
    HEADS,
    LAYERS,
    append,
    check_holds,
    describe,
    draw_entries,
    make_document,
)


def test_a_document_is_read_once(path: Path) -> None:
    folder = MemoryFolder.open(path)
    with pytest.raises(MemoryFolderError, match=r"'a' already, with the same text; leave it out"):
        append(folder, ["d", "a"])
    other = NewDocument("a", 1, 1, hash_text("other"))
    entry = torch.zeros(HEADS, 1, DIM)
    with pytest.raises(MemoryFolderError, match=r"another text; forget it first"):
        folder.append([other], dict.fromkeys(LAYERS, (entry, entry)))
    with pytest.raises(MemoryFolderError, match="two of the documents"):
        append(folder, ["d", "d"])
    check_holds(folder, "abc")


def test_entries_that_do_not_fit_are_refused(path: Path) -> None:
    folder = MemoryFolder.open(path)
    entries = draw_entries("d")
    keys, values = entries[3]
    for wrong in (
        {3: entries[3]},
        entries | {5: entries[3]},
        entries | {3: (keys[:, 1:], values[:, 1:])},
        entries | {3: (keys, values[:1])},
        entries | {3: (keys.unsqueeze(0), values.unsqueeze(0))},
        entries | {3: (keys[..., 1:], values[..., 1:])},
    ):
        with pytest.raises(MemoryFolderError, match=r"this memory has|both must be"):
            folder.append([make_document("d")], wrong)
    for dtype, number in (("int8", torch.inf), ("float16", 1e30), ("bfloat16", torch.nan)):
        other = MemoryFolder.create(path.parent / dtype, describe(dtype))
        keys = entries[7][0].clone()
        keys[1, 0, 5] = number
        with pytest.raises(MemoryFolderError, match=f"layer 7 are NaN or infinite in {dtype}"):
            other.append([make_document("d")], entries | {7: (keys, entries[7][1])})
    check_holds(folder, "abc")
    with pytest.raises(MemoryFolderError, match=r"no entries of layer 5; it has those of \[3, 7\]"):
        folder.open_layer(5)


def test_documents_that_contradict_themselves_are_refused() -> None:
    right = hash_text("abc")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("", 3, 3, right), "needs a name"),
        (("a", 3, 4, right), "at most one entry"),
        (("a", -1, -1, right), "at most one entry"),
        (("a", 3, 3, "abc"), "64 hexadecimal digits"),
        (("a", 3, 3, right, "abd"), "use hash_text"),
        (("a", 3, 3, right, None, [(0, 1)] * 3), "give both or none"),
        (("a", 3, 3, right, "abc", [(0, 1)] * 2), "token_offsets"),
        (("a", 3, 3, right, "abc", [(0, 4)] * 3), "from 0 to 3"),
        (("a", 3, 3, right, "abc", [(-1, 0)] * 3), "from 0 to 3"),
        (("a", 3, 2, right, "abc", None, [0, 3]), "from 0 to 2"),
        (("a", 3, 2, right, "abc", None, [0.0, 1.0]), "whole"),
        (("a", 3, 2, right, "abc", None, [1, 1]), "ascend"),
        (("a", 3, 2, right, "abc", None, [1]), "entry_tokens"),
    ]
    for values, message in cases:
        with pytest.raises(MemoryFolderError, match=message):
            NewDocument(*values)
