"""A model with memory inside of what torch, accelerate and peft do with models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memorizing.errors import ConfigError, MemoryFolderError, StateError
from memorizing.huggingface import add_memory, open_memory, remove_memory
from memorizing.huggingface.attaching.attachment import find_attachment, get_attachment
from memorizing.huggingface.learning.lora import require_peft
from tests.huggingface.sessions.tools import DOCUMENTS, TOKENIZER
from tests.huggingface.tools import (
    CACHE,
    CAPACITY,
    LAYER,
    NUM_NEIGHBORS,
    NUM_SINKS,
    SEGMENT_LEN,
    WINDOW,
    find_model,
    give_memory,
    make_model,
    make_tokens,
)

PROMPT = make_tokens(2, 41, seed=11)
SETTINGS: dict[str, Any] = {
    "layers": [LAYER],
    "read": "entries",
    "window": WINDOW,
    "segment_len": SEGMENT_LEN,
    "num_sinks": NUM_SINKS,
    "num_neighbors": NUM_NEIGHBORS,
    "capacity": CAPACITY,
}


def generate(model: Any, **settings: Any) -> Tensor:
    return model.generate(PROMPT, max_new_tokens=5, do_sample=False, pad_token_id=0, **settings)


def answer(model: Any) -> Tensor:
    with open_memory(model):
        return generate(model)


@pytest.mark.parametrize("search", ["inner_product", "normalized"])
def test_what_is_made_in_inference_mode_can_be_trained(search: str):
    model = make_model()
    with torch.inference_mode():
        add_memory(model, search=search, **SETTINGS)
        memory = open_memory(model)
        memory.__enter__()
        memory.read(TOKENIZER, DOCUMENTS, progress=False)
    model(PROMPT[:, :SEGMENT_LEN], labels=PROMPT[:, :SEGMENT_LEN]).loss.backward()
    gates = get_attachment(model).layers[LAYER]
    assert float(gates.bias.grad.abs().sum()) > 0
    memory.__exit__(None, None, None)


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_may_be_of_another_dtype_than_the_memory(
    combine: str, stored: str, dtype: torch.dtype
):
    model = make_model()
    add_memory(model, combine=combine, dtype=stored, **SETTINGS)
    with open_memory(model) as memory, torch.autocast("cpu", dtype=dtype):
        cache = memory.new_cache()
        for piece in PROMPT.split(SEGMENT_LEN, 1):
            output = model(piece, labels=piece, **get_attachment(model).pass_cache(cache))
            output.loss.backward()
            memory.commit(cache)
    assert bool(output.logits.isfinite().all())
    assert float(get_attachment(model).layers[LAYER].bias.grad.abs().sum()) > 0


def wrap_ddp(model: Any) -> Any:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data_parallel": nn.DataParallel,
    "ddp": wrap_ddp,
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of the wrappers
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_has_the_memory_of_the_model(name: str):
    model = make_model(num_hidden_layers=1)
    settings = {**SETTINGS, "layers": [0]}
    add_memory(model, **settings)
    try:
        wrapped = WRAPPERS[name](model)
        with open_memory(wrapped), torch.no_grad():
            expected = model(PROMPT).logits
            if name != "compile":  # which takes a minute to start; it was tried by hand
                torch.testing.assert_close(wrapped(PROMPT).logits, expected)
        remove_memory(wrapped)
        assert find_attachment(model) is None
        assert not torch.allclose(model(PROMPT).logits, expected)
        add_memory(wrapped, **settings)
        with open_memory(model), torch.no_grad():
            assert torch.equal(model(PROMPT).logits, expected)
    finally:
        if name == "ddp":
            torch.distributed.destroy_process_group()


def test_a_replica_of_a_model_is_not_taken_for_it():
    model = make_model()
    give_memory(model)
    with pytest.raises(StateError, match="process per GPU"):
        copy.copy(model.model)(PROMPT)


def save_whole(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), save_whole]
)
def test_a_copied_model_has_a_memory_of_its_own_that_can_be_removed(make_copy: Callable):
    model = make_model()
    without = generate(model)
    add_memory(model, **SETTINGS)
    expected = answer(model)
    copied = make_copy(model)
    assert torch.equal(answer(copied), expected)
    remove_memory(copied)
    assert torch.equal(generate(copied), without)
    assert torch.equal(answer(model), expected)
    other = make_copy(model)
    remove_memory(model)
    assert torch.equal(answer(other), expected)


@pytest.mark.parametrize("search", ["inner_product", "normalized"])
def test_weights_saved_without_a_memory_are_loaded_strictly(search: str):
    weights = make_model().state_dict()
    model = make_model()
    add_memory(model, search=search, **SETTINGS)
    expected = answer(model)
    nn.init.normal_(model.lm_head.weight)
    model.load_state_dict(weights, strict=True)
    assert torch.equal(answer(model), expected)
    model.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({n: t for n, t in weights.items() if n != "model.norm.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**weights, "memory.bias": torch.zeros(4)})


@pytest.mark.filterwarnings("ignore")  # torch.ao tells that it will go
@pytest.mark.parametrize("is_before", [True, False])
def test_a_dynamically_quantized_model_has_a_memory(is_before: bool):
    def quantize(model: Any) -> Any:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    model = make_model()
    model = add_memory(quantize(model) if is_before else model, **SETTINGS)
    model = model if is_before else quantize(model)
    with open_memory(model) as memory:
        memory.read(TOKENIZER, DOCUMENTS, progress=False)
        with memory.record() as sources:
            generate(model)
    assert sum(share for _, share in sources.list()) > 0.1
    remove_memory(model)


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("is_before", [True, False])
def test_a_model_in_int8_of_torchao_has_a_memory(is_before: bool, tmp_path: Path):
    quantization = pytest.importorskip("torchao.quantization")

    def quantize(model: Any) -> None:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())

    model = make_model()
    if is_before:
        quantize(model)
    add_memory(model, **SETTINGS)
    if not is_before:
        quantize(model)
    with open_memory(model, tmp_path / "memory") as memory:
        memory.read(TOKENIZER, DOCUMENTS, progress=False)
        with memory.record() as sources:
            found = generate(model)
    assert sum(share for _, share in sources.list()) > 0.1
    other = make_model()
    quantize(other)
    add_memory(other, **SETTINGS)
    with open_memory(other, tmp_path / "memory"):
        assert torch.equal(generate(other), found)
    nn.init.normal_(other.model.norm.weight)
    other.model.layers[0].mlp.up_proj.weight.qdata[0, 0] += 1
    with pytest.raises(MemoryFolderError, match="its weights differ"):
        open_memory(other, tmp_path / "memory")
    plain = make_model()
    add_memory(plain, **SETTINGS)
    with pytest.raises(MemoryFolderError, match="its weights differ"):
        open_memory(plain, tmp_path / "memory")
    remove_memory(model)


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("is_open", [False, True])
def test_prefix_tuning_is_refused_by_its_name(is_open: bool):
    require_peft()
    import peft

    model = make_model()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(model, config)
    add_memory(wrapped, **SETTINGS)
    with open_memory(wrapped) if is_open else nullcontext():
        for call in (wrapped, lambda tokens: generate(wrapped)):
            with pytest.raises(StateError, match="prefix tuning"):
                call(PROMPT)


@pytest.mark.parametrize("kind", ["meta", "offloaded"])
def test_a_model_whose_weights_are_elsewhere_is_refused_and_not_changed(kind: str):
    model = make_model()
    if kind == "meta":
        model = model.to("meta")
    else:
        pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ConfigError, match="loaded whole"):
        add_memory(model, **SETTINGS)
    assert find_attachment(model) is None


def test_embeddings_can_be_given_in_the_place_of_tokens():
    model = make_model()
    give_memory(model)
    embeddings = model.get_input_embeddings()(PROMPT).detach()
    with open_memory(model), torch.no_grad():
        expected = model(PROMPT).logits
        assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
        tokens = generate(model)
        settings = {"inputs_embeds": embeddings, "max_new_tokens": 5, "pad_token_id": 0}
        with pytest.raises(StateError, match="prefill_chunk_size=None"):
            model.generate(**settings, prefill_chunk_size=SEGMENT_LEN)
        found = model.generate(**settings, do_sample=False)
    assert torch.equal(found, tokens[:, PROMPT.shape[1] :])


@pytest.mark.parametrize("is_open", [False, True])
def test_a_call_of_no_tokens_is_refused(is_open: bool):
    model = make_model()
    give_memory(model)
    with open_memory(model) if is_open else nullcontext():
        with pytest.raises(StateError, match="a call of 0 tokens cannot be computed"):
            model(PROMPT[:, :0])
        with pytest.raises(StateError, match="a call of 0 tokens has position_ids for 1, and"):
            model(PROMPT[:, :0], position_ids=torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_cache": False},
        {"return_dict": False},
        {"output_hidden_states": True},
        {"position_ids": torch.arange(41).unsqueeze(0)},
        {"position_ids": torch.arange(41).expand(2, -1), "attention_mask": torch.ones(2, 41)},
        {"position_ids": torch.arange(7, 48).unsqueeze(0)},
        {"logits_to_keep": 41},
        {CACHE: None, "labels": PROMPT},
    ],
)
def test_every_way_of_calling_gives_the_same_logits(arguments: dict[str, Any]):
    model = find_model()
    give_memory(model)
    with open_memory(model), torch.no_grad():
        expected = model(PROMPT).logits
        output = model(PROMPT, **arguments)
    logits = output[0] if isinstance(output, tuple) else output.logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_attention_are_refused_where_they_would_be_of_the_window_alone():
    model = find_model(implementation="eager")
    give_memory(model)
    assert model(PROMPT, output_attentions=True).attentions is not None
    with open_memory(model), pytest.raises(StateError, match=r"memory.record\(\)"):
        model(PROMPT, output_attentions=True)
