"""Memory beside copying: caches equal their plain versions, and a tiny pair of runs is compared."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.evaluation import evaluate_documents
from memorizing.metrics import compare_token_nats
from memorizing.training import load_model
from tests.experiments.pair_of_runs import NUM_TOKENS, SIZE
from tests.experiments.scripts import EXPERIMENTS, open_scripts


@pytest.fixture(scope="module")
def copying() -> Iterator[SimpleNamespace]:
    names = ("naive", "ngram", "knn_lm", "fitting", "measuring", "summary", "classes", "pairs")
    with open_scripts(EXPERIMENTS / "copying", names) as found:
        yield found


@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=41),
    capacity=st.sampled_from([None, 1, 2, 3, 7, 40, 41, 42]),
    longest=st.sampled_from([2, 5, 16]),
)
@settings(max_examples=60, deadline=None)
def test_all_matches_at_once_are_those_of_a_cache_that_grows_token_by_token(
    copying, tokens, capacity, longest
):
    found = copying.ngram.match_contexts(np.array(tokens), capacity, longest)
    cache = copying.naive.NGramCache(capacity or len(tokens), longest)
    for place, token in enumerate(tokens):
        length, distribution, count = cache.predict()
        assert (found.lengths[place], found.counts[place]) == (length, count)
        assert found.shares[place] == pytest.approx(distribution.get(token, 0.0))
        assert not distribution or sum(distribution.values()) == pytest.approx(1)
        for column, shorter in enumerate(copying.ngram.SHORTER):
            followers = cache.count_followers(min(shorter, length)) if length >= 0 else {}
            share = followers[token] / followers.total() if followers else 0.0
            assert found.shorter[place, column] == pytest.approx(share)
        lengths = [n for n in range(longest + 1) if cache.count_followers(n)[token]]
        assert found.followed[place] == max(lengths, default=-1)
        cache.add(token)


def test_a_match_by_hand(copying):
    # a b c, a b d, a b: the longest is "a b", once followed by c and once by d.
    found = copying.ngram.match_contexts(np.array([11, 7, 5, 11, 7, 3, 11, 7, 3]))
    assert found.lengths.tolist() == [-1, 0, 0, 0, 1, 2, 0, 1, 2]
    assert (found.counts[8], found.shares[8], found.followed[8]) == (2, 0.5, 2)
    assert found.shorter[8].tolist() == [1 / 8, 0.5, 0.5]
    assert found.followed.tolist() == [-1, -1, -1, 0, 1, -1, 0, 1, 2]


def test_a_token_changes_no_match_before_it(copying):
    tokens = np.random.default_rng(0).integers(0, 5, 97)
    changed = tokens.copy()
    changed[53] = 6
    matches = [copying.ngram.match_contexts(t, 31) for t in (tokens, changed)]
    for one, other in ((m.lengths, n.lengths) for m, n in [matches]):
        assert np.array_equal(one[:54], other[:54])
        assert not np.array_equal(one[54:], other[54:])
    assert np.array_equal(matches[0].shares[:53], matches[1].shares[:53])


@pytest.mark.parametrize("capacity", [1, 13, 29, 1000])
def test_neighbors_are_those_of_a_search_through_all_distances(copying, capacity):
    block_len, temperatures = 13, (0.7, 19.0)
    torch.manual_seed(0)
    # Of very different lengths: the largest products are not the smallest distances.
    states = (
        torch.randn(61, 5) * torch.linspace(0.3, 5, 61)[torch.randperm(61)][:, None]
    ).bfloat16()
    tokens = np.random.default_rng(0).integers(0, 3, 61)
    rows = states.float().tolist()
    for k in (3, 11):
        found = copying.knn_lm.predict(states, tokens, capacity, temperatures, k, block_len)
        for place, token in enumerate(tokens):
            oldest = max(place // block_len * block_len - capacity, 0)
            for j, temperature in enumerate(temperatures):
                wanted = copying.naive.predict_by_neighbors(
                    rows[place], rows[oldest:place], tokens[oldest:place], k, temperature
                )
                assert not wanted or sum(wanted.values()) == pytest.approx(1)
                # The naive sum is in fp64; distances here are differences of fp32 products.
                assert found[place, j] == pytest.approx(wanted.get(token, 0.0), abs=1e-5)


def test_the_weights_of_two_components_are_those_of_the_best_line(copying):
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.001, 1, (173, 2)) ** 3
    weights = copying.fitting.fit_weights(shares, np.zeros(173, np.int64), 1)
    line = np.linspace(0, 1, 2001)
    likelihoods = [np.log((1 - w) * shares[:, 0] + w * shares[:, 1]).sum() for w in line]
    assert weights[0, 1] == pytest.approx(line[int(np.argmax(likelihoods))], abs=0.01)


def test_no_weight_of_any_bucket_can_be_bettered(copying):
    rng = np.random.default_rng(0)
    buckets = rng.integers(0, 2, 20_011)
    shares = rng.uniform(0, 1, (20_011, 3)) ** 4
    shares[:, 0] += 1e-6
    shares[buckets == 0, 2] = 0  # of no use in this bucket
    weights = copying.fitting.fit_weights(shares, buckets, 3)
    assert weights.sum(1) == pytest.approx([1, 1, 1])
    total = (weights[buckets] * shares).sum(1)
    for bucket in (0, 1):
        inside = buckets == bucket
        slopes = (shares[inside] / total[inside, None]).mean(0)
        is_used = weights[bucket] > 0.01
        # At the maximum of a concave function over weights that sum to 1 (Karush-Kuhn-Tucker); the
        # prior moves it by 16 tokens in ten thousand.
        assert slopes[is_used] == pytest.approx(np.ones(is_used.sum()), abs=0.01)
        assert (slopes < 1.01).all()
    assert weights[0, 2] < 0.01
    # A bucket without a token has the weights of all.
    pooled = copying.fitting.fit_weights(shares, np.zeros_like(buckets), 1)
    assert weights[2] == pytest.approx(pooled[0], abs=0.01)


def test_buckets_are_all_combinations_of_ranges(copying):
    lengths, counts = np.array([-1, 0, 1, 2, 9]), np.array([0, 4, 1, 3, 2])
    buckets, num = copying.fitting.number_buckets((lengths, (1, 2)), (counts, (2, 3)))
    assert num == 9
    assert buckets.tolist() == [0, 2, 3, 8, 7]


def make_document(copying, rng: np.random.Generator, model: float, neighbors: float) -> Any:
    tokens = rng.integers(0, 7, 101).astype(np.int32)
    matches = copying.ngram.match_contexts(tokens)
    arrays = copying.measuring.DocumentArrays(
        "d", 5, tokens, rng.uniform(model / 2, model, 101), rng.uniform(0, neighbors, 101)
    )
    near = copying.ngram.match_contexts(tokens, 5)
    return copying.summary.Document(arrays, matches, near)


def test_weights_come_from_validation_documents_alone(copying):
    rng = np.random.default_rng(0)
    validation = [make_document(copying, rng, 0.3, 0.9)]
    test = [make_document(copying, rng, 0.3, 0.9), make_document(copying, rng, 0.9, 0.01)]
    for arm in copying.summary.ARMS.values():
        whole = copying.summary.predict_test(validation, test, arm)
        alone = copying.summary.predict_test(validation, test[:1], arm)
        assert np.array_equal(whole[0], alone[0])
    # What helped there hurts here.
    knn_lm = copying.summary.ARMS["knn_lm"]
    nats = copying.summary.predict_test(validation, test, knn_lm)
    models = [-np.log(document.arrays.model).mean() for document in test]
    assert nats[0].mean() < models[0]
    assert nats[1].mean() > models[1]


def test_before_the_first_token_there_is_the_model_alone(copying):
    rng = np.random.default_rng(0)
    documents = [make_document(copying, rng, 0.3, 0.9) for _ in range(2)]
    for arm in copying.summary.ARMS.values():
        nats = copying.summary.predict_test(documents, documents, arm)
        assert nats[0][0] == pytest.approx(-np.log(documents[0].arrays.model[0]))


def test_shares_of_the_gain_by_hand(copying):
    layout = copying.summary.Layout((4096 + 31, 4096, 17))
    assert layout.tokens.tolist() == [4096, 31, 4096, 17]
    assert layout.num_blocks == [2, 1, 1]
    make = lambda value: value * layout.tokens.astype(float)  # noqa: E731
    without = {"nothing": [make(3.0), make(3.2)], "ngram": [make(2.5), make(2.7)]}
    with_memory = {"nothing": [make(2.0), make(2.2)], "ngram": [make(1.9), make(2.1)]}
    row = copying.summary.summarize(without, with_memory, layout)["ngram"]
    assert row["share_of_gain"]["value"] == pytest.approx(0.5)
    assert row["share_left"]["value"] == pytest.approx(0.6)
    assert row["without"]["nats_per_token"] == pytest.approx(2.6)
    assert row["without"]["change"]["value"] == pytest.approx(np.expm1(-0.5))
    assert row["memory_on_top"]["value"] == pytest.approx(np.expm1(-0.6))
    assert row["it_on_memory"]["value"] == pytest.approx(np.expm1(-0.1))
    assert row["memory_against_it"]["value"] == pytest.approx(np.expm1(-0.5))
    assert row["with_memory"]["change_by_seed"] == pytest.approx([np.expm1(-1.1)] * 2)
    # Without a gain there is no share of it.
    worse = {name: [make(3.3)] * 2 for name in without}
    rows = copying.summary.summarize(without, worse, layout)
    assert np.isinf(rows["ngram"]["share_of_gain"]["low"])


def test_sums_over_blocks_are_those_of_tokens(copying):
    rng = np.random.default_rng(0)
    lens = (4096 * 2 + 31, 17, 5000)
    nats = [[rng.uniform(1, 3, n) for n in lens] for _ in range(2)]
    sums = [copying.summary.sum_blocks(part) for part in nats]
    layout = copying.summary.Layout(lens)
    row = copying.summary.summarize({"nothing": sums[:1]}, {"nothing": sums[1:]}, layout)["nothing"]
    expected = compare_token_nats(nats[1], nats[0])
    found = row["with_memory"]["change"]
    assert found["value"] == pytest.approx(expected.perplexity_change)
    assert (found["low"], found["high"]) == pytest.approx(expected.perplexity_interval)


def test_classes_hold_every_token_in_a_part_and_in_a_finer_one(copying):
    rng = np.random.default_rng(0)
    lens = (1009, 2003)
    layout = copying.summary.Layout(lens)
    followed = [rng.integers(-1, 17, n) for n in lens]
    seeds = []
    for gain in (1, 2):
        without = {name: [rng.uniform(2, 3, n) for n in lens] for name in ("nothing", "together")}
        with_memory = {name: [n - gain for n in nats] for name, nats in without.items()}
        seeds.append(copying.classes.sum_classes(without, with_memory, followed))
    rows = copying.classes.summarize_classes(seeds, layout)
    assert list(rows) == list(copying.classes.CLASSES)
    for part in (list(rows.values())[:2], list(rows.values())[2:]):
        assert sum(row["tokens"] for row in part) == sum(lens)
        assert sum(row["share_of_gain"] for row in part) == pytest.approx(1)
    inside = np.concatenate([np.isin(part, (2, 3)) for part in followed])
    row = rows["2 to 3"]
    assert row["tokens"] == inside.sum()
    assert row["share_of_tokens"] == pytest.approx(inside.mean())
    # The last seed's, and the first one's: 2.5 on average, less 1 and 2 with memory.
    assert row["without"]["nothing"] - row["with_memory"]["nothing"] == pytest.approx(1.5)
    last = np.concatenate(without["together"])[inside].mean()
    first = seeds[0]["2 to 3"]["without"]["together"] / inside.sum()
    assert row["without"]["together"] == pytest.approx((first + last) / 2)
    for row in rows.values():
        assert row["memory"]["value"] == pytest.approx(np.expm1(-1.5))
        assert row["memory_on_top"]["value"] == pytest.approx(np.expm1(-1.5))


def run_script(copying, runs: Path, folder: Path, *more: str) -> int:
    places = ["--runs", runs, "--arrays", folder / "arrays", "--pairs", folder / "pairs"]
    places += ["--json", folder / "copying.json"]
    fixed = ["--families", "tiny", "--seeds", "0", "--capacities", SIZE, "--device", "cpu"]
    return copying.main.main([str(part) for part in [*places, *fixed, *more]])


@pytest.fixture(scope="module")
def measured(copying, runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrays and tables of both runs."""
    folder = tmp_path_factory.mktemp("measured")
    assert run_script(copying, runs, folder) == 0
    return folder


