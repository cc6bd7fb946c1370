"""Generation by our own model: the same tokens as its own loop, whatever way they are asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from memorizing.config import TokenizerConfig
from memorizing.data import Document, train_tokenizer
from memorizing.errors import ConfigError, MemorizingError, StateError
from memorizing.huggingface.own_model.config import MemorizingTokenizer
from memorizing.huggingface.own_model.model import MemorizingTransformerForCausalLM
from tests.huggingface.own_model.tools import decode_greedily, get_history, make_own, pad_left
from tests.model.tools import make_tokens

NUM_NEW = 13


@pytest.fixture(scope="module")
def model() -> MemorizingTransformerForCausalLM:
    return make_own(loudness=4.0)


def generate(model: MemorizingTransformerForCausalLM, tokens: torch.Tensor, **settings):
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, **settings}
    return model.generate(tokens, **settings)


@pytest.mark.parametrize("prompt_len", [1, 7, 23])
def test_greedy_generation_equals_the_models_own_loop(
    model: MemorizingTransformerForCausalLM, prompt_len: int
) -> None:
    prompt = make_tokens(1, prompt_len)
    found = generate(model, prompt)
    assert torch.equal(found[:, :prompt_len], prompt)
    assert found[0, prompt_len:].tolist() == decode_greedily(model.model, prompt[0], NUM_NEW)
    assert len(set(found[0, prompt_len:].tolist())) > 3


def test_generated_tokens_enter_the_memory_on_its_clock(
    model: MemorizingTransformerForCausalLM,
) -> None:
    output = generate(model, make_tokens(1, 5), return_dict_in_generate=True)
    # The last token was not read, and the last boundary before it is at 14.
    assert get_history(output).state.position.tolist() == [17]
    assert get_history(output).state.memories[1].num_appended.tolist() == [14]


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"prefill_chunk_size": 5}])
def test_ways_of_calling_the_model_give_the_same_tokens(
    model: MemorizingTransformerForCausalLM, settings: dict
) -> None:
    prompt = make_tokens(2, 17)
    assert torch.equal(generate(model, prompt, **settings), generate(model, prompt))


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 3}])
def test_a_left_padded_batch_gives_each_prompts_own_tokens(
    model: MemorizingTransformerForCausalLM, settings: dict
) -> None:
    prompts = [make_tokens(1, n, seed=n)[0] for n in (3, 19, 11)]
    tokens, mask = pad_left(prompts)
    found = generate(model, tokens, attention_mask=mask, **settings)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt.unsqueeze(0))[0, len(prompt) :]
        assert found[row, tokens.shape[1] :].tolist() == alone.tolist()


def test_a_capacity_of_0_generates_as_the_model_without_memory(
    model: MemorizingTransformerForCausalLM,
) -> None:
    prompt = make_tokens(1, 23)
    plain = generate(model, prompt, past_key_values=model.init_cache(1, capacity=0))
    bare = copy.deepcopy(model)
    bare.config.capacity = 0
    assert torch.equal(generate(bare, prompt), plain)
    assert not torch.equal(generate(model, prompt), plain)


def test_sampling_with_a_seed_repeats_and_differs_from_greedy(
    model: MemorizingTransformerForCausalLM,
) -> None:
    prompt = make_tokens(2, 9)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(generate(model, prompt, do_sample=True, temperature=1.5, top_k=0))
    assert torch.equal(*found)
    assert not torch.equal(found[0], generate(model, prompt))


def test_several_sequences_of_a_prompt_are_rows_of_their_own(
    model: MemorizingTransformerForCausalLM,
) -> None:
    prompt = make_tokens(2, 9)
    torch.manual_seed(3)
    expected = generate(model, prompt.repeat_interleave(3, 0), do_sample=True)
    torch.manual_seed(3)
    found = generate(model, prompt, do_sample=True, num_return_sequences=3)
    assert torch.equal(found, expected)


def test_several_sequences_go_on_from_a_history_whose_rows_were_repeated(
    model: MemorizingTransformerForCausalLM,
) -> None:
    prompt = make_tokens(1, 17)
    cache = model.init_cache(1)
    with torch.no_grad():
        model(prompt[:, :16], past_key_values=cache)
    with pytest.raises(StateError, match=r"1 rows and 2 sequences.*batch_repeat_interleave"):
        generate(model, prompt, past_key_values=cache, num_return_sequences=2, do_sample=True)
    cache.batch_repeat_interleave(2)
    torch.manual_seed(3)
    found = generate(model, prompt, past_key_values=cache, num_return_sequences=2, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(found, generate(model, prompt, num_return_sequences=2, do_sample=True))


def test_a_history_has_two_names_of_which_either_will_do(
    model: MemorizingTransformerForCausalLM,
) -> None:
    text, prompt = make_tokens(1, 17), make_tokens(1, 23)
    expected = generate(model, prompt)
    for name in ("past_key_values", "cache"):
        cache = model.init_cache(1)
        with torch.no_grad():
            assert get_history(model(prompt[:, :17], **{name: cache})) is cache
        assert torch.equal(generate(model, prompt, **{name: cache}), expected)
    both = {"past_key_values": model.init_cache(1), "cache": model.init_cache(1)}
    with pytest.raises(ConfigError, match="two names of one history"):
        generate(model, text, **both)
    with pytest.raises(ConfigError, match="two names of one history"):
        model(text, **both)


@pytest.mark.parametrize("only_new", [False, True])
def test_a_conversation_goes_on_from_its_history(
    model: MemorizingTransformerForCausalLM, only_new: bool
) -> None:
    first = generate(model, make_tokens(2, 9), return_dict_in_generate=True)
    cache = get_history(first)
    whole = torch.cat([first.sequences, make_tokens(2, 6, seed=5)], 1)
    expected = generate(model, whole)[:, whole.shape[1] :]
    if only_new:
        mask = torch.ones_like(whole)
        new = whole[:, cache.get_seq_length() :]
        second = generate(model, new, attention_mask=mask, past_key_values=cache)
        found = second[:, new.shape[1] :]
    else:
        found = generate(model, whole, past_key_values=cache)[:, whole.shape[1] :]
    assert torch.equal(found, expected)


def test_questions_can_be_asked_about_a_text_that_was_read_once(
    model: MemorizingTransformerForCausalLM,
) -> None:
    text = make_tokens(1, 29)
    cache = model.init_cache(1)
    with torch.no_grad():
        model(text, past_key_values=cache, logits_to_keep=1)
    for seed in (2, 3):
        asked = torch.cat([text, make_tokens(1, 5, seed=seed)], 1)
        found = generate(model, asked, past_key_values=copy.deepcopy(cache))
        assert torch.equal(found, generate(model, asked))


class _Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed_as_they_come(model: MemorizingTransformerForCausalLM) -> None:
    streamer = _Collector()
    found = generate(model, make_tokens(1, 9), streamer=streamer)
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended


class _Never(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"cache_implementation": "static"}, "'static'"),
        ({"cache_implementation": "quantized"}, "'quantized'"),
        ({"cache_implementation": "paged"}, "'paged'"),
        ({"custom_generate": "owner/name"}, "'owner/name'"),
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 3, 22)}, "give input_ids"),
        ({"past_key_values": DynamicCache()}, "is a DynamicCache"),
        ({"pad_token_id": 0}, "begins with padding, token 0"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padding_side = 'left'"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "beam search"),
    ],
)
def test_what_is_not_right_yet_is_refused_before_anything_is_computed(
    model: MemorizingTransformerForCausalLM, settings: dict, message: str
) -> None:
    before = model.forward
    model.forward = None  # type: ignore[assignment]
    try:
        with pytest.raises(MemorizingError, match=message):
            model.generate(torch.tensor([[0, 0, 7]]), **settings)
    finally:
        model.forward = before


def test_assisted_generation_is_refused(model: MemorizingTransformerForCausalLM) -> None:
    with pytest.raises(ConfigError, match="assisted generation"):
        model.generate(make_tokens(1, 3), assistant_model=model)


def test_beams_that_the_models_own_settings_ask_for_are_refused() -> None:
    model = make_own()
    model.generation_config.num_beams = 2
    with pytest.raises(ConfigError, match="beam search"):
        model.generate(make_tokens(1, 3))


def test_continuous_batching_is_refused(model: MemorizingTransformerForCausalLM) -> None:
    with pytest.raises(ConfigError, match="continuous batching"):
        model.generate_batch([[1, 2, 3]])


def test_a_history_that_the_tokens_do_not_go_on_from_is_refused(
    model: MemorizingTransformerForCausalLM,
) -> None:
    first = generate(model, make_tokens(1, 9), return_dict_in_generate=True)
    cache, whole = get_history(first), first.sequences
    with pytest.raises(StateError, match="read 21 columns and input_ids has 3"):
        generate(model, make_tokens(1, 3), past_key_values=cache)
    with pytest.raises(StateError, match="column 20 of input_ids"):
        generate(model, (whole + 1) % 29, past_key_values=cache)
    with pytest.raises(StateError, match="it must have 24"):
        generate(model, whole[:, :3], attention_mask=torch.ones(1, 23), past_key_values=cache)
    with pytest.raises(ConfigError, match="use_cache is false"):
        generate(model, whole, past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == 21


def test_a_pipeline_continues_text() -> None:
    text = "one two one two three four five six seven"
    tokenizer = train_tokenizer([Document("d", text)], TokenizerConfig(vocab_size=307))
    model = make_own(vocab_size=tokenizer.vocab_size)
    reader = MemorizingTokenizer(tokenizer_object=tokenizer.backend)
    generator = pipeline("text-generation", model=model, tokenizer=reader, device="cpu")
    prompts = ["one two", text]
    both = generator(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, [found] in zip(prompts, both, strict=True):
        start = torch.tensor([tokenizer.start_token, *tokenizer.encode(prompt)])
        expected = tokenizer.decode(decode_greedily(model.model, start, 5))
        assert found["generated_text"] == prompt + expected.replace("<|document|>", "")


def test_without_a_prompt_generation_begins_with_the_start_token() -> None:
    model = make_own()
    model.generation_config.bos_token_id = 3
    found = model.generate(max_new_tokens=4, do_sample=False)
    assert torch.equal(found, generate(model, torch.tensor([[3]]), max_new_tokens=4))


def test_a_criterion_of_the_users_own_is_asked(model: MemorizingTransformerForCausalLM) -> None:
    criteria = StoppingCriteriaList([_Never()])
    prompt = make_tokens(1, 9)
    found = generate(model, prompt, stopping_criteria=criteria)
    assert torch.equal(found, generate(model, prompt))
