"""Where what was read is kept: in a folder, or only as long as it lives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from memorizing.errors import MemoryFolderError
from memorizing.huggingface import open_memory
from memorizing.memory import MemoryFolder
from tests.huggingface.sessions.tools import (
    DOCUMENTS,
    ask,
    read_all,
)
from tests.huggingface.tools import (
    find_model,
    give_memory,
)


def test_saving_nothing_or_over_something_is_refused(path: Path | None, tmp_path: Path):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        with pytest.raises(MemoryFolderError, match="nothing was read"):
            memory.save(tmp_path / "saved.memory")
        read_all(memory)
        memory.save(tmp_path / "saved.memory")
        with pytest.raises(MemoryFolderError):
            memory.save(tmp_path / "saved.memory")


def test_a_memory_is_saved_in_other_dtypes(tmp_path: Path):
    model = find_model()
    give_memory(model)
    with open_memory(model) as memory:
        read_all(memory)
        exact = ask(model)
        errors = {}
        for dtype in ("float32", "bfloat16", "int8"):
            memory.save(tmp_path / dtype, dtype=dtype)
    for dtype in ("float32", "bfloat16", "int8"):
        with open_memory(model, tmp_path / dtype):
            errors[dtype] = float((ask(model) - exact).abs().mean())
    assert errors["float32"] == 0
    assert 0 < errors["bfloat16"] < errors["int8"] < 0.2
    with open_memory(model, tmp_path / "new", dtype="int8") as memory:
        read_all(memory)
        with pytest.raises(MemoryFolderError, match="cannot be in float32"):
            memory.save(tmp_path / "other", dtype="float32")
    assert MemoryFolder.open(tmp_path / "new").description.dtype == "int8"


def test_texts_are_kept_where_asked_for(tmp_path: Path):
    model = find_model()
    give_memory(model)
    for keep_text in (False, True):
        path = tmp_path / str(keep_text)
        with open_memory(model, path, keep_text=keep_text) as memory:
            read_all(memory)
        folder = MemoryFolder.open(path)
        assert all((document.text is not None) == keep_text for document in folder.documents)
    # The start token has no characters.
    spans = folder.contents.read_spans(folder.documents[0])
    text = DOCUMENTS["first"]
    assert [text[slice(*span)] for span in spans.tolist()] == ["", *text.split()]


def test_a_folder_and_no_folder_give_the_same_logits(tmp_path: Path):
    model = find_model()
    give_memory(model)
    found = []
    for path in (None, tmp_path / "a.memory"):
        with open_memory(model, path) as memory:
            read_all(memory)
            found.append(ask(model))
    with open_memory(model, tmp_path / "a.memory") as memory:
        found.append(ask(model))
        memory.save(tmp_path / "b.memory")
    with open_memory(model) as memory:
        read_all(memory)
        memory.save(tmp_path / "c.memory")
    for name in ("b", "c"):
        with open_memory(model, tmp_path / f"{name}.memory"):
            found.append(ask(model))
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_document_is_forgotten(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory, {name: DOCUMENTS[name] for name in ("first", "third")})
        expected = ask(model)
    if path is not None:
        shutil.rmtree(path)
    with open_memory(model, path) as memory:
        read_all(memory)
        assert not torch.equal(ask(model), expected)
        memory.forget("second")
        assert [document.name for document in memory.documents] == ["first", "third"]
        assert torch.equal(ask(model), expected)
        with pytest.raises(MemoryFolderError, match="no document 'second'"):
            memory.forget("second")