def test_the_tables_say_what_was_kept_and_what_memory_changes(copying, runs, measured):
    values = json.loads((measured / "copying.json").read_text())["families"]["tiny"]
    table = values["sizes"][str(SIZE)]
    assert table["bytes"] == {
        "total": SIZE * 2 * 2 * 7 * 2,
        "per_token": {"memory": 56, "ngram": 6, "knn_lm": 2 * 13 + 2},
        "tokens_kept": {"memory": SIZE, "ngram": 270, "knn_lm": 2 * SIZE},
    }
    assert values["documents"] == {f"test{i}.txt": NUM_TOKENS for i in (1, 2)}
    nats = {}
    for arm, capacity in (("cache", 0), ("memory", SIZE)):
        run_dir = runs / "main" / f"tiny-{arm}-seed0"
        loaded, documents = load_model(run_dir), []
        for number in (0, 1):
            path = measured / "arrays" / run_dir.name / str(capacity) / "test" / f"{number}.npz"
            with np.load(path) as file:
                documents.append(SimpleNamespace(name="", tokens=file["tokens"], num_bytes=1))
        result = evaluate_documents(
            loaded.model, documents, loaded.tokenizer.start_token, capacity=capacity
        )
        nats[arm] = [document.token_nats for document in result.documents]
    change = compare_token_nats(nats["memory"], nats["cache"]).perplexity_change
    # Side by side, sums round otherwise than in one document alone.
    row = table["arms"]["nothing"]
    assert row["with_memory"]["change"]["value"] == pytest.approx(change, abs=1e-5)


