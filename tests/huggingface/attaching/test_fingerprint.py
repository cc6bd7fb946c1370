"""What tells the model that wrote a memory from others, and what does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from memorizing.errors import MemoryFolderError
from memorizing.huggingface import open_memory
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.attaching.fingerprint import hash_model
from memorizing.huggingface.learning.lora import require_peft
from memorizing.memory import MemoryFolder
from tests.huggingface.sessions.tools import DOCUMENTS, TOKENIZER
from tests.huggingface.tools import (
    VOCAB_SIZE,
    give_memory,
    make_model,
)

PEFT_WARNS = pytest.mark.filterwarnings("ignore::UserWarning")


def write_memory(model: Any, path: Path) -> None:
    with open_memory(model, path) as memory:
        memory.read(TOKENIZER, {"first": DOCUMENTS["first"]}, progress=False)


def is_refused(model: Any, path: Path) -> bool:
    try:
        open_memory(model, path)
    except MemoryFolderError:
        return True
    return False


def scale_data(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.03)


def step_fused(model: Any) -> None:
    weight = model.model.layers[1].self_attn.k_proj.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.01, fused=True).step()


def change_embedding(model: Any) -> None:
    model.model.embed_tokens.weight.data[5] += 0.1


@pytest.mark.parametrize("change", [scale_data, step_fused, change_embedding])
def test_a_model_whose_weights_changed_does_not_read_what_others_wrote(
    tmp_path: Path, change: Callable[[Any], None]
):
    model, same = make_model(), make_model()
    for one in (model, same):
        give_memory(one)
    write_memory(model, tmp_path / "before")
    change(model)
    assert is_refused(model, tmp_path / "before")
    assert not is_refused(same, tmp_path / "before")
    # And what it reads now is its own, also after it was loaded anew.
    write_memory(model, tmp_path / "after")
    change(same)
    assert not is_refused(same, tmp_path / "after")


@PEFT_WARNS
def test_adapters_count_where_they_are_in_force(tmp_path: Path):
    require_peft()

    def switch(model: Any, state: str) -> None:
        layers = [one for one in model.modules() if isinstance(one, peft.tuners.lora.Linear)]
        for layer in layers:
            layer.scale_layer(3.0) if state == "scaled" else None
            layer.merge() if state == "merged" else None
            layer.enable_adapters(state != "off")

    states = ("without", "off", "on", "scaled", "merged")
    models = {}
    for state in states:
        model = models[state] = make_model()
        if state != "without":
            torch.manual_seed(3)
            model.add_adapter(
                peft.LoraConfig(task_type="CAUSAL_LM", r=3, init_lora_weights=False, lora_alpha=5)
            )
            switch(model, state)
        give_memory(model)
        write_memory(model, tmp_path / state)
    same = {("without", "off"), ("off", "without"), *((state, state) for state in states)}
    for reader, model in models.items():
        for writer in states:
            assert is_refused(model, tmp_path / writer) == ((reader, writer) not in same)


@pytest.mark.parametrize("writer_rows", [VOCAB_SIZE, VOCAB_SIZE + 1, 128])
@pytest.mark.parametrize("reader_rows", [VOCAB_SIZE, VOCAB_SIZE + 1, 128])
def test_tokens_that_were_added_do_not_matter(tmp_path: Path, writer_rows: int, reader_rows: int):
    writer, reader = make_model(), make_model()
    for model, rows in ((writer, writer_rows), (reader, reader_rows)):
        if rows != VOCAB_SIZE:
            model.resize_token_embeddings(rows, mean_resizing=False)
        give_memory(model)
    write_memory(writer, tmp_path / "memory")
    assert not is_refused(reader, tmp_path / "memory")
    change_embedding(reader)
    assert is_refused(reader, tmp_path / "memory")


@pytest.mark.parametrize(
    ("writer", "reader", "is_right"),
    [
        (torch.float32, torch.float16, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.float16, False),
        (torch.float16, torch.bfloat16, False),
    ],
)
def test_a_checkpoint_is_known_in_another_dtype_or_the_message_says_which(
    tmp_path: Path, writer: torch.dtype, reader: torch.dtype, is_right: bool
):
    first = make_model().to(writer)
    give_memory(first, dtype="float16")
    write_memory(first, tmp_path / "memory")
    second = make_model().to(reader)
    give_memory(second, dtype="float16")
    if is_right:
        open_memory(second, tmp_path / "memory")
        scale_data(second)
        assert is_refused(second, tmp_path / "memory")
    else:
        seen = str(writer).removeprefix("torch.")
        with pytest.raises(MemoryFolderError, match=rf"in \['{seen}'\].*in float32"):
            open_memory(second, tmp_path / "memory")


def make_old(model: Any, path: Path) -> None:
    """Make of a folder one of the first format."""
    attachment, folder = get_attachment(model), MemoryFolder.open(path)
    settings = {k: v for k, v in folder.description.settings.items() if k != "fingerprint"}
    folder.describe(hash_model(attachment.decoder, attachment.settings), settings)


def test_a_folder_of_the_first_format_opens_with_a_warning_until_it_is_written(tmp_path: Path):
    model, path = make_model(), tmp_path / "memory"
    give_memory(model)
    write_memory(model, path)
    make_old(model, path)
    with pytest.warns(UserWarning, match="older release") as told:
        memory = open_memory(model, path)
    assert len(told) == 1
    scale_data(model)
    assert is_refused(model, path)
    model = make_model()
    give_memory(model)
    memory.read(TOKENIZER, DOCUMENTS, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_memory(model, path).documents) == 3
    scale_data(model)
    assert is_refused(model, path)


def test_a_fingerprint_may_be_computed_once_for_many_memories(tmp_path: Path):
    model = make_model()
    give_memory(model)
    known = get_attachment(model).fingerprint()
    with open_memory(model, tmp_path / "memory", fingerprint=known) as memory:
        memory.read(TOKENIZER, DOCUMENTS, progress=False)
    open_memory(model, tmp_path / "memory")
    open_memory(model, tmp_path / "memory", fingerprint=known)
    with pytest.raises(MemoryFolderError, match="configuration differs"):
        open_memory(model, tmp_path / "memory", fingerprint={**known, "config": "another"})


def test_weights_that_are_not_there_are_refused(tmp_path: Path):
    model = make_model()
    give_memory(model)
    model.model.layers[0].to("meta")
    with pytest.raises(ValueError, match="meta device"):
        open_memory(model, tmp_path / "memory")


def test_where_a_weight_lies_in_memory_does_not_matter():
    model = make_model().to(torch.bfloat16)
    attachment = give_memory(model)
    expected = attachment.fingerprint()
    for parameter in model.parameters():
        held = torch.empty(parameter.numel() + 3, dtype=parameter.dtype)
        held[3:] = parameter.data.flatten()
        parameter.data = held[3:].view(parameter.shape)
    assert attachment.fingerprint() == expected
