"""Models with memory are copied, moved to another dtype, and saved without their memory."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from memorizing.errors import StateError
from memorizing.huggingface import open_memory, remove_memory
from memorizing.huggingface.attaching.attachment import find_attachment, get_attachment, parse_heads
from tests.huggingface.tools import (
    LAYER,
    SEGMENT_LEN,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
)

TOKENS = make_tokens(2, 74)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_a_memory_of_its_own(family: str, way: str):
    model = make_model(family)
    attachment = give_memory(model, bias=0.5)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    other = get_attachment(copied)
    assert other is not attachment
    assert other.model() is copied
    assert other.decoder.base is copied.base_model
    with torch.no_grad(), memory_open(attachment), memory_open(other):
        expected = model(TOKENS).logits
        assert torch.equal(copied(TOKENS).logits, expected)
        other.layers[LAYER].bias += 1.0
        assert not torch.equal(copied(TOKENS).logits, expected)
        assert torch.equal(model(TOKENS).logits, expected)
    remove_memory(copied)
    assert find_attachment(model) is attachment
    with torch.no_grad(), memory_open(attachment):
        assert torch.equal(model(TOKENS).logits, expected)
        assert not torch.equal(copied(TOKENS).logits, expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_model_with_a_memory_open_is_not_copied(way: str):
    model = find_model()
    give_memory(model)
    with open_memory(model), pytest.raises(StateError, match="is not copied with its model"):
        copy.deepcopy(model) if way == "deepcopy" else pickle.dumps(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_may_be_moved_to_another_dtype(dtype: torch.dtype):
    moved, made = make_model(), make_model().to(dtype)
    logits = []
    for model in (moved, made):
        attachment = give_memory(model, bias=0.5, temperature=0.5, search="normalized")
        model.to(dtype)
        with torch.no_grad(), memory_open(attachment):
            logits.append(model(TOKENS).logits)
    assert logits[0].dtype == dtype
    assert attachment.layers[LAYER].bias.dtype == dtype
    difference = (logits[0] - logits[1]).abs().mean()
    assert difference < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_a_model_is_saved_without_its_memory(tmp_path: Path):
    model = make_model()
    model.save_pretrained(tmp_path / "before")
    attachment = give_memory(model, search="normalized", layers=[0, LAYER])
    model.save_pretrained(tmp_path / "with_memory")
    for name in ("config.json", "generation_config.json"):
        before, found = (
            json.loads((tmp_path / folder / name).read_text())
            for folder in ("before", "with_memory")
        )
        assert found == before
    names = []
    for folder in ("before", "with_memory"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with_memory")
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.generation_config.prefill_chunk_size is None
    assert find_attachment(loaded) is None
    with torch.no_grad():
        expected = loaded(TOKENS[:, :SEGMENT_LEN]).logits
        assert torch.equal(model(TOKENS[:, :SEGMENT_LEN]).logits, expected)
    # It still has its memory.
    assert get_attachment(model) is attachment
    assert set(model.state_dict()) - set(loaded.state_dict()) == {
        f"model.layers.{layer}.self_attn.memory.{name}"
        for layer in (0, LAYER)
        for name in ("bias", "log_scale", "key_norm")
    }


def test_weights_of_the_base_model_load_into_one_with_memory():
    model, source = make_model(), make_model()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.1
    give_memory(model, bias=0.25)
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected
    assert all(".memory." in name for name in missing)
    assert get_attachment(model).layers[LAYER].bias.tolist() == [0.25] * 4


def test_gates_are_dumped_and_loaded():
    model = make_model()
    attachment = give_memory(model, layers=[0, LAYER], search="normalized")
    with torch.no_grad():
        attachment.layers[0].bias += torch.arange(4)
    dumped = json.loads(json.dumps(attachment.dump_heads()))
    assert dumped["0"]["bias"] == [0, 1, 2, 3]
    remove_memory(model)
    attachment = give_memory(model, layers=[0, LAYER], search="normalized")
    attachment.load_heads(parse_heads(dumped), "here")
    assert attachment.dump_heads() == dumped


def test_the_fingerprint_follows_the_weights_and_not_the_gates():
    model = make_model()
    attachment = give_memory(model)
    before = attachment.fingerprint()
    with torch.no_grad():
        attachment.layers[LAYER].bias += 1.0
    assert attachment.fingerprint() == before
    with torch.no_grad():
        model.model.layers[LAYER].self_attn.k_proj.weight[0, 0] += 1.0
    assert attachment.fingerprint() != before
