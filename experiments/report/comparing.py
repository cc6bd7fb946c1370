"""Comparing arms on the same tokens: over seeds, with intervals by two-level bootstrap.

The files hold nats summed over blocks of 1,024 tokens; four neighbors are drawn together, as in
`memorizing evaluate`. What is drawn is drawn in both models and all seeds at once: an interval says
what other documents of this kind would change, and the spread over seeds stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import Seeds

from memorizing.errors import ConfigError
from memorizing.metrics import Difference, bootstrap_ratio, compare_block_nats

Bucket = tuple[int, int | None]
"""Positions from, up to and not including; None is the end of the longest document."""
BLOCK_LEN = 1024
"""Tokens of a block in the files."""
BLOCKS_DRAWN = 4
"""Neighboring blocks that are drawn together."""


@dataclass(frozen=True)
class Change:
    """How an arm differs from another on the same tokens, over the seeds of both."""

    difference: Difference
    by_seed: dict[int, float]
    """Relative change of perplexity by seed."""

    @property
    def value(self) -> float:
        """Relative change of perplexity; over seeds by the mean of their nats."""
        return self.difference.perplexity_change

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, of `value`; None where the text is a single block."""
        return None if math.isinf(self.difference.low) else self.difference.perplexity_interval


@dataclass(frozen=True)
class Share:
    """A share of a gap, in nats, with its 95% interval."""

    value: float
    interval: tuple[float, float]


def compare(arm: Seeds, name: str, baseline: Seeds, baseline_name: str) -> Change | None:
    """An evaluation of an arm against one of a baseline; None where no seed has both.

    Raises:
        ConfigError: the two have not read the same documents.
    """
    seeds = [s for s in arm if has(arm, s, name) and has(baseline, s, baseline_name)]
    if not seeds:
        return None
    check_same_documents(
        *(({seed: runs[seed]}, n) for runs, n in ((arm, name), (baseline, baseline_name))
          for seed in seeds)
    )  # fmt: skip
    mine = [arm[seed].evaluations[name] for seed in seeds]
    theirs = [baseline[seed].evaluations[baseline_name] for seed in seeds]
    _, tokens, num_blocks = read_blocks(mine[0])
    ours = np.mean([read_blocks(evaluation)[0] for evaluation in mine], axis=0)
    base = np.mean([read_blocks(evaluation)[0] for evaluation in theirs], axis=0)
    by_seed = {
        seed: math.expm1((m["nats"] - t["nats"]) / m["tokens"])
        for seed, m, t in zip(seeds, mine, theirs, strict=True)
    }
    return Change(compare_block_nats(ours, base, tokens, num_blocks), by_seed)


def compare_positions(
    arm: Seeds, name: str, baseline: Seeds, baseline_name: str
) -> dict[Bucket, float]:
    """Relative change of perplexity by position in the document, over the seeds of both."""
    differences: dict[Bucket, list[float]] = {}
    for seed in arm:
        if not (has(arm, seed, name) and has(baseline, seed, baseline_name)):
            continue
        ours, base = arm[seed].evaluations[name], baseline[seed].evaluations[baseline_name]
        for mine, theirs in zip(ours["by_position"], base["by_position"], strict=True):
            nats = (mine["nats"] - theirs["nats"]) / mine["tokens"]
            differences.setdefault((mine["start"], mine["end"]), []).append(nats)
    return {
        bucket: math.expm1(float(np.mean(d)))
        for bucket, d in sorted(differences.items(), key=lambda i: i[0][0])
    }


def has(arm: Seeds, seed: int, name: str) -> bool:
    """Whether an arm's run by a seed has an evaluation."""
    return seed in arm and name in arm[seed].evaluations


def check_same_documents(*columns: tuple[Seeds, str]) -> None:
    """Refuse to show evaluations side by side that are of other tokens; one not run is left out.

    Raises:
        ConfigError: names two that have not read the same tokens of the same documents.
    """
    found = [(arm[s], name) for arm, name in columns for s in arm if has(arm, s, name)]
    for run, name in found[1:]:
        first, first_name = found[0]
        if not have_same_documents(run.evaluations[name], first.evaluations[first_name]):
            raise ConfigError(
                f"{first.name} ({first_name}) and {run.name} ({name}) have read other documents, "
                "or other parts of them; run both again on the same ones"
            )


def have_same_documents(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two evaluations have read the same tokens of the same documents."""
    described = [[(d["name"], d["tokens"]) for d in e["documents"]] for e in (one, other)]
    return described[0] == described[1]


def read_blocks(
    evaluation: dict[str, Any],
) -> tuple[NDArray[np.float64], NDArray[np.int64], tuple[int, ...]]:
    """Nats and tokens of the blocks that are drawn, and how many each document has.

    No block spans two documents; documents without a token are left out.

    Raises:
        ConfigError: a document has another number of blocks than its tokens make.
    """
    nats, tokens = [], []
    for document in evaluation["documents"]:
        sums = np.array(document["block_nats"], dtype=np.float64)
        num_tokens = document["tokens"]
        if len(sums) != -(-num_tokens // BLOCK_LEN):
            raise ConfigError(
                f"document {document['name']!r} has {num_tokens:,} tokens and {len(sums):,} "
                f"blocks; blocks hold {BLOCK_LEN:,} tokens, the last of a document may be shorter"
            )
        if not num_tokens:
            continue
        nats.append(np.add.reduceat(sums, np.arange(0, len(sums), BLOCKS_DRAWN)))
        starts = np.arange(0, num_tokens, BLOCK_LEN * BLOCKS_DRAWN)
        tokens.append(np.diff(starts, append=num_tokens))
    return np.concatenate(nats), np.concatenate(tokens), tuple(map(len, nats))


def find_shared_seeds(*columns: tuple[Seeds, str]) -> set[int]:
    """Seeds that all columns of a table have, an arm's evaluation each; one not run is left out."""
    found = [{seed for seed in arm if has(arm, seed, name)} for arm, name in columns]
    return set.intersection(*(seeds for seeds in found if seeds)) if any(found) else set()


def measure(
    arm: Seeds, name: str, key: str = "perplexity", seeds: Collection[int] | None = None
) -> float | None:
    """Perplexity (or bits per byte) over seeds, by the mean of their nats; None if not run.

    Args:
        arm: its runs by seed.
        name: of the evaluation.
        key: `perplexity` or `bits_per_byte`.
        seeds: only these; default: all that have it.
    """
    chosen = arm if seeds is None else arm.keys() & seeds
    found = [arm[seed].evaluations[name] for seed in chosen if has(arm, seed, name)]
    if not found:
        return None
    if key == "bits_per_byte":
        values = [evaluation[key] for evaluation in found]
        return None if None in values else float(np.mean(values))
    return math.exp(float(np.mean([e["nats"] / e["tokens"] for e in found])))


def compute_share(start: dict[str, Any], now: dict[str, Any], end: dict[str, Any]) -> Share:
    """(start - now) / (start - end) in nats: the share of the way to `end` that `now` has gone.

    Args:
        start: evaluation of the model to begin with.
        now: of the one in between.
        end: of the one to reach.

    Raises:
        ConfigError: they have not read the same documents.
    """
    if not (have_same_documents(start, now) and have_same_documents(start, end)):
        raise ConfigError("a share of a gap needs three evaluations of the same documents")
    (first, _, num_blocks), (middle, *_), (last, *_) = map(read_blocks, (start, now, end))
    gone, gap = first - middle, first - last
    return Share(float(gone.sum() / gap.sum()), bootstrap_ratio(gone, gap, num_blocks))
