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
from tests.huggingface.sessions.tools import (
    DOCUMENTS,
    ask,
    read_all,
)
from tests.huggingface.tools import (
    LAYER,
    find_model,
    give_memory,
    make_model,
)
from tests.memory.disk.examples import edit_manifest


def test_add_memory_returns_the_model_and_defaults_to_its_window():
    model = find_model()
    assert add_memory(model, [LAYER], window=61, read="entries") is model
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
