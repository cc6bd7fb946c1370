import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from memorizing.errors import (
    CheckpointError,
    ConfigError,
    IndexUnavailableError,
    MemorizingError,
    StateError,
)
from memorizing.huggingface.attaching.attachment import add_memory, get_attachment, remove_memory
from memorizing.huggingface.learning.adapter import load_adapter, save_adapter, train_only
from memorizing.huggingface.learning.lora import add_lora, find_lora, require_peft
from memorizing.huggingface.sessions.opening import open_memory
from tests.memory.disk.killing import fork, kill_before
from tests.training.finetuning.tools import (
    MEMORY,
    SEGMENT_LEN,
    WINDOW,
    make_base,
    make_documents,
    make_gpt2,
    make_model,
    read_alone,
)

TOKENS = make_documents(5 * SEGMENT_LEN + 2)[0].tokens
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj"])


def shake(model: Any, seed: int = 7) -> None:
    """Move gates, scales and LoRA away from where they start."""
    generator = torch.Generator().manual_seed(seed)
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


@pytest.mark.parametrize(
    "lost", [("config.json",), ("model.safetensors",), ("config.json", "model.safetensors")]
)
def test_an_adapter_that_lost_its_lora_is_not_loaded_without_it(
    tmp_path: Path, lost: tuple[str, ...]
):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path)
    for name in lost:
        (tmp_path / f"adapter_{name}").unlink()
    with pytest.raises(CheckpointError, match="has no file 'adapter_"):
        load_adapter(make_base(), tmp_path)
    # Adapters of earlier releases have no manifest; what is left of them tells.
    (tmp_path / "manifest.json").unlink()
    if len(lost) == 1:
        with pytest.raises(CheckpointError, match="has no file 'adapter_"):
            load_adapter(make_base(), tmp_path)


def test_saving_anew_leaves_nothing_of_the_adapter_before(tmp_path: Path):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path)
    save_adapter(make_model(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "memory_settings.json", "memory_heads.safetensors", "manifest.json"
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
    with pytest.raises(CheckpointError, match="is truncated or altered"):
        load_adapter(make_base(), tmp_path)


def test_a_second_lora_is_refused(tmp_path: Path):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="has LoRA already"):
        load_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="has LoRA already"):
        add_lora(model, rank=2, alpha=1.0)


@PEFT_WARNS
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_a_learned_prompt_is_not_left_out_silently(tmp_path: Path, kind: Any):
    wrapped = peft.get_peft_model(make_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="_TUNING of peft; one LoRA can be saved"):
        save_adapter(wrapped, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_without_peft_lora_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(IndexUnavailableError, match=r"pip install \"memorizing\[peft\]\""):
        load_adapter(make_base(), tmp_path)


def test_a_peft_that_transformers_refuses_is_told_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "97.1.0")
    with pytest.raises(IndexUnavailableError, match=r"pip install \"peft>=97.1.0\", or an older"):
        add_lora(make_model(), rank=3, alpha=5.0)


def test_lora_stays_exact_on_a_model_in_bf16():
    model = make_model().bfloat16()
    add_lora(model, rank=3, alpha=5.0)
    train_only(model, memory=True, lora=True)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}
    assert np.isfinite(read(model).float().numpy()).all()


def dump(model: Any) -> dict[str, torch.Tensor]:
    """Gates, scales and LoRA by name."""
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".memory." in name or "lora_" in name
    }


