import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memorizing.data import SegmentLoader
from memorizing.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    NonFiniteLossError,
    ResourceError,
    RunFolderError,
)
from memorizing.huggingface.attaching.attachment import add_memory
from memorizing.huggingface.learning.adapter import load_adapter, save_adapter
from memorizing.huggingface.sessions.session import open_memory
from memorizing.training import read_metrics
from memorizing.training.finetuning import FinetuneSettings, finetune
from memorizing.training.finetuning.finetuner import Finetuner
from memorizing.training.finetuning.run import RESULT_FOLDER
from memorizing.training.optimizer import compute_schedule
from tests.huggingface.tools import CACHE
from tests.training.finetuning.tools import (
    MEMORY,
    SEGMENT_LEN,
    START,
    list_weights,
    make_base,
    make_documents,
    make_gpt2,
    make_model,
    make_tokenizer,
)

DOCUMENTS = make_documents(3 * SEGMENT_LEN, 47, 5 * SEGMENT_LEN + 1, 2)


def make_settings(**changes: Any) -> FinetuneSettings:
    values = {
        "steps": 7, "rows": 2, "lora_rank": 3, "evaluate_every": 0, "warmup_steps": 2,
        "gate_learning_rate": 0.1, "log_every": 1, "checkpoint_every": 3, **changes,
    }  # fmt: skip
    return FinetuneSettings(**values)


def make_tuner(model: Any, *, run_dir: Path | None = None, **changes: Any) -> Finetuner:
    return Finetuner(model, DOCUMENTS, START, make_settings(**changes), run_dir=run_dir)


def test_the_loss_of_one_row_is_that_of_a_loop_by_hand():
    settings = make_settings(train="all", rows=1, steps=13, weight_decay=0.0, clip_norm=0.0)
    tuned, losses = make_model(), []
    Finetuner(
        tuned, DOCUMENTS, START, settings, on_step=lambda m: losses.append(m.nats / m.num_targets)
    ).run()

    model = make_model()
    config = settings.make_training_config()
    gates = [p for name, p in model.named_parameters() if ".memory." in name]
    others = [p for name, p in model.named_parameters() if ".memory." not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "peak": config.learning_rate},
            {"params": gates, "peak": config.gate_learning_rate},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    loader = SegmentLoader(DOCUMENTS, 1, SEGMENT_LEN, START, settings.seed, repeat=True)
    expected: list[float] = []
    with open_memory(model) as memory:
        for step, batch in zip(range(1, 14), loader, strict=False):
            if bool(batch.doc_start[0]):
                cache = memory.new_cache()
            length = int(batch.valid.sum())
            logits = model(input_ids=batch.tokens[:, :length], **{CACHE: cache}).logits
            loss = torch.nn.functional.cross_entropy(logits[0], batch.targets[0, :length])
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * compute_schedule(config, step)
            optimizer.step()
            memory.commit(cache)
            expected.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert losses[-1] != losses[0]


def test_rows_do_not_change_what_a_document_costs():
    documents = make_documents(3 * SEGMENT_LEN, 3 * SEGMENT_LEN, seed=3)
    together: list[float] = []
    settings = make_settings(rows=2, steps=3, learning_rate=1e-12, gate_learning_rate=0.0)
    Finetuner(
        make_model(), documents, START, settings, on_step=lambda m: together.append(m.nats)
    ).run()
    alone = []
    for document in documents:
        nats: list[float] = []
        one = make_settings(rows=1, steps=3, learning_rate=1e-12, gate_learning_rate=0.0)
        Finetuner(
            make_model(), [document], START, one, on_step=lambda m, nats=nats: nats.append(m.nats)
        ).run()
        alone.append(nats)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone).sum(0))


@pytest.mark.parametrize("make", [make_base, make_gpt2])
@pytest.mark.parametrize("train", ["gates", "lora", "all"])
def test_what_is_trained_moves_and_nothing_else(train: str, make: Any):
    model = add_memory(make(), **MEMORY)
    before = list_weights(model)
    make_tuner(model, train=train).run()
    after = list_weights(model)
    moved = {n for n, p in before.items() if not torch.equal(p, _find(after, n))}
    gates = {name for name in before if ".memory." in name}
    assert gates <= moved
    if train == "all":
        assert moved == set(before)
    else:
        assert moved == gates
    lora = {name: p for name, p in after.items() if "lora_B" in name}
    assert bool(lora) == (train == "lora")
    assert all(bool(p.any()) for p in lora.values())


def _find(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """peft renames a weight that it adapts."""
    owner, _, last = name.rpartition(".")
    return weights[name] if name in weights else weights[f"{owner}.base_layer.{last}"]


@pytest.mark.parametrize("train", ["gates", "lora", "all"])
def test_gradient_checkpointing_changes_nothing(train: str):
    found: list[list[tuple[float, float]]] = []
    for is_on in (False, True):
        model, steps = make_model(), []
        if is_on:
            turn_on = getattr(model, "activation_checkpointing_enable", None)
            (turn_on or model.gradient_checkpointing_enable)()
        Finetuner(
            model,
            DOCUMENTS,
            START,
            make_settings(train=train),
            on_step=lambda m, steps=steps: steps.append((m.nats, m.grad_norm)),
        ).run()
        found.append(steps)
    assert found[0] == found[1]


def test_lora_can_begin_with_the_memory_layer():
    model = make_model()
    make_tuner(model, lora_layers="from_memory", steps=1).run()
    layers = {name.split(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert layers == {"1", "2"}


def test_without_capacity_the_memory_does_nothing():
    losses: dict[bool, list[float]] = {}
    for is_open in (True, False):
        found: list[float] = []
        model = make_model(capacity=0) if is_open else make_model()
        tuner = Finetuner(
            model,
            DOCUMENTS,
            START,
            make_settings(train="lora"),
            on_step=lambda m, found=found: found.append(m.nats),
        )
        with tuner.attachment.change_mode(is_reading=is_open):
            tuner.run()
        losses[is_open] = found
    assert losses[True] == losses[False]
    with pytest.raises(ConfigError, match="capacity is 0"):
        make_tuner(make_model(capacity=0), train="gates")


@pytest.mark.parametrize(
    ("train", "dtype"),
    [
        ("gates", torch.float32),
        ("lora", torch.bfloat16),
        ("all", torch.bfloat16),
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_whole_one(tmp_path: Path, train: str, dtype: torch.dtype):
    def make() -> Any:
        return add_memory(make_base().to(dtype), **MEMORY)

    whole, losses = make(), []
    Finetuner(
        whole, DOCUMENTS, START, make_settings(train=train), on_step=lambda m: losses.append(m.nats)
    ).run()
    first = make_tuner(make(), train=train, run_dir=tmp_path)
    tmp_path.mkdir(exist_ok=True)
    first.run(until=4)
    resumed: list[float] = []
    model = make()
    second = Finetuner(
        model,
        DOCUMENTS,
        START,
        make_settings(train=train),
        run_dir=tmp_path,
        on_step=lambda m: resumed.append(m.nats),
    )
    second.load(tmp_path / "checkpoints" / "step-000004")
    second.run()
    assert resumed == losses[4:]
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


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
