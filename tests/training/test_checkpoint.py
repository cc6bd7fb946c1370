from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memorizing.config import ModelConfig, TokenizerConfig
from memorizing.data import Document, Tokenizer, train_tokenizer
from memorizing.errors import CheckpointError, ResourceError
from memorizing.model import MemorizingTransformer
from memorizing.storage.folders import write_folder
from memorizing.training import Trainer, find_checkpoint, list_checkpoints, load_model, save_model
from memorizing.training.checkpoint import (
    load_training_state,
    load_weights,
    locate_checkpoint,
    prune_checkpoints,
)

MakeTrainer = Callable[..., Trainer]


def make_tokenizer(text: str) -> Tokenizer:
    return train_tokenizer([Document("d", text)], TokenizerConfig(vocab_size=301))


@pytest.fixture
def model(model_config: ModelConfig) -> MemorizingTransformer:
    torch.manual_seed(0)
    return MemorizingTransformer(replace(model_config, vocab_size=307))


@pytest.fixture
def saved(model: MemorizingTransformer, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", model, make_tokenizer("one two one two three"))
    return tmp_path / "model"


def test_a_loaded_model_is_the_saved_one(saved: Path, model: MemorizingTransformer) -> None:
    state = torch.get_rng_state()
    loaded = load_model(saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == model.config
    theirs = loaded.model.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[name], t) for name, t in model.state_dict().items())
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.fingerprint == make_tokenizer("one two one two three").fingerprint
    tokens = torch.arange(7).view(1, 7)
    outputs = [m(tokens, m.init_state(1)).logits for m in (model.eval(), loaded.model)]
    assert torch.equal(*outputs)


def test_a_model_folder_is_a_hugging_face_folder_without_pickle(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"}
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "memorizing_transformer"
    assert config["architectures"] == ["MemorizingTransformerForCausalLM"]
    assert config["bos_token_id"] == 0
    assert config["memory_layers"] == [1]


def test_a_training_checkpoint_adds_json_and_safetensors_only(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(run_dir=tmp_path, optimizer="muon").run(until=2)
    [checkpoint] = list_checkpoints(tmp_path)
    suffixes = {path.suffix for path in checkpoint.iterdir()}
    assert suffixes == {".json", ".safetensors"}
    assert load_model(checkpoint).tokenizer is None  # this run had none


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "manifest.json", "tokenizer.json"]
)
def test_a_truncated_file_is_refused(saved: Path, name: str) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"truncated|unreadable"):
        load_model(saved)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.safetensors", "trainer.json"])
def test_truncated_training_state_is_refused(
    make_trainer: MakeTrainer, tmp_path: Path, name: str
) -> None:
    make_trainer(run_dir=tmp_path).run(until=1)
    [checkpoint] = list_checkpoints(tmp_path)
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=name):
        make_trainer().load(checkpoint)


def test_one_altered_bit_is_refused(saved: Path) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was altered"):
        load_model(saved)


def test_a_missing_file_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no file 'model\.safetensors'"):
        load_model(saved)


def test_a_changed_tokenizer_is_refused(saved: Path) -> None:
    make_tokenizer("other other text text").save(saved)
    with pytest.raises(CheckpointError, match="tokenizer of .* was changed"):
        load_model(saved)


def test_another_tokenizer_is_refused_when_a_run_goes_on(
    saved: Path, model: MemorizingTransformer
) -> None:
    load_weights(saved, model, make_tokenizer("one two one two three"))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_weights(saved, model, make_tokenizer("other other text text"))


def test_weights_of_another_model_are_refused(saved: Path, model_config: ModelConfig) -> None:
    other = MemorizingTransformer(replace(model_config, ffn_dim=41))
    with pytest.raises(CheckpointError, match=r"another model.*feed_forward"):
        load_weights(saved, other)


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "llama"}')

    write_folder(tmp_path / "other", write)
    with pytest.raises(CheckpointError, match="'llama'"):
        load_model(tmp_path / "other")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_model(tmp_path)


def test_a_model_without_training_state_cannot_be_resumed(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trainer\.json"):
        load_training_state(saved)


def test_a_run_stands_for_its_last_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(run_dir=tmp_path, checkpoint_every=2, keep_checkpoints=9).run()
    steps = [path.name for path in list_checkpoints(tmp_path)]
    assert steps == ["step-000002", "step-000004", "step-000006", "step-000007"]
    assert find_checkpoint(tmp_path).name == "step-000007"
    with pytest.raises(CheckpointError, match="never evaluated"):
        find_checkpoint(tmp_path, "best")


def test_an_unfinished_checkpoint_does_not_count_and_goes(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    for name in (".partial-step-000005", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []
    make_trainer(run_dir=tmp_path).run(until=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000002", "step-x"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_and_leaves_the_older_checkpoint(saved: Path) -> None:
    def write(partial: Path) -> None:
        (partial / "a.txt").write_text("fits")
        with Path("/dev/full").open("w") as file:
            file.write("does not")

    with pytest.raises(ResourceError, match="no space left.*unharmed"):
        write_folder(saved, write)
    assert load_model(saved).tokenizer is not None
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_larger_than_the_free_space_is_refused_before_it_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(ResourceError, match="MiB are free"):
        write_folder(tmp_path / "large", lambda folder: None, num_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_whose_deletion_is_stopped_is_none_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        folder = locate_checkpoint(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, 1, None, 99)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [locate_checkpoint(tmp_path, 2)]
    prune_checkpoints(tmp_path, 1, None, 99)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
