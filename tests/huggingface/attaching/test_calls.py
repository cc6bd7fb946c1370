"""However a text is cut into calls, and whatever rows stand beside it, its logits are the same."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from memorizing.huggingface import open_memory
from tests.huggingface.tools import (
    CACHE,
    CONFIGS,
    LAYER,
    NUM_SINKS,
    SEGMENT_LEN,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
    pad_left,
    read,
)

NUM_TOKENS, NUM_NEW = 74, 19


def compare(found: Tensor, expected: Tensor) -> None:
    """Logits here are between -10 and 10; sums of other lengths round otherwise."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_any_chunking_of_the_calls_gives_the_same_logits(family: str):
    model, tokens = find_model(family), make_tokens(2, NUM_TOKENS)
    attachment = give_memory(model, layers=[0, LAYER], num_neighbors=3)
    with torch.no_grad(), memory_open(attachment):
        whole = model(tokens, use_cache=False).logits
        for lengths in (SEGMENT_LEN, [5, 11, 1, 1, 47]):
            compare(read(model, tokens, lengths), whole)
    assert (whole - model(tokens).logits).abs().max() > 0.01


@pytest.mark.parametrize("settings", [{}, {"combine": "gate", "capacity": 17}, {"segment_len": 29}])
def test_token_by_token_the_logits_are_the_same(settings: dict[str, Any]):
    model, tokens = find_model(), make_tokens(2, NUM_TOKENS)
    attachment = give_memory(model, **settings)
    with torch.no_grad(), memory_open(attachment):
        compare(read(model, tokens, 1), model(tokens).logits)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_rows_with_left_padding_have_their_own_clocks(family: str):
    model = find_model(family)
    texts = [make_tokens(1, n, seed=n)[0] for n in (71, 11, 59)]
    tokens, mask = pad_left(texts)
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        found = read(model, tokens, [SEGMENT_LEN, 40, 1, 17], mask)
        for row, text in enumerate(texts):
            compare(found[row, -len(text) :], model(text.unsqueeze(0)).logits[0])


def test_padding_is_not_stored():
    model = find_model()
    texts = [make_tokens(1, n, seed=n)[0] for n in (41, 12, 26)]
    tokens, mask = pad_left(texts)
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        read(model, tokens, SEGMENT_LEN, mask, cache)
        state = attachment.find_history(cache)
        alone = attachment.make_cache()
        call(model, texts[0].unsqueeze(0), alone)
        state_alone = attachment.find_history(alone)
    assert state.position.tolist() == [41, 12, 26]
    # The third row ended its second segment with the last column; the next call writes it.
    assert state.memories[LAYER].num_appended.tolist() == [39, 0, 13]
    mine, theirs = (one.memories[LAYER] for one in (state, state_alone))
    compare(mine.keys[0, :, :39], theirs.keys[0, :, :39])
    compare(mine.values[0, :, :39], theirs.values[0, :, :39])


def generate(model: Any, tokens: Tensor, **settings: Any) -> Any:
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None} | settings
    return model.generate(tokens, **settings)


def decode_greedily(model: Any, text: Tensor, num_new: int) -> Tensor:
    """Logits (num_new, V) of new tokens, a token a call from the first of the text on."""
    cache = DynamicCache(config=model.config)
    found: list[Tensor] = []
    with torch.no_grad():
        for index in range(len(text) + num_new - 1):
            token = int(text[index]) if index < len(text) else int(found[-1].argmax())
            logits = call(model, torch.tensor([[token]]), cache).logits
            if index >= len(text) - 1:
                found.append(logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama"])
def test_generate_equals_a_loop_of_single_tokens(family: str):
    model = find_model(family)
    give_memory(model)
    texts = [make_tokens(1, n, seed=n)[0] for n in (70, 7)]
    tokens, mask = pad_left(texts)
    with open_memory(model):
        found = generate(
            model, tokens, attention_mask=mask, output_logits=True, return_dict_in_generate=True
        )
        for row, text in enumerate(texts):
            expected = decode_greedily(model, text, NUM_NEW)
            compare(torch.stack(found.logits)[:, row], expected)
            assert found.sequences[row, tokens.shape[1] :].tolist() == expected.argmax(1).tolist()


def go_on(model: Any, input_ids: Tensor, *, generation_config: Any, **kwargs: Any) -> Tensor:
    """A way of decoding of the user's own: greedy."""
    cache = kwargs[CACHE]
    for _ in range(generation_config.max_new_tokens):
        logits = call(model, input_ids[:, cache.get_seq_length() :], cache).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
    return input_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 70, "cache_implementation": "dynamic"},
        {"prefill_chunk_size": None},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
        {"use_cache": False},
        {"use_cache": False, "num_return_sequences": 3, "do_sample": True, "top_k": 1},
        {"generation_config": GenerationConfig(max_new_tokens=NUM_NEW, use_cache=False)},
        {"generation_config": GenerationConfig(max_new_tokens=NUM_NEW, num_beams=1)},
        {"custom_generate": go_on},
        {"guidance_scale": 1.0},
    ],
)
@pytest.mark.parametrize("is_open", [False, True])
def test_ways_of_generating_give_the_same_tokens(settings: dict[str, Any], is_open: bool):
    model, tokens = find_model(), make_tokens(1, 70)
    give_memory(model)
    with open_memory(model) if is_open else nullcontext():
        expected = generate(model, tokens)
        if "generation_config" in settings:
            found = model.generate(tokens, **settings)
        else:
            found = generate(model, tokens, **settings)
    assert torch.equal(found, expected.expand_as(found))


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "mistral"])
def test_generating_without_a_cache_gives_the_same_tokens_for_padded_texts(family: str):
    model = find_model(family)
    give_memory(model)
    tokens, mask = pad_left([make_tokens(1, n, seed=n)[0] for n in (70, 7)])
    with open_memory(model):
        found = generate(model, tokens, attention_mask=mask, use_cache=False)
        assert torch.equal(found, generate(model, tokens, attention_mask=mask))


