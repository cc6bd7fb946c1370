"""What a model has read: how it is kept, and which of it was retrieved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.errors import ConfigError, MemoryFolderError, StateError
from memorizing.huggingface import add_memory, open_memory
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.memory import MemoryFolder
from tests.huggingface.sessions.test_session import (
    DOCUMENTS,
    NUM_ENTRIES,
    QUESTION,
    TOKENIZER,
    ask,
    read_all,
)
from tests.memory.disk.examples import edit_manifest

from ..tools import (
    LAYER,
    SEGMENT_LEN,
    find_model,
    give_memory,
    make_model,
    read,
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
    # Entry 0 is the token after the first three: the start token and two words.
    around = folder.contents.read_around(0, 0)
    assert around.token == DOCUMENTS["first"].split()[2]


@pytest.mark.parametrize("combine", ["joint", "gate"])
def test_sources_name_the_documents_that_were_retrieved(path: Path | None, combine: str):
    model = find_model()
    attachment = give_memory(model, combine=combine, num_neighbors=7)
    told = []
    with open_memory(model, path) as memory:
        read_all(memory)
        with memory.record() as sources, attachment.listen(lambda *args: told.append(args)):
            ask(model)
        assert not attachment.mode.listeners
    # All 41 tokens of 2 rows by 4 heads have memories to attend to.
    assert sum(sources.mass.values()) + sources.own_mass == pytest.approx(2 * 4 * 41, rel=1e-4)
    expected = dict.fromkeys(NUM_ENTRIES, 0.0)
    ends = torch.tensor(list(NUM_ENTRIES.values())).cumsum(0).tolist()
    for _, shares, entries in told:
        for share, entry in zip(shares, entries, strict=True):
            if entry is not None:
                for mass, number in zip(share.flatten(), entry.flatten().tolist(), strict=True):
                    name = list(NUM_ENTRIES)[sum(number >= end for end in ends)]
                    expected[name] += float(mass)
    assert sources.mass == pytest.approx(expected, rel=1e-4)
    assert sources.own_mass > 0
    listed = sources.list()
    assert [name for name, _ in listed] == sorted(expected, key=lambda name: -expected[name])


def test_padding_is_no_source():
    model = find_model()
    give_memory(model)
    tokens = torch.cat([torch.zeros(1, 6, dtype=torch.int64), QUESTION[:1]], 1)
    mask = (tokens != 0).long()
    masses = []
    with open_memory(model) as memory:
        read_all(memory)
        for given, given_mask in ((tokens, mask), (QUESTION[:1], None)):
            with memory.record() as sources, torch.no_grad():
                read(model, given, SEGMENT_LEN, given_mask)
            masses.append(sources.mass)
    assert masses[0] == pytest.approx(masses[1], rel=1e-3)


def test_add_memory_returns_the_model_and_defaults_to_its_window():
    model = find_model()
    assert add_memory(model, [LAYER], window=61) is model
    settings = get_attachment(model).settings
    assert (settings.window, settings.segment_len, settings.distance) == (61, 61, 61)


HOSTILE = {
    "layers that are a number": ("memory", {"layers": 5}),
    "a layer twice": ("memory", {"layers": [LAYER, LAYER]}),
    "no such layer": ("memory", {"layers": [2**60]}),
    "a capacity that fits no machine": ("memory", {"capacity": 2**31 - 1}),
    "a capacity beyond all numbers": ("memory", {"capacity": 10**300}),
    "a window that is a text": ("memory", {"window": "512"}),
    "a distance beyond all positions": ("memory", {"distance": 2**70}),
    "a bias beyond all logits": ("memory", {"bias": 1e308}),
    "an index that is none": ("memory", {"index": "nothing:x=1"}),
    "a setting that is none": ("memory", {"more": 1}),
    "settings that are a list": ("memory", []),
    "gates that are a list": ("heads", []),
    "gates of no layer": ("heads", {}),
    "gates that are texts": ("heads", {str(LAYER): {"bias": "high"}}),
    "gates that are nothing": ("heads", {str(LAYER): None}),
    "gates beyond all numbers": ("heads", {str(LAYER): {"bias": [10**400] * 4}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_settings_that_somebody_wrote_into_a_folder_end_in_an_error_of_ours(
    case: str, tmp_path: Path
):
    model = make_model()
    give_memory(model)
    with open_memory(model, tmp_path / "m") as memory:
        read_all(memory, {"second": DOCUMENTS["second"]})
    key, values = HOSTILE[case]

    def edit(manifest: dict[str, Any]) -> None:
        settings = manifest["settings"]
        whole = key == "heads" or not isinstance(values, dict)
        settings[key] = values if whole else settings[key] | values

    edit_manifest(tmp_path / "m", edit)
    model = make_model()
    with pytest.raises((MemoryFolderError, ConfigError)):
        open_memory(model, tmp_path / "m")
    # Nothing is left of it.
    with pytest.raises(ConfigError, match="has no memory"):
        get_attachment(model)


@pytest.mark.parametrize(("text", "is_kept"), [("", False), ("w5 w6", False), ("w5 w6 w7", True)])
def test_documents_that_leave_nothing_in_memory_are_named(
    path: Path | None, text: str, is_kept: bool
):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        report = read_all(memory, {"short": text, **DOCUMENTS})
        assert report.without_entries == ([] if is_kept else ["short"])
        assert memory.num_entries == report.num_entries == sum(NUM_ENTRIES.values()) + is_kept


def test_reading_tells_every_segment_to_who_asks(path: Path | None):
    model = find_model()
    give_memory(model)
    told: dict[str, list[int]] = {}
    with open_memory(model, path) as memory:

        def tell(name: str, count: int) -> None:
            told.setdefault(name, []).append(count)

        memory.read(TOKENIZER, DOCUMENTS, progress=tell)
    assert {name: sum(counts) for name, counts in told.items()} == {
        "first": 68, "second": 31, "third": 39
    }  # fmt: skip
    assert told["second"] == [13, 13, 5]


def test_recordings_that_overlap_each_see_their_own_calls(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        outer, inner = memory.record(), memory.record()
        first = outer.__enter__()
        ask(model)
        second = inner.__enter__()
        ask(model)
        outer.__exit__(None, None, None)
        ask(model)
        inner.__exit__(None, None, None)
        ask(model)
    assert first.mass == pytest.approx(second.mass, rel=1e-6)
    assert sum(first.mass.values()) + first.own_mass == pytest.approx(2 * 2 * 4 * 41, rel=1e-4)


def test_a_recording_goes_on_when_documents_are_forgotten_and_read(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        with memory.record() as one:
            ask(model)
        memory.forget("first")
        read_all(memory, {"new": "w5 w6 w7 w8 w9 w10 w11"})
        with memory.record() as two:
            ask(model)
    with open_memory(model) as memory:
        read_all(memory)
        with memory.record() as sources:
            ask(model)
            memory.forget("first")
            read_all(memory, {"new": "w5 w6 w7 w8 w9 w10 w11"})
            ask(model)
    names = one.mass.keys() | two.mass.keys()
    expected = {name: one.mass.get(name, 0) + two.mass.get(name, 0) for name in names}
    assert sources.mass == pytest.approx(expected, rel=1e-6)
    assert {"first", "new"} <= sources.mass.keys()


def test_a_model_that_was_moved_under_an_open_memory_is_refused(path: Path | None):
    model = make_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        expected = ask(model)
        layer = model.model.layers[LAYER]
        moved = copy.deepcopy(layer.self_attn.memory.state_dict())
        layer.self_attn.memory.to("meta")
        with pytest.raises(StateError, match="moved to meta while a memory was open on cpu"):
            ask(model)
        layer.self_attn.memory.load_state_dict(moved, assign=True)
        assert torch.equal(ask(model), expected)
