"""Documents of a memory as tokens: those that were read, at the places of their entries."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memorizing.errors import MemoryFolderError
from memorizing.huggingface import open_memory
from memorizing.huggingface.sessions.library import KeptTexts
from tests.huggingface.sessions.tools import (
    DOCUMENTS,
    NUM_ENTRIES,
    TOKENIZER,
    make_tokenizer,
    read_all,
)
from tests.huggingface.tools import NUM_SINKS, find_model, give_memory


@pytest.fixture(params=["folder", "memory alone"])
def store(request: pytest.FixtureRequest, tmp_path):
    model = find_model()
    give_memory(model)
    path = tmp_path / "memory" if request.param == "folder" else None
    memory = open_memory(model, path, keep_text=True)
    read_all(memory)
    return memory._store


def test_entries_are_tokens_of_their_documents(store):
    library = KeptTexts(store, TOKENIZER)
    assert dict(zip(library.names, library.num_entries, strict=True)) == NUM_ENTRIES
    for number, name in enumerate(library.names):
        ids = TOKENIZER(DOCUMENTS[name])["input_ids"]
        places, found = library.read_tokens(number)
        assert places.tolist() == list(range(NUM_SINKS, len(ids)))
        assert found.tolist() == ids[NUM_SINKS:]


def test_without_the_tokenizer_that_read_them_texts_are_refused(store):
    with pytest.raises(MemoryFolderError, match="tokenizer=tokenizer"):
        KeptTexts(store, None)
    with pytest.raises(MemoryFolderError, match="another tokenizer"):
        KeptTexts(store, make_tokenizer(5))


def test_a_text_that_became_other_tokens_is_told(store, monkeypatch):
    library = KeptTexts(store, TOKENIZER)
    first = replace(library._documents[0], num_tokens=99)
    monkeypatch.setattr(library, "_documents", (first, *library._documents[1:]))
    with pytest.raises(MemoryFolderError, match=r"is 68 tokens and was read as 99; use the"):
        library.read_tokens(0)