def test_seeds_are_joined_from_what_is_kept_of_each(copying, runs, measured, tmp_path, capsys):
    shutil.copytree(measured / "pairs", tmp_path / "pairs")
    path = tmp_path / "pairs" / "tiny-seed0.json"
    pair = json.loads(path.read_text())
    other = copy.deepcopy(pair)
    sums = other["sizes"][str(SIZE)]["nats"]
    for arms in sums.values():
        for name, values in arms.items():
            arms[name] = [value + 0.5 * NUM_TOKENS for value in values]
    (tmp_path / "pairs" / "tiny-seed7.json").write_text(json.dumps(other))
    # No weights are needed, and nothing is measured, where both have a file.
    assert run_script(copying, tmp_path, tmp_path, "--seeds", "0", "7") == 0
    found = json.loads((tmp_path / "copying.json").read_text())["families"]["tiny"]
    alone = json.loads((measured / "copying.json").read_text())["families"]["tiny"]
    assert (found["seeds"], alone["seeds"]) == ([0, 7], [0])
    for arm, row in alone["sizes"][str(SIZE)]["arms"].items():
        both = found["sizes"][str(SIZE)]["arms"][arm]["with_memory"]
        assert both["nats_per_token"] == pytest.approx(row["with_memory"]["nats_per_token"] + 0.25)
        # Both arms of a seed are worse alike.
        assert both["change"]["value"] == pytest.approx(row["with_memory"]["change"]["value"])
    other["recipes"]["with_memory"]["model"]["num_heads"] = 3
    (tmp_path / "pairs" / "tiny-seed7.json").write_text(json.dumps(other))
    capsys.readouterr()
    assert run_script(copying, tmp_path, tmp_path) == 2
    assert "seed 7 has other recipes than that of seed 0" in capsys.readouterr().err


