"""Perplexity, bits per byte, buckets and the bootstrap, on cases counted by hand."""

import math

import numpy as np
import pytest

from memorizing.errors import ConfigError
from memorizing.metrics import (
    Difference,
    PositionBucket,
    Totals,
    bootstrap_ratio,
    bucket_by_position,
    compare_block_nats,
    compare_token_nats,
    compute_perplexity,
    draw_blocks,
)


def test_totals_of_two_texts_weigh_every_token_alike():
    joined = Totals(nats=3 * math.log(2), tokens=3, bytes=5) + Totals(
        nats=math.log(32), tokens=1, bytes=11
    )
    assert joined.perplexity == pytest.approx(
        4.0
    )  # (2 * 2 * 2 * 32) ** (1 / 4), no mean of means: 17
    assert joined.bits_per_byte == pytest.approx(8 / 16)


def test_bytes_that_are_not_known_stay_unknown():
    joined = Totals(1.0, 2, 3) + Totals(1.0, 2, None)
    assert joined.bytes is None
    assert math.isnan(joined.bits_per_byte)
    assert joined.perplexity == pytest.approx(math.exp(0.5))


def test_no_token_has_no_perplexity():
    assert math.isnan(Totals().perplexity)


def test_a_perplexity_that_no_float_holds_is_infinite():
    assert Totals(nats=1e6, tokens=2).perplexity == math.inf
    assert PositionBucket(0, None, 1e300, 1).perplexity == math.inf
    assert compute_perplexity(709.0) == math.exp(709.0)


def test_every_token_is_in_one_bucket():
    documents = [np.full(2, 1.0), np.full(3, 2.0), np.full(8, 3.0), np.zeros(0)]
    buckets = bucket_by_position(documents, edges=(2, 3, 7))
    assert [(b.start, b.end, b.tokens, b.nats) for b in buckets] == [
        (0, 2, 6, 12.0),
        (2, 3, 2, 5.0),
        (3, 7, 4, 12.0),
        (7, None, 1, 3.0),
    ]
    assert buckets[0].perplexity == pytest.approx(math.exp(2.0))


def test_a_bucket_that_no_document_reaches_is_left_out():
    assert [b.end for b in bucket_by_position([np.ones(3)], edges=(3, 5))] == [3]


@pytest.mark.parametrize("edges", [(0, 5), (5, 5), (7, 5)])
def test_edges_that_do_not_rise_are_refused(edges):
    with pytest.raises(ConfigError, match="rising"):
        bucket_by_position([np.ones(3)], edges)


def test_the_difference_is_weighted_by_tokens():
    nats = [np.array([1.0, 1.0, 1.0]), np.array([5.0])]
    baseline = [np.array([2.0, 2.0, 2.0]), np.array([1.0])]
    difference = compare_token_nats(nats, baseline, block_len=2)
    assert difference.nats_per_token == pytest.approx((-3 + 4) / 4)
    assert (difference.num_blocks, difference.num_tokens) == (3, 4)
    assert difference.perplexity_change == pytest.approx(math.exp(0.25) - 1)


def test_a_constant_difference_has_an_interval_of_no_width():
    baseline = [np.linspace(0, 3, 17), np.linspace(1, 2, 5)]
    difference = compare_token_nats([b - 0.125 for b in baseline], baseline, block_len=3)
    assert difference.low == pytest.approx(-0.125)
    assert difference.high == pytest.approx(-0.125)
    assert difference.excludes_zero


def test_noise_alone_does_not_exclude_zero_in_19_of_20_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        noise = [np.repeat(rng.normal(size=97), 11)]  # 11 tokens alike
        difference = compare_token_nats(
            noise, [np.zeros(97 * 11)], block_len=11, num_resamples=500, seed=seed
        )
        covered += not difference.excludes_zero
    assert 88 <= covered <= 99


def test_blocks_that_ignore_neighbors_would_be_too_sure():
    noise = [np.repeat(np.random.default_rng(5).normal(size=97), 11)]
    blocks = compare_token_nats(noise, [np.zeros(97 * 11)], block_len=11)
    tokens = compare_token_nats(noise, [np.zeros(97 * 11)], block_len=1, num_resamples=2000)
    assert blocks.high - blocks.low > 2.5 * (tokens.high - tokens.low)


def test_blocks_do_not_span_documents():
    assert (
        compare_token_nats(
            [np.ones(3), np.ones(3)], [np.zeros(3), np.zeros(3)], block_len=4
        ).num_blocks
        == 2
    )


def test_the_same_seed_gives_the_same_interval():
    nats, baseline = [np.random.default_rng(1).normal(size=101)], [np.zeros(101)]
    first, again = (compare_token_nats(nats, baseline, block_len=7, seed=2) for _ in range(2))
    assert first == again
    assert compare_token_nats(nats, baseline, block_len=7, seed=3).low != first.low


def test_a_single_block_has_no_interval():
    difference = compare_token_nats([np.ones(5)], [np.zeros(5)])
    assert (difference.low, difference.high) == (-math.inf, math.inf)
    assert not difference.excludes_zero
    assert difference.to_dict()["perplexity_low"] is None


