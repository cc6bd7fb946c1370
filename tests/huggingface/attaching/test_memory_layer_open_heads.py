"""Closed heads: nothing is searched or stored for them, and the others see no difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface import load_adapter, open_memory, remove_memory, save_adapter
from memorizing.huggingface.attaching.memory_layer import CLOSED, plan_open_heads
from memorizing.memory import FrozenMemory, MemoryFolder
from memorizing.memory.frozen import select_heads
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.finetuner import prepare_weights
from tests.huggingface.sessions.tools import DOCUMENTS, QUESTION, TOKENIZER
from tests.huggingface.tools import (
    LAYER,
    SEGMENT_LEN,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
    naive_attention,
    read,
)

NUM_TOKENS = 74
NEARLY = CLOSED + 5.0
"""A bias that changes nothing that fp32 could show, and counts as open."""
SOME = ((0,), (3,), (0, 1), (2, 3), (0, 3), (1, 2, 3), (0, 1, 2, 3))
"""Of four heads of queries; two share one of keys."""


def set_gates(attachment: Any) -> None:
    """Gates and scales of open heads that differ from head to head."""
    with torch.no_grad():
        for layer in attachment.layers.values():
            steps = torch.arange(len(layer.bias))
            layer.bias += torch.where(layer.bias > CLOSED, 0.4 + 0.3 * steps, 0.0)
            layer.log_scale += 0.2 * steps - 0.1


def half_close(attachment: Any) -> None:
    """The same, to all that fp32 can show, for a model that searches for every head."""
    with torch.no_grad():
        for layer in attachment.layers.values():
            layer.bias.clamp_(min=NEARLY)


@pytest.mark.parametrize("combine", ["joint", "gate"])
@pytest.mark.parametrize("heads", SOME, ids=str)
def test_open_heads_equal_loops_over_tokens_and_heads(heads: tuple[int, ...], combine: str):
    model, tokens = find_model(), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model, heads={LAYER: heads}, combine=combine)
    set_gates(attachment)
    with torch.no_grad():
        without = model(tokens).logits
        with memory_open(attachment):
            found = read(model, tokens, 19)
        with naive_attention(attachment) as base:
            expected = base(tokens, use_cache=False).logits
    assert (found - without)[:, 3 * SEGMENT_LEN :].abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "gpt2"])
def test_open_heads_of_other_families_equal_loops(family: str):
    model, tokens = find_model(family), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model, heads={LAYER: (1, 2)})
    set_gates(attachment)
    with torch.no_grad():
        with memory_open(attachment):
            found = read(model, tokens, SEGMENT_LEN)
        with naive_attention(attachment) as base:
            expected = base(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("combine", ["joint", "gate"])
def test_closed_heads_take_no_gradient_and_the_others_theirs(combine: str):
    found = []
    for is_nearly in (False, True):
        model = make_model()
        attachment = give_memory(model, heads={LAYER: (1, 2, 3)}, combine=combine)
        set_gates(attachment)
        if is_nearly:
            half_close(attachment)
        with memory_open(attachment):
            cache = attachment.make_cache()
            for piece in make_tokens(1, 3 * SEGMENT_LEN).split(SEGMENT_LEN, 1):
                (call(model, piece, cache).logits[0] ** 2).sum().backward()
                attachment.commit(cache)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        gates = {name: p.grad for name, p in attachment.layers[LAYER].named_parameters()}
        found.append(gradients | gates)
    for name, gradient in found[0].items():
        scale = found[1][name].abs().max()
        torch.testing.assert_close(
            gradient / scale, found[1][name] / scale, rtol=0, atol=2e-5, msg=name
        )
    assert found[0]["bias"][0] == 0
    assert found[0]["bias"][1:].abs().min() > 0


def test_only_keys_that_a_head_reads_are_stored():
    model, tokens = find_model(), make_tokens(2, NUM_TOKENS)
    every = (0, 1, 2)
    attachment = give_memory(model, layers=every, heads={0: (0, 1), 1: (3,), 2: (1, 2)})
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        call(model, tokens, cache)
        memories = attachment.find_history(cache).memories
    num_heads = [memories[layer].keys.shape[1] for layer in every]
    assert num_heads == [1, 1, 2]


def test_a_layer_without_open_heads_stores_nothing_and_changes_nothing():
    model, tokens = find_model(), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model, layers=[0, LAYER], heads={LAYER: (2,)}, bias=CLOSED)
    with torch.no_grad():
        without = model(tokens).logits
        with memory_open(attachment):
            cache = attachment.make_cache()
            found = call(model, tokens, cache).logits
            history = attachment.find_history(cache)
    assert torch.equal(found, without)
    assert not history.memories
    assert history.position.tolist() == [NUM_TOKENS]


@pytest.mark.parametrize("kind", ["none", "float32", "int8", "faiss"])
def test_what_was_read_is_searched_for_open_heads_alone(kind: str, tmp_path: Path):
    path = None if kind == "none" else tmp_path / "some.memory"
    settings: dict[str, Any] = {"heads": {LAYER: (3,)}, "bias": 1.0}
    if kind == "faiss":
        pytest.importorskip("faiss")
        settings["index"] = "faiss_flat:block_len=32"
    dtype = "int8" if kind == "int8" else None
    found, model = [], find_model()
    for is_nearly in (False, True):
        attachment = give_memory(model, **settings)
        if is_nearly:
            half_close(attachment)
        with open_memory(model, path, dtype=dtype) as memory:
            for name, text in DOCUMENTS.items():
                memory.read(TOKENIZER, {name: text}, progress=False)
            with torch.no_grad(), memory.record() as sources:
                found.append(read(model, QUESTION, SEGMENT_LEN))
            num_heads = attachment.opened.base[LAYER].num_heads
            mass = sum(sources.mass.values()) + sources.own_mass
            assert mass == pytest.approx(2 * 41 * (4 if is_nearly else 1), rel=1e-4)
            assert num_heads == (2 if is_nearly else 1)
        remove_memory(model)
    torch.testing.assert_close(*found, rtol=1e-4, atol=5e-5)


def test_heads_are_those_that_were_open_when_the_memory_was_opened():
    model, tokens = find_model(), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model, heads={LAYER: (2,)})
    with torch.no_grad(), memory_open(attachment):
        before = read(model, tokens, SEGMENT_LEN)
        attachment.layers[LAYER].bias[0] = 0.0
        assert torch.equal(read(model, tokens, SEGMENT_LEN), before)
    with torch.no_grad(), memory_open(attachment):
        assert not torch.equal(read(model, tokens, SEGMENT_LEN), before)


def test_gates_are_not_loaded_while_a_memory_is_open(tmp_path: Path):
    model = find_model()
    attachment = give_memory(model, heads={LAYER: (2,)})
    save_adapter(model, tmp_path / "adapter")
    with memory_open(attachment):
        with pytest.raises(StateError, match="settled when it was opened"):
            attachment.load_heads(attachment.list_heads(), "here")
        with pytest.raises(StateError, match="settled when it was opened"):
            load_adapter(model, tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")


def test_what_was_read_for_other_heads_is_refused():
    attachment = give_memory(find_model(), heads={LAYER: (2,)})
    entries = torch.zeros(2, 3, 10)
    with pytest.raises(StateError, match=r"has 2 heads of keys in layer 1, and heads \[1\]"):
        attachment.bind({LAYER: FrozenMemory.from_tensors(entries, entries)})
    assert not attachment.is_bound
    attachment.bind({LAYER: FrozenMemory.from_tensors(entries, entries, heads=[1])})
    attachment.unbind()


def test_closed_gates_alone_are_not_finetuned():
    model = make_model()
    attachment = give_memory(model, bias=CLOSED)
    with pytest.raises(ConfigError, match="closed gates learn nothing"):
        prepare_weights(model, attachment, FinetuneSettings(train="gates"))


@pytest.mark.parametrize("heads", [[], [2], [1, 0], [0, 0]])
def test_heads_that_a_folder_does_not_have_are_refused(tmp_path: Path, heads: list[int]):
    model = find_model()
    give_memory(model)
    with open_memory(model, tmp_path / "m") as memory:
        memory.read(TOKENIZER, DOCUMENTS, progress=False)
    with pytest.raises(ConfigError, match=r"one or more of \[0, 1\]"):
        MemoryFolder.open(tmp_path / "m").open_layer(LAYER, heads=heads)


@pytest.mark.parametrize("number", range(1, 64))
def test_a_plan_asks_every_open_head_once_at_its_keys(number: int):
    is_open = [bool(number >> head & 1) for head in range(6)]
    plan = plan_open_heads(is_open, 2, torch.device("cpu"))
    asked, places = plan.asked.tolist(), plan.places.tolist()
    expected = [head for head in range(6) if is_open[head]]
    assert [asked[place] for place in places] == expected
    assert (plan.heads is None) == all(is_open)
    num_asked = len(asked) // len(plan.key_heads)
    assert [head // 3 for head in asked] == [
        key for key in plan.key_heads for _ in range(num_asked)
    ]
    assert plan.key_heads == tuple(sorted({head // 3 for head in expected}))
    queries = torch.randn(2, 6, 3, 5)
    kept = plan.keep(plan.ask(queries))
    assert torch.equal(kept, queries[:, expected])


@pytest.mark.parametrize(("heads", "is_view"), [((1, 2), True), ((0, 2), False), (None, True)])
def test_selected_heads_are_views_where_they_are_neighbors(heads: Any, is_view: bool):
    entries = torch.arange(24.0).view(3, 4, 2)
    found: Tensor = select_heads(entries, heads)
    assert torch.equal(found, entries[list(range(3) if heads is None else heads)])
    assert (found.untyped_storage().data_ptr() == entries.untyped_storage().data_ptr()) == is_view
