"""What cannot be right with a memory is refused, and is never silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache, GenerationConfig, StaticCache

from memorizing.errors import ConfigError, NonFiniteQueryError, StateError
from memorizing.huggingface import add_memory
from memorizing.huggingface.attaching.window_cache import find_text
from tests.huggingface.attaching.all_families import make_config
from tests.huggingface.tools import (
    CACHE,
    LAYER,
    SEGMENT_LEN,
    WINDOW,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
    read,
)

TOKENS = make_tokens(2, 21)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"assistant_early_exit": 1}, "assisted generation"),
        ({"use_mtp": True}, "assisted generation"),
        ({"assistant_model": "itself"}, "assisted generation"),
        ({"assistant_model": "itself", "do_sample": True}, "assisted generation"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"dola_layers": [1], "do_sample": True}, "dola generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.1}, "group beam search"),
        ({"num_beams": 4, "constraints": [[7]]}, "constrained beam search"),
        ({"num_beams": 4, "force_words_ids": [[7]]}, "constrained beam search"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "beam search"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation is 'offloaded'"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({"cache_implementation": "paged"}, "cache_implementation is 'paged'"),
        ({"custom_generate": "owner/name"}, "'owner/name'; code that comes .* not run"),
        ({"custom_generate": "."}, "code that comes with a way of decoding is not run"),
        (
            {CACHE: DynamicCache(), "use_cache": False},
            f"use_cache is false with {CACHE}",
        ),
    ],
)
@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_ways_of_generating_that_cannot_be_right_are_refused_before_anything_is_computed(
    settings: dict[str, Any], words: str, trust_remote_code: bool | None
):
    model, calls = find_model(), []
    give_memory(model)
    hook = model.model.register_forward_hook(lambda *args: calls.append(1))
    if "assistant_model" in settings:
        settings = settings | {"assistant_model": model}
    with pytest.raises(ConfigError, match=words) as caught:
        # No code is loaded: that is not come to.
        model.generate(
            TOKENS[:1], max_new_tokens=3, trust_remote_code=trust_remote_code, **settings
        )
    hook.remove()
    assert "trust_remote_code" not in str(caught.value)
    assert not calls


def test_continuous_batching_is_refused():
    model = find_model()
    give_memory(model)
    for start in (
        lambda: model.generate_batch([[7, 8, 9]]),
        model.init_continuous_batching,
        lambda: model.continuous_batching_context_manager().__enter__(),
    ):
        with pytest.raises(ConfigError, match="continuous batching moves sequences"):
            start()


def test_a_model_whose_memory_is_removed_searches_with_beams_again():
    model = find_model()
    expected = model.generate(TOKENS, max_new_tokens=5, num_beams=2)
    give_memory(model)
    model = find_model()
    assert torch.equal(model.generate(TOKENS, max_new_tokens=5, num_beams=2), expected)


def test_what_exchanges_or_takes_back_rows_of_a_cache_is_refused():
    model = find_model()
    give_memory(model)
    with torch.no_grad():
        cache = model(TOKENS)[CACHE]
    for exchange in (
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_select_indices(torch.tensor([1])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(StateError, match="num_beams=1"):
            exchange()
    with pytest.raises(StateError, match="assisted and speculative decoding"):
        cache.crop(-1)
    assert not cache.is_croppable
    assert not cache.is_compileable


def test_other_caches_are_refused():
    model = find_model()
    give_memory(model)
    with pytest.raises(StateError, match="StaticCache"):
        call(model, TOKENS, StaticCache(config=model.config, max_cache_len=31))
    with pytest.raises(StateError, match="DynamicSubclass"):
        call(model, TOKENS, type("DynamicSubclass", (DynamicCache,), {})())
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with pytest.raises(StateError, match="offloaded"):
        call(model, TOKENS, cache)


def test_a_cache_that_was_read_without_memory_is_refused():
    model = find_model()
    with torch.no_grad():
        cache = model(TOKENS)[CACHE]
        give_memory(model)
        with pytest.raises(StateError, match="21 tokens that were read without add_memory"):
            call(model, TOKENS, cache)


@pytest.mark.parametrize("is_open", [False, True])
def test_masks_that_do_not_say_where_tokens_are_are_refused(is_open: bool):
    model = find_model()
    attachment = give_memory(model)
    long = make_tokens(2, WINDOW + 1)
    if is_open:
        attachment.bind({})
    with torch.no_grad():
        for tokens in (TOKENS, long):
            size = tokens.shape[1]
            seen = torch.ones(2, 1, size, size, dtype=torch.bool).tril()
            if is_open or tokens is long:
                with pytest.raises(StateError, match=rf"\(2, {size}\)"):
                    model(tokens, attention_mask=seen)
            else:
                torch.testing.assert_close(
                    model(tokens, attention_mask=seen).logits, model(tokens).logits
                )
        if is_open:
            cache = model(TOKENS)[CACHE]
            with pytest.raises(StateError, match=r"attention_mask is \(2, 3\).*\(2, 24\)"):
                call(
                    model,
                    TOKENS[:, :3],
                    cache,
                    attention_mask=torch.ones(2, 3, dtype=torch.int64),
                )
    attachment.unbind()


def test_padding_between_the_tokens_of_a_row_is_refused():
    model = find_model()
    attachment = give_memory(model)
    mask = torch.ones_like(TOKENS)
    mask[1, 4] = 0
    with torch.no_grad(), memory_open(attachment):
        with pytest.raises(StateError, match="row 1 of attention_mask has padding between"):
            model(TOKENS, attention_mask=mask)
        mask = torch.ones_like(TOKENS)
        mask[0, -2:] = 0
        cache = attachment.make_cache()
        call(model, TOKENS, cache, attention_mask=mask)
        # Between two calls.
        longer = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)
        with pytest.raises(StateError, match="row 0 of attention_mask has padding between"):
            call(model, TOKENS[:, :3], cache, attention_mask=longer)
        longer[0, -3:] = 0
        call(model, TOKENS[:, :3], cache, attention_mask=longer)
        assert attachment.find_history(cache).position.tolist() == [19, 24]


def test_several_texts_in_a_row_are_refused():
    model = find_model()
    position = torch.cat([torch.arange(13), torch.arange(8)]).unsqueeze(0)
    with torch.no_grad():
        base = model(TOKENS, position_ids=position, use_cache=False).logits
        attachment = give_memory(model)
        assert torch.equal(model(TOKENS, position_ids=position, use_cache=False).logits, base)
        with memory_open(attachment), pytest.raises(StateError, match="a row of its own"):
            model(TOKENS, position_ids=position, use_cache=False)


def test_another_number_of_rows_is_refused():
    model = find_model()
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        cache = model(TOKENS)[CACHE]
        with pytest.raises(StateError, match="1 rows and its memory 2"):
            call(model, TOKENS[:1], cache)


def interrupt(model: Any, error: BaseException) -> Any:
    """The next call of the last layer fails."""

    def fail(module: Any, args: Any) -> None:
        raise error

    return model.model.layers[2].register_forward_pre_hook(fail)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_history_is_refused_after_a_call_that_was_interrupted(error: BaseException):
    model, tokens = find_model(), make_tokens(2, 74)
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        read(model, tokens[:, :30], SEGMENT_LEN, cache=cache)
        hook = interrupt(model, error)
        with pytest.raises(type(error)):
            call(model, tokens[:, 30:70], cache)
        hook.remove()
        assert cache.get_seq_length() == 30
        with pytest.raises(StateError, match="was interrupted"):
            call(model, tokens[:, 30:70], cache)
        cache.reset()
        found = read(model, tokens, SEGMENT_LEN, cache=cache)
        assert torch.equal(found, read(model, tokens, SEGMENT_LEN))


def test_a_first_call_that_was_interrupted_can_be_made_again():
    model = find_model()
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        hook = interrupt(model, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            call(model, TOKENS, cache)
        hook.remove()
        found = call(model, TOKENS, cache).logits
        assert torch.equal(found, model(TOKENS).logits)


def test_without_a_memory_open_a_call_that_was_interrupted_can_be_made_again():
    model, tokens = make_model(max_position_embeddings=67), make_tokens(2, 78)
    give_memory(model)
    with torch.no_grad():
        expected = read(model, tokens, SEGMENT_LEN)
        cache = model(tokens[:, :65])[CACHE]
        # Where positions begin again, cached keys move.
        hook = interrupt(model, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            call(model, tokens[:, 65:], cache)
        hook.remove()
        found = call(model, tokens[:, 65:], cache).logits
    torch.testing.assert_close(found, expected[:, 65:], rtol=1e-5, atol=2e-5)


def test_the_mask_of_one_model_is_not_that_of_the_next_after_an_interrupt():
    model, other = find_model(), find_model("qwen3")
    give_memory(model, window=13)
    hook = interrupt(model, KeyboardInterrupt())
    with torch.no_grad():
        expected = other(make_tokens(2, 40)).logits
        with pytest.raises(KeyboardInterrupt):
            model(make_tokens(2, 40))
        hook.remove()
        assert torch.equal(other(make_tokens(2, 40)).logits, expected)
        give_memory(other, window=41)
        assert torch.equal(other(make_tokens(2, 40)).logits, expected)


def test_queries_that_are_not_numbers_are_refused():
    model = make_model()
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        cache = model(TOKENS[:, :SEGMENT_LEN])[CACHE]
        model.model.layers[LAYER].self_attn.q_proj.weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteQueryError):
            call(model, TOKENS[:, SEGMENT_LEN:], cache)


def test_a_family_that_is_not_known_is_tried_out():
    # InternLM 3 works as the known families do; a Phi of these sizes does not work at all.
    if "internlm3" not in CONFIG_MAPPING:
        pytest.skip("transformers has InternLM 3 since 5.23")
    sizes = {
        "vocab_size": 101,
        "hidden_size": 40,
        "intermediate_size": 31,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 97,
    }
    other = make_unknown("internlm3", **sizes)
    attachment = give_memory(other)
    tokens = make_tokens(1, 74)
    with torch.no_grad(), memory_open(attachment):
        whole = other(tokens).logits
        torch.testing.assert_close(read(other, tokens, 7), whole, rtol=1e-5, atol=2e-5)
    phi = make_unknown("phi", **sizes)
    before = sorted(vars(phi))
    with pytest.raises(
        ConfigError, match=r"model_type 'phi'\) cannot be given a memory: a trial call"
    ):
        give_memory(phi)
    assert sorted(vars(phi)) == before
    assert phi.config._attn_implementation == "sdpa"


def make_unknown(family: str, **sizes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def test_layers_whose_heads_differ_are_refused():
    model = make_unknown("gemma4_text", **make_config("gemma4_text"))
    with pytest.raises(ConfigError, match="equally many and long heads"):
        add_memory(model, [0, 1], window=11)


def test_a_cache_of_another_model_is_no_cache_of_a_memory():
    assert find_text(DynamicCache()).history is None
