"""A finetuning in its run folder: what it saves, and what an overwriting that fails leaves."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memorizing.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    NonFiniteLossError,
    ResourceError,
    RunFolderError,
)
from memorizing.huggingface.learning.adapter import load_adapter, save_adapter
from memorizing.training import read_metrics
from memorizing.training.finetuning import finetune
from memorizing.training.finetuning.run import RESULT_FOLDER
from tests.training.finetuning.test_finetuner import DOCUMENTS, make_settings, make_tuner
from tests.training.finetuning.tools import (
    list_weights,
    make_base,
    make_documents,
    make_model,
    make_tokenizer,
)


def test_a_run_folder_describes_itself_and_holds_the_adapter(tmp_path: Path):
    run_dir = tmp_path / "run"
    settings = make_settings(evaluate_every=3, evaluate_tokens=37)
    arguments = (make_tokenizer(), DOCUMENTS, settings, run_dir)
    held_out = make_documents(61, seed=5)
    result = finetune(make_model(), *arguments, validation=held_out, progress=False)
    assert result.steps == 7
    assert result.validation_nats is not None
    lines = read_metrics(run_dir / "metrics.jsonl")
    validation = [line["validation"] for line in lines if "validation" in line]
    assert [line["step"] for line in lines if "validation" in line] == [3, 6, 7]
    assert validation[0]["tokens"] == validation[0]["off"]["tokens"] == 37
    assert validation[0]["nats_per_token"] != validation[0]["off"]["nats_per_token"]
    heads = [line["train"]["heads"]["1"]["bias"] for line in lines if "train" in line]
    assert len(heads) == 7
    assert heads[0] != heads[-1]
    assert {p.name for p in (run_dir / RESULT_FOLDER).iterdir()} == {
        "memory_settings.json", "memory_heads.safetensors",
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    }  # fmt: skip
    with pytest.raises(RunFolderError, match="--resume"):
        finetune(make_model(), *arguments, validation=held_out, progress=False)
    with pytest.raises(ConfigError, match=r"memory\.window was 11 and is 13"):
        finetune(
            make_model(window=13), *arguments, validation=held_out, progress=False, resume=True
        )
    with pytest.raises(CheckpointError, match="base ="):
        finetune(make_model(1), *arguments, validation=held_out, progress=False, resume=True)


def test_the_whole_model_is_saved_so_that_it_loads(tmp_path: Path):
    model = make_model()
    finetune(
        model,
        make_tokenizer(),
        DOCUMENTS,
        make_settings(train="all"),
        tmp_path / "run",
        progress=False,
    )
    folder = tmp_path / "run" / RESULT_FOLDER
    assert "prefill_chunk_size" not in (folder / "generation_config.json").read_text()
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(folder), folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    half = load_adapter(AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16"), folder)
    assert half.dtype == torch.bfloat16
    text = "two (<s>) words"
    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert tokens == make_tokenizer()(text)["input_ids"]


def test_gates_are_not_loaded_onto_other_weights_than_they_were_trained_with(tmp_path: Path):
    folder = tmp_path / RESULT_FOLDER
    settings = make_settings(train="all", steps=1)
    finetune(make_model(), make_tokenizer(), DOCUMENTS, settings, tmp_path, progress=False)
    copied = tmp_path / "elsewhere"
    shutil.copytree(folder, copied)
    (copied / "manifest.json").unlink()
    last = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        last.model.norm.weight[-1] += 1e-3
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    for make in (make_base, make_model, lambda: make_base().bfloat16(), lambda: last):
        for place in (folder, copied, checkpoint):
            model = make()
            before, had_memory = list_weights(model), "memorizing" in model.__dict__
            with pytest.raises(CheckpointError, match=r"holds all weights.* load the model from"):
                load_adapter(model, place)
            assert ("memorizing" in model.__dict__) == had_memory
            assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    for one in (model, make_base()):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
            load_adapter(one, folder)


def test_an_adapter_beside_its_base_model_is_loaded_onto_it(tmp_path: Path):
    make_base().save_pretrained(tmp_path)
    model = make_model()
    make_tuner(model, train="gates", steps=1).run()
    save_adapter(model, tmp_path)
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def read_all(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def break_norm(model: Any) -> Any:
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
    return model


@pytest.mark.parametrize(
    ("make", "settings", "error"),
    [
        (lambda: make_model(capacity=0), {"train": "gates"}, ConfigError),
        (lambda: break_norm(make_model()), {"train": "all"}, NonFiniteLossError),
        (make_model, {"train": "lora", "min_document_tokens": 10**6}, CorpusError),
        (lambda: make_model(capacity=2**31 - 1), {"train": "gates", "rows": 101}, ResourceError),
    ],
)
def test_an_overwriting_that_fails_leaves_the_old_run_as_it_was(
    tmp_path: Path, make: Any, settings: dict[str, Any], error: type[Exception]
):
    run, arguments = tmp_path / "run", (make_tokenizer(), DOCUMENTS)
    gates = make_settings(train="gates", steps=2)
    finetune(make_model(), *arguments, gates, run, progress=False)
    before = read_all(run)
    with pytest.raises(error):
        finetune(make(), *arguments, make_settings(**settings), run, progress=False, overwrite=True)
    assert read_all(run) == before
    longer = make_settings(train="gates", steps=3, learning_rate=1e-3)
    result = finetune(
        make_model(), *arguments, longer, tmp_path / "run", progress=False, resume=True
    )
    assert result.steps == 3


def test_a_new_run_replaces_the_adapter_of_the_old_one(tmp_path: Path):
    arguments = (make_tokenizer(), DOCUMENTS)
    for train in ("lora", "gates"):
        settings = make_settings(train=train, steps=1)
        finetune(
            make_model(), *arguments, settings, tmp_path, progress=False, overwrite=train == "gates"
        )
    assert not (tmp_path / RESULT_FOLDER / "adapter_model.safetensors").exists()
    assert (tmp_path / RESULT_FOLDER / "memory_heads.safetensors").is_file()
