"""Experiments with a pre-trained model: passkey documents, sliding windows, lists of documents."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memorizing import add_memory, remove_memory
from memorizing.data import Tokenizer
from memorizing.errors import ConfigError, CorpusError
from memorizing.loss import compute_token_nats
from tests.experiments.scripts import EXPERIMENTS, open_scripts

VOCAB_SIZE = 97
START_TOKEN = 5
SOURCE = '''
"""Words of a module that are long enough to be a sentence. Short one here. See >>> f(x)."""
class A:
    """The first line of a class has seven words, e.g. these.

    It takes {} of what other people call a set. It holds 12 of the 4096 that there are.
    """
def f():
    "Return what the pass key is for no reason at all."
    "Not a docstring, so that it must not be found here."
'''


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    names = ("documents", "passkey", "sliding", "finetuned", "passkey_test", "search_and_storage")
    with open_scripts(EXPERIMENTS / "pretrained", names) as modules:
        yield modules


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """A tokenizer of bytes and a few words, digits one by one."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=307, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([" The pass key is what the sentence says."] * 3, trainer)
    return backend


@pytest.fixture(scope="module")
def tokenizer(backend) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return [f"The sentence about {a}{b} says nothing of use." for a in "abcdefg" for b in "hijkl"]


def make_model(vocab_size: int, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=42,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.3,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, 113).astype(np.int32)


@pytest.mark.parametrize("num_tokens", [211, 607, 5003])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_passkey_document_has_the_length_asked_and_the_key_at_its_depth(
    scripts, tokenizer, sentences, num_tokens, depth
):
    sample = scripts.passkey.make_sample(tokenizer, num_tokens, depth, "s", sentences=sentences)
    assert len(sample.tokens) == num_tokens
    text = tokenizer.decode(sample.tokens)
    assert text.startswith("There is an important piece")
    assert text.endswith("What is the pass key? The pass key is")
    assert text.count(sample.key) == 2
    assert tokenizer.decode(sample.answer) == f" {sample.key}."
    shown = tokenizer.decode(sample.tokens[sample.key_position :])
    assert shown.startswith(f" The pass key is {sample.key}. Remember it.")
    head = len(scripts.passkey.encode(tokenizer, scripts.passkey.INTRODUCTION))
    tail = len(scripts.passkey.encode(tokenizer, scripts.passkey.QUESTION))
    sentence = f" {scripts.passkey.KEY_SENTENCE.format(key=sample.key)}"
    num_filler = num_tokens - head - tail - len(scripts.passkey.encode(tokenizer, sentence))
    longest = max(len(scripts.passkey.encode(tokenizer, f" {s}")) for s in sentences)
    assert abs(sample.key_position - head - depth * num_filler) <= longest / 2


def test_a_passkey_document_follows_from_its_seed_alone(scripts, tokenizer, sentences):
    def make(seed, split="test"):
        return scripts.passkey.make_sample(tokenizer, 401, 0.5, seed, split, sentences=sentences)

    assert make("a") == make("a")
    others = [make("a"), make("b"), make("a", "train")]
    assert len({sample.key for sample in others}) == 3
    assert len({tuple(sample.tokens) for sample in others}) == 3


def test_no_filler_comes_twice_before_all_came_once(scripts, tokenizer, sentences):
    num_tokens = 200 + sum(len(scripts.passkey.encode(tokenizer, f" {s}")) for s in sentences)
    sample = scripts.passkey.make_sample(tokenizer, num_tokens, 0.5, "s", sentences=sentences)
    text = tokenizer.decode(sample.tokens)
    assert {text.count(sentence) for sentence in sentences} <= {1, 2}


def test_a_grid_has_every_length_at_every_depth_with_keys_of_their_own(
    scripts, tokenizer, sentences
):
    depths = (0.0, 0.5, 1.0)
    samples = list(scripts.passkey.make_grid(tokenizer, (211, 307), depths, 2, sentences=sentences))
    assert [len(s.tokens) for s in samples] == [211] * 6 + [307] * 6
    assert [s.depth for s in samples] == [0.0, 0.5, 1.0] * 4
    assert len({s.key for s in samples}) == 12
    assert len({s.seed for s in samples}) == 12


