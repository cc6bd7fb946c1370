"""What a model has read: what an open memory refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memorizing.errors import ConfigError, MemoryFolderError, StateError
from memorizing.huggingface import open_memory, remove_memory
from memorizing.huggingface.attaching.attachment import get_attachment
from tests.huggingface.sessions.tools import (
    DOCUMENTS,
    QUESTION,
    ask,
    make_tokenizer,
    read_all,
)
from tests.huggingface.tools import (
    CACHE,
    LAYER,
    call,
    find_model,
    give_memory,
    make_model,
)


def test_another_text_of_the_same_name_is_refused(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory, {"first": DOCUMENTS["first"]})
        with pytest.raises(MemoryFolderError, match="'first' with another text"):
            read_all(memory, {"first": DOCUMENTS["second"]})
        twice = [("third", DOCUMENTS["third"]), ("third", DOCUMENTS["third"])]
        assert read_all(memory, twice).skipped == ["third"]
        with pytest.raises(MemoryFolderError, match="'new' with another text"):
            read_all(memory, [("new", "w5 w6 w7 w8 w9"), ("new", "w9")])
        assert [document.name for document in memory.documents] == ["first", "third", "new"]


def test_another_tokenizer_is_refused(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        with pytest.raises(MemoryFolderError, match="another tokenizer"):
            memory.read(make_tokenizer(first=4), DOCUMENTS, progress=False)


def test_another_model_or_another_memory_is_refused(tmp_path: Path):
    model, path = make_model(), tmp_path / "a.memory"
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
    remove_memory(model)
    for settings, words in (
        ({"layers": [2]}, r"layers \[1\], and this model's memory layers are \[2\]"),
        ({"num_sinks": 0}, "with num_sinks = 3, and here it is 0"),
        ({"search": "normalized"}, "with search = 'inner_product', and here it is 'normalized'"),
    ):
        give_memory(model, **settings)
        with pytest.raises(MemoryFolderError, match=words):
            open_memory(model, path)
        remove_memory(model)
    # Settings that do not change what is stored may differ, and so may the dtype of the weights.
    give_memory(model, num_neighbors=2, combine="gate", bias=1.0, capacity=31)
    open_memory(model, path)
    model.to(torch.bfloat16).to(torch.float32)
    open_memory(model, path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(MemoryFolderError, match="another model"):
        open_memory(model, path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] -= 0.5
        # Above the last memory layer nothing reaches the entries.
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 0.5
    open_memory(model, path)


def test_a_model_without_memory_gets_that_of_the_folder(tmp_path: Path):
    model, path = find_model(), tmp_path / "a.memory"
    attachment = give_memory(model, layers=[0, LAYER], temperature=0.5, bias=0.3)
    with torch.no_grad():
        attachment.layers[0].bias += torch.arange(4) * 0.2
    with open_memory(model, path) as memory:
        read_all(memory)
        expected = ask(model)
    settings = attachment.settings
    remove_memory(model)
    with open_memory(model, path):
        assert get_attachment(model).settings == settings
        assert torch.equal(ask(model), expected)


def test_passages_that_other_heads_shall_find_are_said(tmp_path: Path):
    model, path = find_model(), tmp_path / "a.memory"
    settings = {"read": "passages", "num_passages": 2, "passage_len": 11}
    give_memory(model, heads={LAYER: [0, 2]}, **settings)
    with open_memory(model, path) as memory:
        read_all(memory)
    open_memory(model, path)
    remove_memory(model)
    # The folder's own are taken over.
    open_memory(model, path)
    assert get_attachment(model).layers[LAYER].list_open() == [True, False, True, False]
    remove_memory(model)
    give_memory(model, **settings)
    with pytest.warns(UserWarning, match=r"that layer 1, heads 0, 2 find, and here it is layer 1"):
        open_memory(model, path)


def test_a_folder_that_is_refused_leaves_the_model_without_memory(tmp_path: Path):
    model, path = find_model(), tmp_path / "a.memory"
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
    remove_memory(model)
    other = make_model("qwen3")
    with pytest.raises(MemoryFolderError, match="another model"):
        open_memory(other, path)
    with pytest.raises(ConfigError, match="has no memory"):
        get_attachment(other)
    with pytest.raises(ConfigError, match="has no memory"):
        open_memory(model, tmp_path / "new.memory")
    (tmp_path / "file").write_text("no memory")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("no memory")
    for name in ("file", "full"):
        with pytest.raises(MemoryFolderError):
            open_memory(model, tmp_path / name)


def test_two_memories_at_once_are_refused():
    model = find_model()
    give_memory(model)
    with open_memory(model) as memory:
        with pytest.raises(StateError, match="open already"), open_memory(model):
            pass
        with pytest.raises(StateError, match="open already"), memory:
            pass
        # It is still open.
        assert get_attachment(model).is_bound
    with memory:
        pass


def test_a_memory_that_is_kept_only_as_long_as_it_lives_can_be_entered_again():
    model = find_model()
    give_memory(model)
    memory = open_memory(model)
    read_all(memory)
    with memory:
        first = ask(model)
    without = ask(model)
    with memory:
        assert torch.equal(ask(model), first)
    assert not torch.equal(first, without)


def test_a_cache_ends_with_the_memory_that_was_open():
    model = find_model()
    give_memory(model)
    with torch.no_grad():
        with open_memory(model) as memory:
            cache = memory.new_cache()
            call(model, QUESTION[:, :5], cache)
        with open_memory(model) as memory:
            with pytest.raises(StateError, match="no memory knows"):
                call(model, QUESTION[:, 5:9], cache)
            with pytest.raises(StateError, match="new_cache"):
                memory.commit(cache)
        cache = model(QUESTION[:, :5])[CACHE]
        with open_memory(model), pytest.raises(StateError, match="no memory knows"):
            call(model, QUESTION[:, 5:9], cache)
