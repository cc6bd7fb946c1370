"""The fast search against the plain one."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memorizing.knn import packed
from memorizing.knn.packed import can_pack, search_packed
from memorizing.knn.plain import search_plainly, sort_newest_first

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(
    heads: int, queries: int, slots: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, queries, dim, generator=generator).to(dtype)
    return q, torch.randn(heads, slots, dim, generator=generator).to(dtype)


def compare(queries: Tensor, keys: Tensor, k: int, newest: int, hidden: Tensor | None) -> None:
    """Same scores; slots of these scores, each once; for fp32 the same slots."""
    scores, slots = search_packed(queries, keys, k, newest, hidden)
    expected, expected_slots = search_plainly(queries, keys, k, newest, hidden)
    found = scores > -math.inf
    if keys.dtype == torch.float32:
        assert torch.equal(slots[found], expected_slots[found])
    rounding = torch.finfo(scores.dtype).eps if scores.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(scores.float(), expected, rtol=rounding, atol=1e-4)
    true = (queries.float() @ keys.float().transpose(-1, -2)).gather(-1, slots.where(found, 0))
    torch.testing.assert_close(scores.float()[found], true[found], rtol=rounding, atol=1e-4)
    apart = slots.where(found, -1 - torch.arange(k)).sort(-1).values
    assert (apart.diff() > 0).all()


@pytest.fixture(params=[False, True], ids=["multiplied", "emulated"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a processor that multiplies 16-bit floats itself, and as on one that does not."""
    monkeypatch.setattr(packed, "is_emulated", lambda _: request.param)
    return request.param


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("size", [1, 7, 541, 1031, 4099, 33_013])
def test_it_finds_what_the_plain_search_finds(dtype: torch.dtype, hides: bool, size: int) -> None:
    queries, keys = draw(2, 19, size, 11, dtype)
    hidden = torch.arange(19) * min(size, 40) // 19 if hides else None
    compare(queries, keys, min(7, size), size // 3, hidden)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 2000),
    k=st.integers(1, 40),
    num_queries=st.integers(1, 37),
    tile=st.sampled_from([64, 4096, 2**21]),
    workspace=st.sampled_from([4096, 2**17, 2**27]),
    num_top=st.sampled_from([1, 16, 256]),
)
def test_the_sizes_of_tiles_and_levels_change_nothing(
    size: int, k: int, num_queries: int, tile: int, workspace: int, num_top: int
) -> None:
    queries, keys = draw(2, num_queries, size, 5, torch.bfloat16, seed=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_TILE_BYTES", tile)
        patch.setattr(packed, "_WORKSPACE_BYTES", workspace)
        patch.setattr(packed, "_NUM_TOP", num_top)
        compare(queries, keys, min(k, size), size - 1, None)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_scores_of_both_signs_are_ordered(dtype: torch.dtype, share: float) -> None:
    queries, keys = draw(2, 19, 4099, 11, dtype)
    # All products are negative, but for a share of the keys.
    queries, keys = queries.abs(), -keys.abs()
    positive = torch.rand(4099, generator=torch.Generator().manual_seed(1)) < share
    keys[:, positive] *= -1
    compare(queries, keys, 13, 4098, None)


def test_equal_scores_of_fp32_keys_are_ordered_newest_first_across_buckets() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (2, 19, 3), generator=generator).float()
    keys = torch.randint(-1, 2, (2, 3001, 3), generator=generator).float()
    scores, slots = search_packed(queries, keys, 17, 1009, None)
    expected, expected_slots = search_plainly(queries, keys, 17, 1009, None)
    assert torch.equal(scores, expected)
    assert torch.equal(slots, expected_slots)


def test_more_neighbors_than_fit_the_packing_are_searched_plainly() -> None:
    keys = torch.zeros(1, 1, 5, 3)
    assert can_pack(2040, keys)
    assert not can_pack(2041, keys)
    assert not can_pack(3, keys.double())


def test_the_workspace_is_kept_and_stays_within_its_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "_local", threading.local())
    monkeypatch.setattr(packed, "_WORKSPACE_BYTES", 2**19)
    # All scores of a head would be 1.03 MB.
    queries, keys = draw(2, 64, 8192, 11, torch.bfloat16)
    search_packed(queries, keys, 7, 8191, None)
    first = packed._local.workspace.data_ptr()
    assert 2**18 < packed._local.workspace.numel() <= 2**19
    search_packed(queries, keys, 7, 8191, None)
    assert packed._local.workspace.data_ptr() == first


@pytest.mark.parametrize("num_queries", [1, 19])
def test_fp32_scores_are_sorted_in_full_only_for_ties(
    num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_shapes = []

    def sort(scores: Tensor, k: int, newest: int) -> tuple[Tensor, Tensor]:
        sorted_shapes.append(tuple(scores.shape))
        return sort_newest_first(scores, k, newest)

    monkeypatch.setattr(packed, "sort_newest_first", sort)
    queries, keys = draw(2, num_queries, 4099, 11, torch.float32)
    search_packed(queries, keys, 7, 4098, None)
    assert not sorted_shapes
    keys[0] = keys[0, :1]
    search_packed(queries, keys, 7, 4098, None)
    assert sum(shape[0] for shape in sorted_shapes) >= num_queries


def test_zeros_of_both_signs_are_equal() -> None:
    # Products that underflow keep the sign of their factors.
    queries = torch.full((1, 1, 1), 1e-30)
    keys = torch.tensor([[[1e-30], [-1e-30], [-1e-30]]])
    _, slots = search_packed(queries, keys, 3, 2, None)
    assert slots.flatten().tolist() == [2, 1, 0]


def draw_unlike(dtype: torch.dtype, size: int = 1031) -> tuple[Tensor, Tensor]:
    """Keys as those of existing models: large offsets that all share, and a few that draw all."""
    queries, keys = draw(2, 19, size, 13, torch.float32, seed=7)
    keys[..., 3] += 90
    keys[..., 5] -= 40
    keys[:, ::211] *= 3
    return (queries + 1).to(dtype), keys.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("draw_keys", [draw_unlike, lambda dtype: draw(2, 19, 1031, 13, dtype)])
def test_what_rounds_alike_is_told_apart(emulated: bool, dtype: torch.dtype, draw_keys) -> None:
    queries, keys = draw_keys(dtype)
    _, slots = search_packed(queries, keys, 11, 1030, None)
    true = queries.float() @ keys.float().transpose(-1, -2)
    kth = true.topk(11, dim=-1).values[..., -1:]
    assert (true.gather(-1, slots) >= kth - 1e-5 * kth.abs()).all()
    # Rounded scores alone would not do.
    rounded = true.to(dtype).topk(11, dim=-1).indices
    assert (true.gather(-1, rounded) < kth - 1e-5 * kth.abs()).any()


def test_equal_keys_cost_no_full_sort(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "sort_newest_first", None)
    queries, keys = draw(2, 19, 1, 11, torch.bfloat16)
    scores, slots = search_packed(queries, keys.expand(2, 4099, 11), 7, 4098, None)
    assert (scores == scores[..., :1]).all()
    assert (slots.sort(-1).values.diff() > 0).all()


def test_fp32_products_are_not_emulated() -> None:
    assert not packed.is_emulated(torch.float32)
