"""With nothing stored a model is its base bit for bit; without a memory it is what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface import add_memory, open_memory, remove_memory
from memorizing.huggingface.attaching.attachment import find_attachment
from tests.huggingface.attaching.all_families import COMMON
from tests.huggingface.tools import (
    FAMILY_AND_IMPLEMENTATION,
    LAYER,
    SEGMENT_LEN,
    WINDOW,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    pad_left,
    read,
    shake_weights,
)

every_model = pytest.mark.parametrize(("family", "implementation"), FAMILY_AND_IMPLEMENTATION)


def list_ways(model: Any, tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Logits of the same texts, called in several ways."""
    return {
        "whole": model(tokens, attention_mask=mask).logits,
        "without a cache": model(tokens, attention_mask=mask, use_cache=False).logits,
        "in pieces": read(model, tokens, [tokens.shape[1] - 4, 1, 3], mask),
    }


@every_model
def test_with_nothing_stored_the_logits_are_those_of_the_base_bit_for_bit(
    family: str, implementation: str
):
    model = find_model(family, implementation)
    tokens, mask = pad_left([make_tokens(1, n, seed=n)[0] for n in (WINDOW, 7)])
    # No segment of it ends, so that nothing is stored with a memory open either.
    short = make_tokens(2, SEGMENT_LEN)
    with torch.no_grad():
        base, base_short = list_ways(model, tokens, mask), list_ways(model, short, None)
        give_memory(model)
        found, found_short = list_ways(model, tokens, mask), list_ways(model, short, None)
        with open_memory(model):
            found_open = list_ways(model, short, None)
    for way in base:
        assert torch.equal(found[way], base[way]), way
        assert torch.equal(found_short[way], base_short[way]), way
        assert torch.equal(found_open[way], base_short[way]), way


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "mistral"])
def test_a_cache_that_knows_no_config_gives_the_logits_of_the_base_bit_for_bit(family: str):
    model, tokens = find_model(family), make_tokens(2, WINDOW)
    with torch.no_grad():
        base = read(model, tokens, 7, cache=DynamicCache())
        give_memory(model)
        assert torch.equal(read(model, tokens, 7, cache=DynamicCache()), base)


def test_token_by_token_the_logits_are_those_of_the_base_bit_for_bit():
    model, tokens = find_model(), make_tokens(2, WINDOW)
    with torch.no_grad():
        base = read(model, tokens, 1)
        give_memory(model)
        assert torch.equal(read(model, tokens, 1), base)


@every_model
def test_after_remove_memory_the_model_is_what_it_was(family: str, implementation: str):
    model = make_model(family, implementation)
    long = make_tokens(2, 2 * WINDOW + 3)
    attributes = copy.copy(vars(model))
    before = {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "modules": [name for name, _ in model.named_modules()],
        "weights": list(model.state_dict()),
    }
    layers = list(model.base_model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in layers]
    with torch.no_grad():
        logits = model(long).logits
        give_memory(model)
        assert find_attachment(model) is not None
        with open_memory(model) as memory:
            read(model, long, SEGMENT_LEN, cache=memory.new_cache())
        remove_memory(model)
        assert torch.equal(model(long).logits, logits)
    assert find_attachment(model) is None
    assert before == {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "modules": [name for name, _ in model.named_modules()],
        "weights": list(model.state_dict()),
    }
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in layers
    ]
    assert vars(model).keys() == attributes.keys()
    assert vars(model)["generation_config"] is attributes["generation_config"]


def test_what_is_set_on_the_generation_config_stays_after_remove_memory():
    model = make_model()
    give_memory(model)
    model.generation_config.temperature = 0.7
    remove_memory(model)
    assert model.generation_config.temperature == 0.7
    assert model.generation_config.prefill_chunk_size is None


def test_memory_layers_are_one_module_with_gates_only():
    model = find_model()
    before = set(model.state_dict())
    give_memory(model, layers=[0, LAYER])
    added = set(model.state_dict()) - before
    assert added == {
        f"model.layers.{layer}.self_attn.memory.{name}"
        for layer in (0, LAYER)
        for name in ("bias", "log_scale")
    }


def test_a_second_memory_is_refused_and_so_is_removing_one_that_is_not_there():
    model = find_model()
    with pytest.raises(ConfigError, match="has no memory"):
        remove_memory(model)
    give_memory(model)
    with pytest.raises(ConfigError, match="call remove_memory"):
        give_memory(model)