def test_what_is_measured_is_kept_until_the_choice_or_the_weights_are_others(
    copying, runs, measured, tmp_path, capsys
):
    shutil.copytree(measured / "arrays", tmp_path / "arrays")
    run_dir = runs / "main" / "tiny-cache-seed0"
    unit = copying.measuring.Unit(run_dir, tmp_path / "arrays" / run_dir.name / "0", 0, (SIZE,))

    def count_measured() -> int:
        copying.measuring.measure(unit)
        return capsys.readouterr().out.count("nats a token")

    assert count_measured() == 0
    kept = json.loads((unit.folder / "choice.json").read_text())
    assert [line["name"] for line in kept["made_from"]] == ["valid1.txt", "valid2.txt"]
    other = copy.deepcopy(kept)
    other["choices"][str(SIZE)]["temperature"] = 0.25
    (unit.folder / "choice.json").write_text(json.dumps(other))
    assert count_measured() == 2  # validation documents stay as they are
    other["made_from"][0]["weights"] = "others"
    (unit.folder / "choice.json").write_text(json.dumps(other))
    assert count_measured() == 2
    assert json.loads((unit.folder / "choice.json").read_text()) == kept
    (unit.folder / "validation" / "1.npz").unlink()
    assert count_measured() == 1


def test_models_of_other_tokens_and_runs_that_are_not_done_are_refused(
    copying, runs, tmp_path, capsys
):
    assert run_script(copying, tmp_path, tmp_path) == 2
    assert "python experiments/queue --run main/tiny-cache-seed0" in capsys.readouterr().err
    for arm, tokens in (("cache", 5), ("memory", 7)):
        (tmp_path / "main" / f"tiny-{arm}-seed0").mkdir(parents=True)
        path = tmp_path / "main" / f"tiny-{arm}-seed0" / "trained.json"
        path.write_text(json.dumps({"tokens": tokens}))
    assert run_script(copying, tmp_path, tmp_path) == 2
    assert "was trained on 5 tokens" in capsys.readouterr().err


def test_a_part_that_another_process_measures_is_left_to_it(
    copying, runs, measured, tmp_path, capsys
):
    shutil.copytree(measured / "arrays", tmp_path / "arrays")
    with copying.main.try_lock(
        tmp_path / "arrays" / "tiny-memory-seed0" / str(SIZE) / "lock"
    ) as is_mine:
        assert is_mine
        assert run_script(copying, runs, tmp_path) == 0
    assert "others measure the rest" in capsys.readouterr().out
    assert not (tmp_path / "copying.json").exists()
