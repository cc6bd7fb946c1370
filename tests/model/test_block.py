"""One layer: short convolutions, and the start as an induction head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memorizing.errors import ConfigError
from memorizing.model import MemorizingTransformer
from tests.model.tools import SMALL, read


@pytest.mark.parametrize("mixing", [{}, {"smear_keys": False, "conv_len": 2}])
def test_an_untrained_induction_head_retrieves_what_followed_the_like_token(
    mixing: dict[str, object],
) -> None:
    torch.manual_seed(0)
    config = replace(
        SMALL, num_layers=1, memory_layers=(0,), induction_init=True, capacity=64, **mixing
    )
    model = MemorizingTransformer(config)
    # Three segments of different tokens; the fourth has some of them again.
    tokens = torch.tensor([[*range(21), 2, 19, 7, 11, 5, 9, 16]])
    _, state = read(model, tokens[:, :21])
    found = model(tokens[:, 21:], state, return_retrievals=True).retrievals[0]
    expected = torch.tensor([3, 20, 8, 12, 6, 10, 17])
    nearest = found.positions[0, :, :, 0]
    assert (nearest == expected).float().mean() > 0.9

    plain = MemorizingTransformer(replace(config, induction_init=False))
    _, state = read(plain, tokens[:, :21])
    found = plain(tokens[:, 21:], state, return_retrievals=True).retrievals[0]
    assert (found.positions[0, :, :, 0] == expected).float().mean() < 0.3


def test_a_longer_induction_head_tells_like_tokens_apart_by_what_precedes_them() -> None:
    torch.manual_seed(0)
    mixing = {"smear_keys": False, "conv_len": 4, "head_dim": 64, "model_dim": 64}
    config = replace(
        SMALL, num_layers=1, memory_layers=(0,), induction_init=True, capacity=64, **mixing
    )
    model = MemorizingTransformer(config)
    # Token 5 follows 1 2 at one place and 3 4 at another; which entry is nearest must depend on it.
    tokens = torch.tensor([[1, 2, 5, 20, 8, 9, 10, 3, 4, 5, 21, 11, 12, 13, 3, 4, 5, 1, 2, 5, 14]])
    _, state = read(model, tokens[:, :14])
    found = model(tokens[:, 14:], state, return_retrievals=True).retrievals[0]
    assert found.positions[0, :, 2, 0].tolist() == [10, 10]
    assert found.positions[0, :, 5, 0].tolist() == [3, 3]


def test_an_induction_head_needs_smeared_keys() -> None:
    with pytest.raises(ConfigError, match="smear_keys = true"):
        replace(SMALL, smear_keys=False, induction_init=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smear_keys": False, "conv_len": 1}, r"conv_len is 1.*2 and more"),
        ({"conv_len": 3}, "mixes keys already"),
    ],
)
def test_a_convolution_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changes)