def test_guidance_reads_the_other_prompt_with_a_memory_of_its_own():
    model, tokens = find_model(), make_tokens(1, 70)
    give_memory(model)
    other = make_tokens(1, 20, seed=3)
    with open_memory(model), torch.no_grad():
        found = generate(model, tokens, guidance_scale=1.5, negative_prompt_ids=other)
        first = [
            call(model, t, DynamicCache()).logits[:, -1].log_softmax(-1) for t in (tokens, other)
        ]
    assert int(found[0, 70]) == int((1.5 * (first[0] - first[1]) + first[1]).argmax())


def test_a_prompt_is_read_in_segments_and_generated_tokens_enter_the_memory_on_its_clock():
    model, tokens = find_model(), make_tokens(1, 70)
    attachment = give_memory(model)
    lengths = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with open_memory(model):
        output = generate(model, tokens, return_dict_in_generate=True)
        state = attachment.find_history(output[CACHE])
    hook.remove()
    assert lengths == [13] * 5 + [5] + [1] * 18
    assert state.position.tolist() == [88]
    assert state.memories[LAYER].num_appended.tolist() == [78]


def test_a_conversation_goes_on_with_the_cache_that_generate_returned():
    model, tokens = find_model(), make_tokens(1, 40)
    attachment = give_memory(model)
    with open_memory(model):
        first = generate(model, tokens, return_dict_in_generate=True, max_new_tokens=9)
        asked = torch.cat([first.sequences, make_tokens(1, 20, seed=5)], 1)
        found = generate(model, asked, **{CACHE: first[CACHE]})
        assert torch.equal(found, generate(model, asked))
        history = attachment.find_history(first[CACHE])
    assert history.position.tolist() == [69 + 18]


def test_a_copy_of_a_cache_goes_on_by_itself():
    model, tokens = find_model(), make_tokens(1, 40)
    give_memory(model)
    with open_memory(model):
        read_once = model.generate(tokens, max_new_tokens=1, return_dict_in_generate=True)[CACHE]
        for seed in (5, 6):
            asked = torch.cat([tokens, make_tokens(1, 20, seed=seed)], 1)
            found = generate(model, asked, **{CACHE: copy.deepcopy(read_once)})
            assert torch.equal(found, generate(model, asked))
    assert read_once.get_seq_length() == 40


def test_a_cache_that_is_reset_begins_a_new_text():
    model, tokens = find_model(), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        first = read(model, tokens, SEGMENT_LEN, cache=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(read(model, tokens, SEGMENT_LEN, cache=cache), first)


class StopAtLength(StoppingCriteria):
    """After so many tokens."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 76)


class Collect(BaseStreamer):
    """What is streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_streaming_and_stopping_work():
    model, tokens = find_model(), make_tokens(1, 70)
    give_memory(model)
    streamer = Collect()
    with open_memory(model):
        found = generate(
            model,
            tokens,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([StopAtLength()]),
        )
    assert found.shape == (1, 76)
    assert streamer.tokens == found[0].tolist()


def test_rows_that_ended_stay_as_they_are_while_others_go_on():
    model = find_model()
    attachment = give_memory(model)
    texts = [make_tokens(1, n, seed=n)[0] for n in (33, 50)]
    tokens = torch.zeros(2, 50, dtype=torch.int64)
    mask = torch.zeros(2, 50, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        found = read(model, tokens, SEGMENT_LEN, mask, cache)
        for row, text in enumerate(texts):
            alone = model(text.unsqueeze(0)).logits[0]
            compare(found[row, : len(text)], alone)
        assert attachment.find_history(cache).position.tolist() == [33, 50]


def test_texts_in_a_memory_do_not_see_one_another():
    model, tokens = find_model(), make_tokens(3, NUM_TOKENS)
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        found = model(tokens).logits
        for row in range(3):
            compare(found[row], model(tokens[row : row + 1]).logits[0])


def test_changing_a_token_changes_no_logit_before_it():
    model, tokens = find_model(), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model)
    changed = tokens.clone()
    changed[0, 20] = 3 if tokens[0, 20] != 3 else 4
    with torch.no_grad(), memory_open(attachment):
        before, after = model(tokens).logits, model(changed).logits
    compare(before[:, :20], after[:, :20])
    # Token 20 has left the window at 49, and is in memory from 26 on.
    assert (before[:, 60:] - after[:, 60:]).abs().max() > 1e-3
    assert NUM_SINKS < 20


def test_positional_arguments_are_understood():
    model, tokens = find_model(), make_tokens(1, 11)
    give_memory(model)
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        named = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        assert torch.equal(model.model(tokens, mask).last_hidden_state, named)
        output = model.model(tokens, mask, return_dict=False)
    assert torch.equal(output[0], named)
    assert type(output[1]) is DynamicCache


def test_a_text_longer_than_the_window_may_be_given_as_embeddings():
    model, tokens = make_model(), make_tokens(1, NUM_TOKENS)
    attachment = give_memory(model)
    with torch.no_grad(), memory_open(attachment):
        found = model(inputs_embeds=model.model.embed_tokens(tokens)).logits
        assert torch.equal(found, model(tokens).logits)