def test_an_answer_is_the_key_and_no_longer_number(scripts, tokenizer, sentences):
    sample = scripts.passkey.make_sample(tokenizer, 211, 0.5, "s", sentences=sentences)
    assert sample.is_right(f" {sample.key}. And so on")
    assert sample.is_right(sample.key)
    assert not sample.is_right(f" {sample.key}7")
    assert not sample.is_right(f" {sample.key[:-1]}.")
    assert not sample.is_right(f" no {sample.key}")


def test_passkeys_that_cannot_be_are_refused(scripts, tokenizer, sentences):
    with pytest.raises(ConfigError, match="question alone have"):
        scripts.passkey.make_sample(tokenizer, 11, 0.5, "s", sentences=sentences)
    with pytest.raises(ConfigError, match="depth is 1.1"):
        scripts.passkey.make_sample(tokenizer, 211, 1.1, "s", sentences=sentences)


def test_filler_is_whole_sentences_of_docstrings_without_long_numbers(scripts, tmp_path):
    assert set(scripts.passkey.find_sentences(SOURCE.encode())) == {
        "Words of a module that are long enough to be a sentence.",
        "The first line of a class has seven words, e.g. these.",
    }
    assert not list(scripts.passkey.find_sentences(b"def f(:\n"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text(SOURCE, encoding="utf-8")
    words = "abcdefghijklmnopqrstuvw"
    body = "\n".join(f'def {w}():\n    "This {w} is what a function says it does."' for w in words)
    (tmp_path / "b.py").write_text(body, encoding="utf-8")
    train, test = (scripts.passkey.load_sentences(split, tmp_path) for split in ("train", "test"))
    assert len(train) + len(test) == len({*train, *test}) == len(words)
    assert min(len(train), len(test)) > 3


def read_whole(model: LlamaForCausalLM, scripts: SimpleNamespace, tokens: np.ndarray) -> np.ndarray:
    inputs, targets = scripts.sliding.make_inputs(tokens, START_TOKEN)
    with torch.no_grad():
        return compute_token_nats(model(inputs).logits, targets)[0].numpy()


@pytest.mark.parametrize("keeps_start", [False, True])
@pytest.mark.parametrize("window", [113, 127])
def test_a_window_of_the_whole_document_is_the_model_itself(
    scripts, model, tokens, window, keeps_start
):
    nats = scripts.sliding.compute_window_nats(
        model, tokens, START_TOKEN, window, keeps_start=keeps_start, block_len=17
    )
    np.testing.assert_allclose(nats, read_whole(model, scripts, tokens), atol=1e-5)


@pytest.mark.parametrize("block_len", [1, 7, 13, 14, 113])
def test_a_window_is_the_same_however_the_document_is_cut(scripts, model, tokens, block_len):
    read = scripts.sliding.compute_window_nats
    whole = read(model, tokens, START_TOKEN, 13, block_len=127)
    np.testing.assert_allclose(
        read(model, tokens, START_TOKEN, 13, block_len=block_len), whole, atol=1e-5
    )
    assert np.abs(whole - read_whole(model, scripts, tokens))[13:].max() > 0.1


@pytest.mark.parametrize("keeps_start", [False, True])
def test_a_token_sees_the_window_and_nothing_before(scripts, model, tokens, keeps_start):
    layers, window, changed = len(model.model.layers), 13, 41
    other = tokens.copy()
    other[changed] = (other[changed] + 1) % VOCAB_SIZE
    first, second = (
        scripts.sliding.compute_window_nats(
            model, t, START_TOKEN, window, keeps_start=keeps_start, block_len=17
        )
        for t in (tokens, other)
    )
    # As an input it is one place later than as a target; layers pass on what the last one saw.
    last = changed + 1 + layers * (window - 1)
    differs = np.abs(first - second) > 1e-6
    assert not differs[:changed].any()
    assert differs[changed]
    assert differs[last]
    assert not differs[last + 1 :].any()


def test_a_start_that_is_kept_is_seen_by_all(scripts, model, tokens):
    far = slice(len(model.model.layers) * 13 + 1, None)
    for keeps_start in (False, True):
        first, second = (
            scripts.sliding.compute_window_nats(
                model, tokens, start, 13, keeps_start=keeps_start, block_len=17
            )
            for start in (START_TOKEN, START_TOKEN + 2)
        )
        differs = np.abs(first - second)[far] > 1e-6
        assert differs.all() if keeps_start else not differs.any()


def test_windows_that_cannot_be_are_refused(scripts, model, tokens):
    with pytest.raises(ConfigError, match="window is 0"):
        scripts.sliding.compute_window_nats(model, tokens, START_TOKEN, 0)


def test_what_is_held_out_is_held_out_in_the_recipes_too(scripts):
    for family, uses in scripts.documents.NAMES.items():
        recipe = tomllib.loads((EXPERIMENTS / "recipes" / f"{family}.toml").read_text())["data"]
        assert set(uses["test"]) <= set(recipe["test"])
        assert set(uses["validation"]) <= set(recipe["validation"])
        assert not set(uses["train"]) & {*recipe["test"], *recipe["validation"]}
        assert min(map(len, uses.values())) >= 2
        assert len(uses["test"]) == 4


def test_a_document_is_cut_at_its_tokens_and_has_their_bytes(scripts, backend, tmp_path):
    names = scripts.documents.NAMES["proofs"]
    (tmp_path / "proofs").mkdir()
    for name in names["test"] + names["train"]:
        text = f"Lemma {name} ∀ x. " * 419
        (tmp_path / "proofs" / name).write_text(text, encoding="utf-8")
    tokenizer = Tokenizer(backend)
    found = scripts.documents.load_documents(
        "proofs", "test", tokenizer, corpora=tmp_path, max_tokens=1009
    )
    assert tuple(document.name for document in found) == names["test"]
    for document in found:
        assert len(document.tokens) == 1009
        whole = (tmp_path / "proofs" / document.name).read_bytes()
        assert whole.startswith(document.text.rstrip("\ufffd").encode())
        assert document.num_bytes == int(tokenizer.token_bytes[document.tokens].sum())
    pieces = scripts.documents.load_documents(
        "proofs", "train", tokenizer, corpora=tmp_path, max_tokens=503, num_pieces=3
    )
    assert [p.name for p in pieces[:3]] == [names["train"][0] + end for end in ("", "#2", "#3")]
    whole = (tmp_path / "proofs" / names["train"][0]).read_text(encoding="utf-8")
    expected = tokenizer.encode(whole)[:1509]
    assert np.concatenate([p.tokens for p in pieces[:3]]).tolist() == expected.tolist()


def test_documents_that_are_not_there_are_named(scripts, backend, tmp_path):
    (tmp_path / "proofs").mkdir()
    (tmp_path / "proofs" / "hol_Logic.txt").write_text("Lemma", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"lacks hol_Rqe\.txt.*build\.py proofs"):
        scripts.documents.load_documents("proofs", "test", Tokenizer(backend), corpora=tmp_path)
    with pytest.raises(CorpusError, match=r"build\.py code"):
        scripts.documents.load_documents("code", "test", Tokenizer(backend), corpora=tmp_path)
    with pytest.raises(ConfigError, match="num_pieces is 2"):
        scripts.documents.load_documents(
            "code", "test", Tokenizer(backend), corpora=tmp_path, num_pieces=2
        )


@pytest.mark.parametrize("num_tokens", [211, 216, 222, 223, 229])
def test_the_last_piece_of_a_passkey_holds_the_question_or_the_answer(
    scripts, tokenizer, sentences, num_tokens
):
    module, segment_len = scripts.passkey_test, 37
    samples = [
        scripts.passkey.make_sample(tokenizer, num_tokens, 0.3, seed, sentences=sentences)
        for seed in "ab"
    ]
    batch = module.make_batch(samples, START_TOKEN)
    num_answer = batch.answers.shape[1]
    assert batch.inputs.shape == (2, num_tokens + num_answer)
    assert batch.inputs[:, 0].tolist() == [START_TOKEN] * 2
    filler, question = module.split_batch(batch, segment_len)
    assert filler.shape[1] % segment_len == 0
    assert num_answer <= question.shape[1] < segment_len + num_answer
    assert torch.cat([filler, question], 1).tolist() == batch.inputs.tolist()
    # The first of them predicts the answer's first token.
    assert question[:, 1 - num_answer :].tolist() == batch.answers[:, :-1].tolist()


@pytest.mark.parametrize("num_tokens", [92, 93, 94, 145, 211, 307])
def test_without_memory_nothing_out_of_reach_of_all_layers_matters(scripts, num_tokens):
    module = scripts.passkey_test
    model = make_model(VOCAB_SIZE, max_position_embeddings=65)
    tokens = random.Random(num_tokens).choices(range(VOCAB_SIZE), k=num_tokens)
    sample = scripts.passkey.PasskeySample(tokens, [0] * 5, "", 0.0, 0, "")
    add_memory(model, [1], read="entries", window=13, num_sinks=2, num_neighbors=7, capacity=64)
    shown = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shown.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    whole = module.ask_without_memory(model, START_TOKEN, sample, cut=False)
    num_read, shown[:] = sum(shown), []
    assert module.ask_without_memory(model, START_TOKEN, sample) == whole
    handle.remove()
    assert sum(shown) == num_read - max(0, num_tokens + 1 - 2 - 39) // 52 * 52


def test_a_model_is_asked_for_what_only_its_memory_holds(scripts, tokenizer, sentences):
    module = scripts.passkey_test
    model = make_model(307)
    add_memory(
        model, [1], read="entries", window=83, num_sinks=2, num_neighbors=7, capacity=64, bias=20.0
    )
    samples = [
        scripts.passkey.make_sample(tokenizer, 307, 0.0, "s", sentences=sentences),
        scripts.passkey.make_sample(tokenizer, 307, 0.0, "t", sentences=sentences),
    ]
    # The same end, which is all that goes through the model when it is asked.
    ends = [replace(s, tokens=[*s.tokens[:-83], *samples[0].tokens[-83:]]) for s in samples]
    said = [module.read_and_ask(model, tokenizer, START_TOKEN, end) for end in ends]
    assert said[0] != said[1]
    assert said[0] == module.read_and_ask(model, tokenizer, START_TOKEN, ends[0])


def test_a_key_that_the_prompt_shows_is_not_asked_for(scripts, model, tokenizer, sentences):
    sample = scripts.passkey.make_sample(tokenizer, 211, 1.0, "s", sentences=sentences)
    add_memory(model, [1], read="entries", window=83, num_sinks=2, num_neighbors=7, capacity=64)
    try:
        with pytest.raises(ConfigError, match="no memory is needed to see it"):
            scripts.passkey_test.read_and_ask(model, tokenizer, START_TOKEN, sample)
    finally:
        remove_memory(model)


def test_runs_are_compared_on_what_both_have_read(scripts):
    rng = np.random.default_rng(0)
    base = {"a": rng.random(211), "b": rng.random(307)}
    nats = {
        0: {"plain": base, "memory": {"a": base["a"][:101] - 0.1, "b": base["b"] - 0.1}},
        1: {"plain": base, "memory": {"a": base["a"] - 0.3}},
        2: {"plain": base, "memory": {}},
    }
    found = scripts.finetuned.compare_seeds(nats, "memory")
    assert found.keys() == {"0", "1", "all"}
    assert found["0"]["num_tokens"] == 101 + 307
    assert found["0"]["nats_per_token"] == pytest.approx(-0.1)
    assert found["all"]["documents"] == ["a"]
    assert found["all"]["nats_per_token"] == pytest.approx(-0.2)
    assert scripts.finetuned.compare_seeds({0: {"plain": base, "off": {}}}, "off") == {}


def test_no_training_document_is_read_twice(scripts):
    module = scripts.finetuned
    num_tokens = module.SETTINGS.steps * module.SETTINGS.rows * 512
    for family, pieces in module.TRAIN_PIECES.items():
        available = len(scripts.documents.NAMES[family]["train"]) * pieces * module.TRAIN_TOKENS
        assert available >= num_tokens


def test_the_recall_of_real_keys_is_that_of_an_exact_search(scripts, model, tokens):
    module = scripts.search_and_storage
    long = np.concatenate([tokens] * 11)
    document = scripts.documents.ReadDocument("d", "", long, 0)
    queries, keys = module.collect(model, document, START_TOKEN, [0, 1])[1]
    assert queries.shape == (1, 6, module.NUM_QUERIES, 4)
    assert keys.shape == (1, 2, len(long) - module.NUM_QUERIES, 4)
    recalls = module.compare_indexes(queries, keys)
    assert recalls.keys() == set(module.INDEXES)
    assert recalls["exact"] == 1.0