@pytest.mark.parametrize(
    ("nats", "baseline"), [([np.ones(3)], [np.ones(4)]), ([np.ones(3)], []), ([], [])]
)
def test_other_tokens_cannot_be_compared(nats, baseline):
    with pytest.raises(ConfigError, match="same documents"):
        compare_token_nats(nats, baseline)


def test_an_interval_on_one_side_excludes_zero():
    assert Difference(-0.1, -0.2, -0.01, 7, 11).excludes_zero
    assert Difference(0.1, 0.01, 0.2, 7, 11).excludes_zero
    assert not Difference(0.1, -0.01, 0.2, 7, 11).excludes_zero


def test_sums_of_blocks_are_compared_as_their_tokens():
    rng = np.random.default_rng(7)
    nats, baseline = [rng.normal(3, 1, 17), rng.normal(3, 1, 5)], [np.full(17, 3), np.full(5, 3.0)]
    sums, theirs = (
        np.concatenate([np.add.reduceat(part, np.arange(0, len(part), 7)) for part in parts])
        for parts in (nats, baseline)
    )
    found = compare_block_nats(sums, theirs, np.array([7, 7, 3, 5]), (3, 1), seed=3)
    assert found == compare_token_nats(nats, baseline, block_len=7, seed=3)


def test_other_blocks_cannot_be_compared():
    with pytest.raises(ConfigError, match="3 and 2 blocks with 6 tokens in 3"):
        compare_block_nats(np.ones(3), np.ones(2), np.full(3, 2), (3,))


@pytest.mark.parametrize("num_blocks", [(2, 2), (3, 0), ()])
def test_blocks_that_are_not_those_of_the_documents_are_refused(num_blocks):
    with pytest.raises(ConfigError, match="give every document's blocks"):
        bootstrap_ratio(np.ones(3), np.ones(3), num_blocks)


def test_a_ratio_that_all_blocks_share_has_an_interval_of_no_width():
    denominators = np.array([1.0, 5.0, 2.0])
    assert bootstrap_ratio(denominators * 0.25, denominators, (1, 2)) == (0.25, 0.25)
    assert bootstrap_ratio(np.ones(1), np.ones(1), (1,)) == (-math.inf, math.inf)


def test_documents_are_drawn_before_their_blocks():
    """Two documents that differ throughout: half of the draws are of one of them alone."""
    nats = [np.full(13 * 11, 3.0), np.zeros(0), np.full(13 * 11, 2.0)]
    baseline = [np.full(len(part), 2.5) for part in nats]
    found = compare_token_nats(nats, baseline, block_len=11)
    assert found.nats_per_token == 0
    assert (found.low, found.high) == (-0.5, 0.5)
    blocks = compare_token_nats(
        [np.concatenate(nats)], [np.concatenate(baseline)], block_len=11
    )  # of one document
    assert max(-blocks.low, blocks.high) < 0.3


def test_documents_that_are_alike_cover_the_truth_in_19_of_20_cases():
    """Each document has a difference of its own, which its blocks share but for some noise."""
    rng = np.random.default_rng(0)
    covered = covered_by_blocks = 0
    for seed in range(100):
        sums = (rng.normal(size=(31, 1)) + 0.1 * rng.normal(size=(31, 7))).ravel()
        tokens = np.ones(len(sums))
        low, high = bootstrap_ratio(sums, tokens, [7] * 31, num_resamples=500, seed=seed)
        covered += low < 0 < high
        low, high = bootstrap_ratio(sums, tokens, [len(sums)], num_resamples=500, seed=seed)
        covered_by_blocks += low < 0 < high
    assert 88 <= covered <= 99
    assert covered_by_blocks < 70


def test_a_drawn_document_has_as_many_blocks_as_it_has():
    counts = draw_blocks((3, 1, 2), 10_000, np.random.default_rng(0))
    assert counts.shape == (10_000, 6)
    # Each document is drawn once on average, and so is each of its blocks.
    assert counts.mean(axis=0) == pytest.approx(np.ones(6), abs=0.05)
    first, second, third = counts[:, :3].sum(1), counts[:, 3], counts[:, 4:].sum(1)
    assert (first / 3 + second + third / 2 == 3).all()
    assert (first % 3 == 0).all()
    assert (third % 2 == 0).all()
    assert counts[:, 0].max() > 3  # blocks, too, are drawn with replacement


def test_many_blocks_are_drawn_a_part_of_the_times_after_the_other(monkeypatch):
    sums, tokens = np.random.default_rng(2).normal(size=101), np.ones(101)
    at_once = bootstrap_ratio(sums, tokens, (60, 41))
    monkeypatch.setattr("memorizing.metrics._RESAMPLE_ELEMENTS", 101 * 37)
    in_parts = bootstrap_ratio(sums, tokens, (60, 41))
    width = at_once[1] - at_once[0]
    assert in_parts == pytest.approx(at_once, abs=width / 20)
    assert in_parts != at_once  # other draws of the same distribution