def test_removing_an_open_memory_is_refused():
    model = find_model()
    give_memory(model)
    with open_memory(model), pytest.raises(StateError, match="leave its with block"):
        remove_memory(model)
    remove_memory(model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": [3]}, "from 0 to 2"),
        ({"layers": []}, "one or more"),
        ({"layers": [1, 1]}, "each layer once"),
        ({"window": 0}, "window"),
        ({"segment_len": WINDOW + 1}, "at most window"),
        ({"window": 210, "segment_len": 13}, "at most 208"),
        ({"window": 110, "segment_len": 106}, "at most 106"),
        ({"capacity": 4}, "capacity"),
        ({"num_neighbors": 0}, "num_neighbors"),
        ({"temperature": 0.0}, "temperature"),
        ({"combine": "sum"}, "combine"),
        ({"index": "nearest"}, "index"),
        ({"num_sinks": -1}, "num_sinks"),
    ],
)
def test_settings_that_cannot_work_are_refused_and_the_model_is_as_before(
    settings: dict[str, Any], words: str
):
    model = find_model()
    before = sorted(vars(model))
    with pytest.raises(ConfigError, match=words):
        give_memory(model, **settings)
    assert sorted(vars(model)) == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_families_that_are_laid_out_otherwise_are_refused(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, ffn_dim=11, intermediate_size=11)
    config.is_decoder = True
    with pytest.raises(ConfigError, match=f"model_type '{family}'.*known: afmoe, apertus"):
        add_memory(AutoModelForCausalLM.from_config(config))


_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": None,
}


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("diffllama", {}, "calls attention 2 times"),
        ("youtu", _LATENT, "the cache of layer 0 holds something else"),
        ("hunyuan_v1_dense", {}, "positions cannot be taken out of the keys of layer 0"),
        ("doge", {"hidden_size": 40}, "no softmax over all of its keys"),
        ("nemotron", {"hidden_size": 40}, "calls attention 0 times"),
    ],
)
def test_families_whose_attention_is_another_are_refused(
    family: str, settings: dict[str, Any], words: str
):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {name: value for name, value in (COMMON | settings).items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    shake_weights(model)
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=words):
        add_memory(model, window=11)
    assert model.config._attn_implementation == before
    assert find_attachment(model) is None


@pytest.mark.parametrize(
    ("family", "max_positions", "given", "expected"),
    [
        ("llama", 4096, {}, (512, 4, 128)),
        # A window of 512 and room for twelve hundred places.
        ("llama", 1031, {}, (256, 3, 128)),
        ("gpt2", 1024, {}, (512, 2, 128)),
        ("llama", 128, {"window": 17}, (9, 1, 54)),
        ("llama", 640, {"window": 64, "segment_len": 64}, (64, 2, 128)),
        ("llama", 640, {"window": 64, "passage_len": 32}, (64, 4, 32)),
        ("llama", 640, {"window": 128, "num_passages": 4}, (128, 4, 76)),
        ("llama", 640, {"window": 64, "best_readings": 1}, (64, 3, 128)),
    ],
)
def test_passages_are_as_many_and_as_long_as_a_model_has_positions_for(
    family: str, max_positions: int, given: dict[str, Any], expected: tuple[int, int, int]
):
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    model = make_model(family, **{name: max_positions})
    add_memory(model, [1], **given)
    attachment = find_attachment(model)
    assert attachment is not None
    settings = attachment.settings
    found = settings.segment_len, settings.num_passages, settings.passage_len
    assert (settings.read, found) == ("passages", expected)


def test_passages_that_have_no_positions_are_refused():
    model = make_model("llama", max_position_embeddings=640)
    with pytest.raises(ConfigError, match="less: they take 641 positions for passages"):
        add_memory(model, [1], window=64, num_passages=4, passage_len=128)
    assert find_attachment(model) is None


def test_the_language_model_inside_of_a_wrapper_is_refused_at_once():
    with pytest.raises(ConfigError, match="does not generate by itself"):
        add_memory(find_model("gemma3_text").model)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "paged|sdpa"])
def test_attention_that_is_not_known_is_refused(implementation: str):
    model = find_model()
    model.config._attn_implementation_internal = implementation
    try:
        with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
            give_memory(model)
    finally:
        model.config._attn_implementation_internal = "sdpa"


def test_attention_that_is_set_afterwards_is_refused():
    model = find_model()
    give_memory(model)
    model.set_attn_implementation("eager")
    with pytest.raises(StateError, match="set after add_memory"):
        model(make_tokens(1, 5))
    remove_memory(model)
    assert model.config._attn_implementation == "sdpa"


def test_upcast_attention_of_gpt2_is_refused():
    model = make_model("gpt2", "eager", reorder_and_upcast_attn=True)
    with pytest.raises(ConfigError, match="reorder_and_upcast_attn"):
        give_memory(model)