def test_a_kill_at_any_step_leaves_the_old_adapter_or_the_new_one(tmp_path: Path):
    old, new, place = make_model(), make_model(), tmp_path / "adapter"
    for model, seed in ((old, 7), (new, 11)):
        add_lora(model, rank=3, alpha=5.0)
        shake(model, seed)
    save_adapter(old, place)
    (place / "notes.txt").write_text("mine")
    (tmp_path / "before").mkdir()
    found = []
    for step in itertools.count(0, 5):
        child = fork(lambda step=step: (kill_before(step), save_adapter(new, place)))
        status = os.waitpid(child, 0)[1]
        loaded = dump(load_adapter(make_base(), place))
        found.append(all(torch.equal(loaded[name], tensor) for name, tensor in dump(new).items()))
        assert found[-1] or all(
            torch.equal(loaded[name], tensor) for name, tensor in dump(old).items()
        )
        assert (place / "notes.txt").read_text() == "mine"
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert found[-1]
    assert not found[0]
    save_adapter(new, place)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "before"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"layer_replication": [[0, 2**31]]}, "layer_replication"),
        ({"r": 2**40, "rank_pattern": {"(a+)+$": 2**40}}, None),
        ({"target_modules": "(.*.*.*)*q_proj", "layers_pattern": "(a+)+b"}, None),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern"),
        ({"lora_alpha": "5"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"init_lora_weights": "pissa", "auto_mapping": {"parent_library": "os"}}, None),
        ({"peft_type": "PREFIX_TUNING"}, "describes 'PREFIX_TUNING'"),
        ([], "JSON object"),
    ],
)
@pytest.mark.parametrize("is_of_today", [True, False])
def test_somebody_elses_configuration_of_lora_chooses_nothing_but_numbers(
    tmp_path: Path, changes: Any, message: str | None, is_of_today: bool
):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    shake(model)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(changes if isinstance(changes, list) else {**values, **changes}))
    if not is_of_today:
        with pytest.raises(CheckpointError, match="altered"):
            load_adapter(make_base(), tmp_path)
        return
    (tmp_path / "manifest.json").unlink()
    base = make_base()
    before = {name: (id(p), p.requires_grad) for name, p in base.named_parameters()}
    if message is None:
        assert torch.equal(read(load_adapter(base, tmp_path)), read(model))
        return
    with pytest.raises(CheckpointError, match=message):
        load_adapter(base, tmp_path)
    assert {name: (id(p), p.requires_grad) for name, p in base.named_parameters()} == before
    assert not getattr(base, "_hf_peft_config_loaded", False)


@pytest.mark.parametrize("file", ["memory_heads.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, file: str, number: float):
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[1] = number
    save_adapter(model, tmp_path / "bad")
    model = make_model()
    add_lora(model, rank=3, alpha=5.0)
    save_adapter(model, tmp_path / "mixed")
    shutil.copy(tmp_path / "bad" / file, tmp_path / "mixed" / file)
    (tmp_path / "mixed" / "manifest.json").unlink()
    base = make_base()
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_adapter(base, tmp_path / "mixed")
    assert "memorizing" not in base.__dict__
    assert find_lora(base) is None


@pytest.mark.parametrize(
    "changes", [{"intermediate_size": 41}, {"vocab_size": 269}, {"num_key_value_heads": 3}]
)
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path, changes: Any):
    require_peft()
    model = add_memory(make_base(tie_word_embeddings=False), **MEMORY)
    model.add_adapter(
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=3,
            target_modules=["up_proj", "k_proj"],
            modules_to_save=["lm_head"],
        )
    )
    save_adapter(model, tmp_path)
    base = make_base(tie_word_embeddings=False, **changes)
    names = [name for name, _ in base.named_modules()]
    inputs = torch.from_numpy(TOKENS[:WINDOW]).long().unsqueeze(0)
    expected = base(input_ids=inputs).logits
    for _ in range(2):
        with pytest.raises(CheckpointError, match="load it onto"):
            load_adapter(base, tmp_path)
        assert [name for name, _ in base.named_modules()] == names
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert torch.equal(base(input_ids=inputs).logits, expected)
    add_lora(base, rank=2, alpha=1.0)


@pytest.mark.parametrize(
    ("modules", "is_right"), [(["norm"], True), (["self_attn"], False), (["memory"], False)]
)
def test_memory_layers_that_peft_copied_are_refused(
    tmp_path: Path, modules: list[str], is_right: bool
):
    require_peft()
    model = make_model()
    model.add_adapter(
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=3, target_modules=["up_proj"], modules_to_save=modules
        )
    )
    if is_right:
        shake(model)
        save_adapter(model, tmp_path)
        assert torch.equal(read(load_adapter(make_base(), tmp_path)), read(model))
        return
    with pytest.raises(StateError, match="modules_to_save"):
        read(model)
    with pytest.raises(StateError, match="modules_to_save"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "memory",
    [
        {"layers": 3}, {"layers": None}, {"layers": [1], "window": 2**63}, None, 7,
        {"layers": [1], "capacity": 2**53}, {"layers": [1], "bias": "0"},
        {"layers": [1], "index": "scann:num_leaves=1e9"}, {"layers": [2**53]},
    ],
)  # fmt: skip
def test_settings_of_a_memory_that_cannot_work_are_refused(tmp_path: Path, memory: Any):
    save_adapter(make_model(), tmp_path)
    settings = json.loads((tmp_path / "memory_settings.json").read_text())
    (tmp_path / "memory_settings.json").write_text(json.dumps({**settings, "memory": memory}))
    (tmp_path / "manifest.json").unlink()
    base = make_base()
    with pytest.raises(MemorizingError):
        load_adapter(base, tmp_path)
    assert "memorizing" not in base.__dict__
