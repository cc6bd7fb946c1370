"""What a reader sees of a folder: documents, their texts and places."""

from __future__ import annotations

from pathlib import Path

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
    count_entries,
    describe,
    draw_entries,
    make_document,
    make_folder,
    round_trip,
    write_text,
)


def test_texts_and_the_places_of_tokens_in_them_are_kept_if_given(tmp_path: Path) -> None:
    folder = MemoryFolder.create(tmp_path, describe())
    append(folder, ["a", "b"], keep_text=True)
    append(folder, ["c"])
    append(folder, ["d"], keep_text=True)
    check_holds(folder, ["a", "b", "c", "d"])
    contents = MemoryFolder.open(tmp_path).contents
    assert contents.read_text("d") == write_text("d")
    first, text = count_entries("a"), write_text("b")
    of_a, of_b, of_c, _ = contents.documents
    spans = contents.read_spans(of_b)
    assert spans is not None
    assert len(spans) == count_entries("b")
    assert text[slice(*spans[1].tolist())] == write_text("b")[2:4]
    assert len(contents.read_spans(of_a)) == first
    assert contents.read_spans(of_c) is None
    for name, message in (("c", "did not keep the text"), ("e", "holds no document")):
        with pytest.raises(MemoryFolderError, match=message):
            contents.read_text(name)


def test_a_text_may_be_kept_without_the_places_of_its_tokens(tmp_path: Path) -> None:
    folder = MemoryFolder.create(tmp_path, describe())
    text = "a lone surrogate: \udc80"
    documents = [
        NewDocument("empty", 0, 0, hash_text(""), ""),
        NewDocument("text", 5, 0, hash_text(text), text),
    ]
    nothing = torch.empty(HEADS, 0, DIM)
    folder.append(documents, dict.fromkeys(LAYERS, (nothing, nothing)))
    append(folder, ["a"], keep_text=True)
    assert folder.contents.read_text("text") == text
    assert folder.contents.read_text("empty") == ""
    assert folder.contents.document_of(torch.tensor([0])).tolist() == [2]
    assert MemoryFolder.open(tmp_path).documents == folder.documents


def test_entries_know_their_documents_and_tokens(tmp_path: Path) -> None:
    folder = MemoryFolder.create(tmp_path, describe())
    numbers = torch.arange(11.0).view(1, 11, 1).expand(HEADS, 11, DIM)
    documents = [
        NewDocument("a", 7, 3, hash_text("a"), entry_tokens=[1, 4, 6]),
        NewDocument("nothing", 5, 0, hash_text("")),
        NewDocument("b", 13, 8, hash_text("b")),
    ]
    folder.append(documents, dict.fromkeys(LAYERS, (numbers, numbers)))
    entries = torch.tensor([[2, 3], [10, 0]])
    assert folder.contents.document_of(entries).tolist() == [[0, 2], [2, 0]]
    assert folder.contents.token_of(entries).tolist() == [[6, 0], [7, 1]]
    for wrong in (-1, 11):
        with pytest.raises(MemoryFolderError, match="those from 0 to 10"):
            folder.contents.document_of(torch.tensor([wrong]))


def test_documents_are_found_by_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, ["a", "b"])
    found = folder.contents.find_document("b")
    assert found is not None
    assert found.sha256 == make_document("b").sha256
    assert folder.contents.find_document("c") is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_entries_of_a_document_are_read_one_by_one_in_all_layers(
    dtype: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, ["a", "b"], ["c"], dtype=dtype)
    seen = folder.contents
    folder.forget("a")
    for contents in (folder.contents, seen):
        for name in ("b", "c"):
            document = contents.find_document(name)
            assert document is not None
            numbers = torch.tensor([0, 2, count_entries(name) - 1])
            found = dict(contents.read_entries(document, numbers))
            assert list(found) == list(LAYERS)
            for layer, parts in found.items():
                for part, vectors in zip(parts, draw_entries(name)[layer], strict=True):
                    assert part.shape == (HEADS, 3, DIM)
                    wanted = round_trip(vectors[:, numbers], dtype)
                    assert torch.equal(part.to(wanted.dtype), wanted)
