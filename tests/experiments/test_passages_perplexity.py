"""The table of windows, entries and passages, with a tiny model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memorizing import add_memory, remove_memory
from memorizing.huggingface.learning.calibration import EntryCalibration
from memorizing.huggingface.sessions.scoring import score_texts
from tests.huggingface.tools import shake_weights

PRETRAINED = Path(__file__).parents[2] / "experiments" / "pretrained"
CONTEXT_LEN, EVERY, START_TOKEN, NAME = 2048, 128, 5, "hol_Logic.txt"
TOKENS = CONTEXT_LEN + EVERY + 64


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(PRETRAINED))
    module = importlib.import_module("passages_perplexity")
    monkeypatch.setattr(module, "CONTEXT_LEN", CONTEXT_LEN)
    monkeypatch.setitem(module.WINDOWS, "native", CONTEXT_LEN)
    yield module
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(PRETRAINED)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=42,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=CONTEXT_LEN,
        bos_token_id=START_TOKEN,
    )
    model = LlamaForCausalLM(config).eval()
    shake_weights(model)
    return model


class Words:
    """A tokenizer whose tokens are words."""

    start_token = START_TOKEN

    def decode(self, tokens: list[int]) -> str:
        return " ".join(f"w{token}" for token in tokens)


@pytest.mark.parametrize("window", ["512", "native"])
def test_every_arm_scores_the_same_tokens_behind_the_same_text(script, model, window, tmp_path):
    pytest.importorskip("bm25s")
    rng = np.random.default_rng(0)
    text = rng.integers(0, 97, TOKENS).astype(np.int32)
    document = SimpleNamespace(name=NAME, tokens=text)
    options = SimpleNamespace(
        nats=tmp_path / "nats",
        tokens=TOKENS,
        every=EVERY,
        arms=[*script.ARMS, script.RIVAL],
        json=tmp_path / "result.json",
        device="cpu",
        precision="fp32",
    )
    heads = {1: (0, 3)}
    chosen = EntryCalibration(
        heads, (1,), {"window": 512, "bias": 2.0}, torch.zeros(1, 6), 1.0, 1.0
    )
    streams = script.plan_streams(window, options)
    assert sorted(sum(streams, [])) == sorted(
        arm for arm in options.arms if window != "native" or arm != script.RIVAL
    )
    for _ in range(2):
        for arms in streams:
            script.measure_stream(model, Words(), document, chosen, window, arms, options)
    found = {
        path.parent.name: np.load(path)["nats"] for path in options.nats.glob(f"{window}/*/*.npz")
    }
    assert set(found) == set(sum(streams, []))
    starts = [CONTEXT_LEN, CONTEXT_LEN + EVERY]
    # Positions begin again as early as where passages have room.
    add_memory(
        model,
        [1],
        window=script.WINDOWS[window],
        segment_len=script.BLOCK_LEN,
        read="entries" if window == "native" else "both",
    )
    (alone,) = score_texts(model, [text], START_TOKEN, control="off")
    remove_memory(model)
    wanted = np.stack([alone[start : start + script.PIECE] for start in starts])
    assert np.allclose(found["window"], wanted, atol=2e-4)
    for arm, nats in found.items():
        assert nats.shape == (2, script.PIECE)
        assert np.isfinite(nats).all()
        assert arm == "window" or abs(nats - found["window"]).max() > 1e-3
    values = script.report(options)
    line = values["rows"]["proofs"][window]["passages"]
    assert line["tokens"] == 2 * script.PIECE
    change = np.exp(found["passages"].mean() - found["window"].mean()) - 1
    assert line["changes"][window]["change"] == pytest.approx(change, rel=1e-4)
