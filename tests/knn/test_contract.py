"""What every index promises, for all of them: `KeyIndex`, compared with a deque."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from memorizing.errors import NonFiniteQueryError, StateError
from memorizing.index_settings import list_indexes, parse_index
from memorizing.knn import Neighbors, make_index, recall_at_k
from tests.knn.ring import Ring, draw_keys

# Options that use blocks at these sizes, and the least recall on random and on clustered keys.
INDEXES = {
    "exact": ("exact", 1.0, 1.0),
    "buckets": ("buckets:num_buckets=64,per_bucket=2", 0.9, 0.9),
    "int8": ("int8", 0.99, 0.99),
    "faiss_flat": ("faiss_flat:block_len=53", 1.0, 1.0),
    "faiss_fp16": ("faiss_fp16:block_len=53", 1.0, 1.0),
    "faiss_int8": ("faiss_int8:block_len=53", 0.99, 0.99),
    "faiss_ivf": ("faiss_ivf:block_len=127,num_lists=3,num_probes=2", 0.83, 0.97),
    "faiss_hnsw": ("faiss_hnsw:block_len=53,num_links=5,ef_search=29", 0.96, 0.97),
    "scann": ("scann:block_len=103,num_leaves=2,leaves_to_search=2,oversample=5", 0.97, 0.97),
}

ROWS, HEADS, CAPACITY, DIM, QUERIES, K = 2, 3, 331, 17, 5, 7
SHAPE = (ROWS, HEADS, CAPACITY, DIM)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=INDEXES)
def index(request: pytest.FixtureRequest) -> str:
    """The text of an index, skipped where its package is not installed."""
    package = request.param.partition("_")[0]
    if package in ("faiss", "scann") and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return request.param if ":" in request.param else INDEXES[request.param][0]


def draw_queries(seed: int = 1, num_queries: int = QUERIES, clusters: int = 0) -> torch.Tensor:
    return draw_keys(ROWS, HEADS, num_queries, DIM, seed=seed, clusters=clusters)


def fill(index: str, num_keys: int, dtype: torch.dtype = torch.float32, clusters: int = 0) -> Ring:
    ring = Ring(index, SHAPE, dtype)
    ring.append(draw_keys(ROWS, HEADS, num_keys, DIM, clusters=clusters))
    return ring


def assert_same(mine: Neighbors, other: Neighbors) -> None:
    assert torch.equal(mine.slots, other.slots)
    assert torch.equal(mine.scores, other.scores)
    assert torch.equal(mine.valid, other.valid)


def test_every_index_is_tested_here() -> None:
    assert list(INDEXES) == list_indexes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_valid_and_their_scores_true(index: str, dtype: torch.dtype) -> None:
    ring = fill(index, 281, dtype)
    found = ring.search(draw_queries(), K)
    assert found.valid.all()


@pytest.mark.parametrize("clusters", [0, 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recall_reaches_its_floor(index: str, dtype: torch.dtype, clusters: int) -> None:
    ring = fill(index, 281, dtype, clusters)
    floor = INDEXES[index.partition(":")[0]][2 if clusters else 1]
    queries = draw_queries(num_queries=23, clusters=clusters)
    recall = ring.measure_recall(queries, K)
    ring.index.seal(ring.stored)
    sealed_recall = ring.measure_recall(queries, K)
    assert min(recall, sealed_recall) >= floor


def test_rows_and_heads_are_apart(index: str) -> None:
    keys = draw_keys(ROWS, HEADS, 281, DIM)
    pole = draw_queries()[0, 0, 0]
    hidden_at = 40 * torch.arange(ROWS * HEADS).view(ROWS, HEADS)
    for row in range(ROWS):
        for head in range(HEADS):
            keys[row, head, hidden_at[row, head]] = 3 * pole
    ring = Ring(index, SHAPE)
    ring.append(keys)
    found = ring.search(pole.expand(ROWS, HEADS, 1, DIM), K)
    assert torch.equal(found.slots[:, :, 0, 0], hidden_at)


@pytest.mark.parametrize("sealed", [False, True], ids=["appended", "sealed"])
@pytest.mark.parametrize("size", [0, 1, K - 1, K, K + 1])
def test_a_nearly_empty_memory_gives_what_it_has(index: str, size: int, sealed: bool) -> None:
    ring = fill(index, size)
    if sealed:
        ring.index.seal(ring.stored)
    found = ring.search(draw_queries(), K)
    assert int(found.valid.sum()) == ROWS * HEADS * QUERIES * min(size, K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_keys_are_found_once_each(index: str, dtype: torch.dtype) -> None:
    ring = Ring(index, SHAPE, dtype)
    ring.append(draw_keys(ROWS, HEADS, 1, DIM).expand(ROWS, HEADS, 281, DIM))
    found = ring.search(draw_queries(), K)
    assert found.valid.all()
    # Equal sums, but perhaps in another order.
    torch.testing.assert_close(found.scores[..., :1].expand_as(found.scores), found.scores)


def test_asking_for_more_than_there_is_gives_everything(index: str) -> None:
    ring = fill(index, 281)
    found = ring.search(draw_queries(), 307)
    assert (found.valid.sum(-1) == 281).all()


@pytest.mark.parametrize("size", [11, 281])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_not_finite_is_refused(index: str, wrong: float, size: int) -> None:
    ring = fill(index, size)
    queries = draw_queries()
    queries[1, 2, 3, 5] = wrong
    with pytest.raises(StateError, match="query 3 of row 1, head 2"):
        ring.search(queries, K)


def test_a_query_that_overflows_the_dtype_of_the_keys_is_refused(index: str) -> None:
    ring = fill(index, 281, torch.float16)
    with pytest.raises(NonFiniteQueryError, match="torch.float16"):
        ring.search(draw_queries() * 1e6, K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_is_not_finite_is_refused_or_never_returned(
    index: str, dtype: torch.dtype
) -> None:
    ring = Ring(index, SHAPE, dtype)
    keys = draw_keys(ROWS, HEADS, 211, DIM)
    keys[1, 2, 97, 3] = torch.nan
    try:
        ring.append(keys)
    except StateError:
        return
    found = ring.index.search(draw_queries(), ring.stored, K)
    assert not found.scores.isnan().any()
    assert (found.valid == (found.scores > -torch.inf)).all()
    assert (found.slots[~found.valid] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_agrees_with_a_deque_through_three_wraps(index: str, dtype: torch.dtype) -> None:
    ring = Ring(index, SHAPE, dtype)
    generator = torch.Generator().manual_seed(5)
    total = [0] * ROWS
    step = 0
    while min(total) < 3 * CAPACITY + 1:
        step += 1
        longest = 2 * CAPACITY if step % 7 == 0 else 149
        num_new = int(torch.randint(1, longest, (), generator=generator))
        rows = [[0], [1], [0, 1]][step % 3]
        ring.append(draw_keys(ROWS, HEADS, num_new, DIM, seed=step), rows)
        for row in rows:
            total[row] += num_new
        num_hidden = torch.randint(0, CAPACITY + 9, (ROWS, QUERIES), generator=generator)
        queries = draw_queries(seed=1000 + step)
        ring.search(queries, K, num_hidden if step % 2 else None)
        if step == 5:
            ring.reset(1)
            assert not ring.search(queries, K).valid[1].any()
        if step == 6:
            ring.index.seal(ring.stored)
            ring.search(queries, K, num_hidden)
    assert ring.measure_recall(draw_queries(), K) >= INDEXES[index.partition(":")[0]][1]


@pytest.mark.parametrize("num_keys", [281, 401])
def test_hidden_entries_are_not_found_and_others_are(index: str, num_keys: int) -> None:
    ring = fill(index, num_keys)
    size = min(num_keys, CAPACITY)
    num_hidden = torch.tensor([[0, 1, 19, size - K, size], [size - 1, size + 3, 67, 131, 5]])
    found = ring.search(draw_queries(), K, num_hidden)
    recall = recall_at_k(found, draw_queries(), ring.stored, num_hidden=num_hidden)
    assert recall >= INDEXES[index.partition(":")[0]][1]


def test_a_row_may_search_another_or_none(index: str) -> None:
    ring = fill(index, 281)
    ring.append(draw_keys(ROWS, HEADS, 59, DIM, seed=3), rows=[1])
    queries = draw_queries()
    own = ring.search(queries, K)
    swapped = ring.search(queries.flip(0), K, key_rows=[1, 0])
    assert torch.equal(swapped.slots.flip(0), own.slots)
    closed = ring.search(queries, K, key_rows=[None, 1])
    assert not closed.valid[0].any()
    assert torch.equal(closed.slots[1], own.slots[1])
    both = ring.search(queries, K, key_rows=[1, 1])
    assert torch.equal(both.slots[1], own.slots[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_saved_searches_alike(index: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ring = fill(index, 401, dtype)
    queries = draw_queries()
    before = ring.search(queries, K)
    ring.index.save(tmp_path / "index", ring.stored)
    ring.index = make_index(parse_index(index))
    ring.index.load(tmp_path / "index", ring.stored)
    assert_same(ring.search(queries, K), before)
    ring.append(draw_keys(ROWS, HEADS, 157, DIM, seed=2))
    ring.search(queries, K)


def test_a_sealed_memory_can_be_appended_to(index: str) -> None:
    ring = fill(index, 281)
    ring.index.seal(ring.stored)
    for step in range(7):
        ring.append(draw_keys(ROWS, HEADS, 31, DIM, seed=step))
        ring.search(draw_queries(), K)


def test_two_threads_find_what_one_finds(index: str) -> None:
    ring = fill(index, 401)
    queries = [draw_queries(seed) for seed in range(8)]
    before = torch.get_num_threads()
    # More threads than queries: libraries then search heads side by side.
    torch.set_num_threads(QUERIES + 1)
    try:
        wide = [ring.index.search(asked, ring.stored, K) for asked in queries]
    finally:
        torch.set_num_threads(before)
    alone = [ring.index.search(asked, ring.stored, K) for asked in queries]
    for mine, other in zip(wide, alone, strict=True):
        assert torch.equal(mine.slots, other.slots)
    with ThreadPoolExecutor(2) as pool:
        together = pool.map(lambda asked: ring.index.search(asked, ring.stored, K), queries * 2)
        for mine, other in zip(together, alone * 2, strict=True):
            assert_same(mine, other)


def test_searching_changes_nothing(index: str) -> None:
    ring = fill(index, 401)
    queries = draw_queries()
    keys, before = ring.keys.clone(), queries.clone()
    first = ring.search(queries, K)
    ring.search(draw_queries(seed=9), K, torch.full((ROWS, QUERIES), 13))
    assert_same(ring.search(queries, K), first)
    assert torch.equal(ring.keys, keys)
    assert torch.equal(queries, before)
