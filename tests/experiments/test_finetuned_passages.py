"""Training with passages in sight: what stands before a text, and what a tiny model learns."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.passages import Collection
from memorizing.loss import compute_token_nats
from tests.experiments.test_pretrained import START_TOKEN, VOCAB_SIZE, make_model

PRETRAINED = Path(__file__).parents[2] / "experiments" / "pretrained"
NUM_TOKENS = 1999


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    before = set(sys.modules)
    sys.path.insert(0, str(PRETRAINED))
    try:
        yield importlib.import_module("finetuned_passages")
    finally:
        sys.path.remove(str(PRETRAINED))
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(PRETRAINED)):
                del sys.modules[name]


def make_package(script: Any, num_words: int) -> Any:
    ids = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(0)) % num_words
    return script.Package("one", tuple(ids.tolist()), Collection((NUM_TOKENS,), {}, lambda: ids))


def find(whole: tuple[int, ...], part: tuple[int, ...]) -> int:
    """Where a part begins."""
    (place,) = [n for n in range(len(whole)) if whole[n : n + len(part)] == part]
    return place


def test_passages_have_the_text_or_nothing_near_it_and_the_best_one_stands_last_and_twice(script):
    package = make_package(script, NUM_TOKENS)
    for number in range(19):
        drawn = {
            kind: script.draw_sample([package], START_TOKEN, kind, f"{number}")
            for kind in script.KINDS
        }
        (text,) = {one.text for one in drawn.values()}
        assert 64 <= len(text) <= 128
        place = find(package.tokens, text)
        assert drawn["alone"].before == (START_TOKEN,)
        # No word comes twice: all but the text itself is found by nothing.
        assert drawn["other"].before == (START_TOKEN,)
        start, *pasted = drawn["quoted"].before
        assert start == START_TOKEN
        best = tuple(pasted[-128:])
        assert tuple(pasted[-256:-128]) == best
        # It begins 32 tokens before a chunk of 32 that has words of the first 48.
        assert place - 64 < find(package.tokens, best) < place + script.PROMPT_LEN


def test_passages_that_are_other_do_not_overlap_the_text(script):
    package = make_package(script, VOCAB_SIZE)
    counts = set()
    for number in range(53):
        sample = script.draw_sample([package], START_TOKEN, "other", f"{number}")
        place, pasted = find(package.tokens, sample.text), sample.before[1:]
        parts = [pasted[n : n + 128] for n in range(0, len(pasted), 128)]
        assert parts[-1] == parts[-2]
        assert len(set(parts)) == len(parts) - 1
        counts.add(len(parts) - 1)
        for part in parts:
            start = find(package.tokens, part)
            assert start + 128 <= place or place + len(sample.text) <= start
    assert counts == {1, 2, 3, 4}


def test_what_is_learned_is_resumed_and_merged_into_the_weights(script, tmp_path, monkeypatch):
    package = make_package(script, VOCAB_SIZE)
    settings = replace(script.SETTINGS, steps=3, checkpoint_every=2, warmup_steps=1, lora_rank=2)
    base, *models = (make_model(VOCAB_SIZE, bos_token_id=START_TOKEN) for _ in range(4))
    script.train(models[0], [package], settings, tmp_path / "whole")
    save = script.save_checkpoint

    def save_and_interrupt(*words: Any) -> None:
        save(*words)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.train(models[1], [package], settings, tmp_path / "cut")
    script.train(models[2], [package], settings, tmp_path / "cut")
    sample = script.draw_sample([package], START_TOKEN, "quoted", "")
    tokens = torch.tensor([[*sample.before, *sample.text]])
    with torch.no_grad():
        untrained, whole, cut, resumed = (
            float(script.compute_nats(one, sample)) for one in (base, *models)
        )
        each = compute_token_nats(base(tokens).logits[:, :-1], tokens[:, 1:])[0]
        assert untrained == pytest.approx(float(each[-len(sample.text) :].mean()), abs=1e-5)
        assert whole == resumed
        assert len({untrained, whole, cut}) == 3
        script.write_merged(tmp_path / "model", base, models[0])
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
        assert float(script.compute_nats(merged, sample)) == pytest.approx(whole, abs=1e-4)
        assert abs(whole - untrained) > 1e-3
    other = replace(settings, steps=5)
    with pytest.raises(ConfigError, match="training with other settings"):
        script.train(make_model(VOCAB_SIZE, bos_token_id=1), [package], other, tmp_path / "cut")
