"""The arithmetic of a step, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memorizing.benchmark.step import (
    count_forward_flops,
    count_step_flops,
    count_window_pairs,
    make_large_product,
)
from memorizing.config import ModelConfig, load_config

CONFIG = ModelConfig(
    vocab_size=29,
    num_layers=2,
    model_dim=11,
    num_heads=3,
    head_dim=5,
    ffn_dim=13,
    segment_len=7,
    window=3,
    memory_layers=(1,),
    capacity=17,
    num_neighbors=2,
)


@pytest.mark.parametrize(
    ("segment_len", "window", "num_cached", "expected"),
    [
        (7, 3, 0, 1 + 2 + 3 * 5),
        (7, 3, 1, 2 + 3 * 6),
        (7, 3, 3, 3 * 7),
        (5, 11, 0, 1 + 2 + 3 + 4 + 5),
        (5, 11, 11, 11 * 5),
        (1, 1, 1, 1),
    ],
)
def test_pairs_are_those_inside_the_causal_window(
    segment_len: int, window: int, num_cached: int, expected: int
) -> None:
    assert count_window_pairs(segment_len, window, num_cached) == expected
    # Cached tokens and those of the segment side by side; the mask of local attention.
    query = torch.arange(segment_len).unsqueeze(1) + num_cached
    key = torch.arange(num_cached + segment_len)
    assert int(((key <= query) & (key > query - window)).sum()) == expected


def test_the_products_of_a_forward_pass_counted_by_hand() -> None:
    projections = 4 * 2 * 7 * 11 * 15
    feed_forward = 2 * 2 * 7 * 11 * 13
    attention = 2 * 2 * (7 * 3) * 15
    logits = 2 * 7 * 11 * 29
    expected = 2 * (projections + feed_forward + attention) + logits
    assert expected == 33_474
    assert count_forward_flops(CONFIG) == expected
    assert count_step_flops(CONFIG) == 3 * expected


def test_memory_counts_nothing_and_no_cache_counts_fewer_pairs() -> None:
    without = replace(CONFIG, memory_layers=(), capacity=0)
    assert count_forward_flops(without) == count_forward_flops(CONFIG)
    saved = 2 * 2 * 2 * (7 * 3 - (1 + 2 + 3 * 5)) * 15
    assert count_forward_flops(replace(CONFIG, xl_cache=False)) == 33_474 - saved


def test_a_step_of_the_papers_model_is_600_billion_operations() -> None:
    assert count_step_flops(load_config("paper_200m").model) == 603_174_469_632


def test_the_large_product_reuses_its_buffer() -> None:
    multiply, flops = make_large_product(19, torch.bfloat16)
    first, second = multiply(), multiply()
    assert first.data_ptr() == second.data_ptr()
    assert (first.shape, first.dtype, flops) == ((19, 19), torch.bfloat16, 2 * 19**3)
