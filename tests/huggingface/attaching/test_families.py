"""The laws of a model with memory, held by a tiny random model of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from memorizing.errors import ConfigError
from memorizing.huggingface import open_memory
from memorizing.huggingface.attaching.families import FAMILIES
from tests.huggingface.attaching.all_families import (
    ALL_CONFIGS,
    MAX_POSITIONS,
    NUM_SINKS,
    SEGMENT_LEN,
    WINDOW,
    make_config,
)
from tests.huggingface.tools import (
    give_memory,
    make_tokens,
    memory_open,
    naive_attention,
    read,
    shake_weights,
)

ZONE, OVERLAP = 5, 15
"""20 positions in whole segments, of which the window takes 15: zones begin every 5 from 20 on."""
NUM_TOKENS = 28
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
"""Sums of other lengths, and angles of other positions, round otherwise."""


def test_every_known_family_is_tested():
    assert ALL_CONFIGS.keys() == FAMILIES.keys()


# Of transformers' own GPTBigCode, up to 5.22.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", sorted(ALL_CONFIGS))
def test_a_family_keeps_all_laws(family: str):
    if family == "ministral3" and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(ConfigError, match="not told the positions of its tokens"):
            check_laws(family)
    else:
        check_laws(family)


def check_laws(family: str) -> None:
    """Nothing stored is the base bit for bit, all stored is dense attention, removed is as before.

    The text is longer than the window and than the positions of the model; its memory holds all
    that has left the window, and as many neighbors are retrieved.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **make_config(family)))
    shake_weights(model.eval())
    is_absolute = FAMILIES[family].positions == "learned" or family == "beam"
    num_tokens = MAX_POSITIONS // SEGMENT_LEN * SEGMENT_LEN if is_absolute else NUM_TOKENS
    tokens, short = make_tokens(1, num_tokens), make_tokens(2, SEGMENT_LEN)
    before = model.config._attn_implementation
    with torch.no_grad():
        base, base_short = model(tokens[:, :WINDOW]).logits, model(short).logits
        attachment = give_memory(
            model,
            layers=[1] if family in VARIED else list(range(model.config.num_hidden_layers)),
            window=WINDOW,
            segment_len=SEGMENT_LEN,
            num_sinks=NUM_SINKS,
            num_neighbors=37,
            capacity=41,
        )
        assert torch.equal(model(tokens[:, :WINDOW]).logits, base)
        with open_memory(model):
            assert torch.equal(model(short).logits, base_short)
        with memory_open(attachment):
            found = read(model, tokens, [5, 3, 2, 5, *([5] if is_absolute else [5, 5, 3])])
        with naive_attention(attachment, find_shift=find_shift) as naive:
            torch.testing.assert_close(found, naive(tokens, use_cache=False).logits, **TOLERANCE)
        assert model.config._attn_implementation == before
        assert torch.equal(model(tokens[:, :WINDOW]).logits, base)


def find_shift(t: int) -> int:
    """How far positions are moved back at token t."""
    return ZONE * max(0, (t - OVERLAP) // ZONE)


VARIED = {"gemma4_text", "gemma4_unified_text", "mimo_v2_flash"}
"""Heads of their full layers are of another size."""
