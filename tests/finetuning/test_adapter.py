import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from memorizing.errors import CheckpointError, ConfigError, IndexUnavailableError
from memorizing.huggingface.attaching.attachment import add_memory, get_attachment, remove_memory
from memorizing.huggingface.learning.adapter import (
    add_lora,
    find_lora,
    load_adapter,
    save_adapter,
    train_only,
)
from memorizing.huggingface.sessions.session import open_memory

from .tools import (
    MEMORY,
    SEGMENT_LEN,
    WINDOW,
    make_base,
    make_documents,
    make_gpt2,
    make_model,
    one_thread,
    read_alone,
)

__all__ = ["one_thread"]
TOKENS = make_documents(5 * SEGMENT_LEN + 2)[0].tokens
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"])


def shake(model: Any) -> None:
    """Move gates, scales and LoRA away from where they start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".memory." in name or "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def read(model: Any) -> torch.Tensor:
    with open_memory(model) as memory:
        return read_alone(model, TOKENS, memory)


@pytest.mark.parametrize("make", [make_base, make_gpt2])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("combine", ["joint", "gate"])
def test_a_saved_adapter_on_the_base_gives_the_same_logits(
    tmp_path: Path, make: Any, lora: bool, combine: str
):
    model = add_memory(make(), **MEMORY, combine=combine, bias=0.7, temperature=1.3)
    if lora:
        add_lora(model, rank=3, alpha=5.0)
    shake(model)
    expected = read(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(make(), tmp_path)
    assert torch.equal(read(loaded), expected)
    assert get_attachment(loaded).settings == get_attachment(model).settings
    assert not torch.equal(read(add_memory(make(), **MEMORY)), expected)
    assert bool(find_lora(loaded)) == lora
    assert (tmp_path / "adapter_model.safetensors").exists() == lora


@PEFT_WARNS
def test_peft_loads_its_part_by_itself(tmp_path: Path):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    shake(model)
    save_adapter(model, tmp_path)
    remove_memory(model)
    inputs = torch.from_numpy(TOKENS[:WINDOW]).long().unsqueeze(0)
    alone = peft.PeftModel.from_pretrained(make_base(), str(tmp_path))
    assert torch.equal(alone(input_ids=inputs).logits, model(input_ids=inputs).logits)
    assert not torch.equal(alone(input_ids=inputs).logits, make_base()(input_ids=inputs).logits)


@PEFT_WARNS
def test_memory_before_peft_and_after_it_compute_the_same(tmp_path: Path):
    before = peft.get_peft_model(add_memory(make_base(), **MEMORY), LORA)
    after = peft.get_peft_model(make_base(), LORA)
    add_memory(after, **MEMORY)
    for model in (before, after):
        shake(model)
    expected = read(before)
    assert torch.equal(read(after), expected)
    save_adapter(before, tmp_path / "before")
    save_adapter(after, tmp_path / "after")
    for name in ("before", "after"):
        assert torch.equal(read(load_adapter(make_base(), tmp_path / name)), expected)


def test_an_adapter_loads_onto_a_memory_that_is_there(tmp_path: Path):
    model = make_model()
    shake(model)
    save_adapter(model, tmp_path)
    larger = load_adapter(make_model(capacity=29), tmp_path, capacity=29)
    assert get_attachment(larger).settings.capacity == 29
    other = make_model(window=13)
    with pytest.raises(ConfigError, match="window is 13 and should be 11"):
        load_adapter(other, tmp_path)
    with pytest.raises(ConfigError, match="got window"):
        load_adapter(make_base(), tmp_path, window=13)


def test_saving_anew_leaves_nothing_of_the_adapter_before(tmp_path: Path):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path)
    save_adapter(make_model(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "memory_settings.json", "memory_heads.safetensors"
    }  # fmt: skip


def test_an_adapter_may_be_trained_on(tmp_path: Path):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path)
    loaded = load_adapter(make_base(), tmp_path, is_trainable=True)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in loaded.named_parameters() if ".memory." in name or "lora_" in name
    }
    assert not any(
        p.requires_grad for n, p in load_adapter(make_base(), tmp_path).named_parameters()
        if "lora_" in n
    )  # fmt: skip


def test_what_is_no_adapter_of_this_model_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is no adapter"):
        load_adapter(make_base(), tmp_path)
    save_adapter(make_model(), tmp_path)
    with pytest.raises(CheckpointError, match="num_layers = 3"):
        load_adapter(make_base(num_hidden_layers=2), tmp_path)
    with pytest.raises(CheckpointError, match="model_type = 'llama'"):
        load_adapter(make_gpt2(), tmp_path)
    wide = make_base(num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(CheckpointError, match=r"is \(3,\), expected \(2,\)"):
        load_adapter(wide, tmp_path)
    assert "memorizing" not in wide.__dict__
    settings = json.loads((tmp_path / "memory_settings.json").read_text())
    (tmp_path / "memory_settings.json").write_text(json.dumps({**settings, "format_version": 9}))
    with pytest.raises(CheckpointError, match="format version 9"):
        load_adapter(make_base(), tmp_path)
    (tmp_path / "memory_settings.json").write_text(json.dumps({**settings, "memory": {"k": 1}}))
    with pytest.raises(CheckpointError, match="does not describe a memory"):
        load_adapter(make_base(), tmp_path)
    (tmp_path / "memory_settings.json").write_text(json.dumps(settings))
    (tmp_path / "memory_heads.safetensors").write_bytes(b"1234567")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(make_base(), tmp_path)


def test_a_second_lora_is_refused(tmp_path: Path):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="has LoRA already"):
        load_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="has LoRA already"):
        add_lora(model, rank=2, alpha=1.0)


def test_without_peft_lora_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(IndexUnavailableError, match=r"pip install \"memorizing\[peft\]\""):
        load_adapter(make_base(), tmp_path)


def test_lora_stays_exact_on_a_model_in_bf16():
    model = make_model().bfloat16()
    add_lora(model, rank=3, alpha=5.0)
    train_only(model, memory=True, lora=True)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}
    assert np.isfinite(read(model).float().numpy()).all()
