"""The page of results: its numbers, what is missing, and that it is the same each time."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memorizing.errors import ConfigError
from memorizing.metrics import compare_token_nats
from tests.experiments.scripts import EXPERIMENTS, open_script

with open_script("plan", EXPERIMENTS / "queue") as plan:
    PLANNED = {job.name: job.settings for job in plan.list_jobs()}
LENS = (3 * 4096 + 1031, 2 * 4096 + 17)
"""Tokens of the documents: whole drawn blocks, and a last one of more and of less than 1,024."""


def sum_blocks(nats: np.ndarray, block_len: int = 1024) -> list[float]:
    return np.add.reduceat(nats, np.arange(0, len(nats), block_len)).tolist()


def make_evaluation(documents: list[np.ndarray], name: str = "0") -> dict[str, Any]:
    """As the queue writes it, of the nats of every token."""
    capacity, _, rest = name.partition(" ")
    nats, tokens = float(sum(d.sum() for d in documents)), sum(len(d) for d in documents)
    return {
        "capacity": int(capacity),
        "control": rest if rest not in ("", "validation") else None,
        "use": "validation" if rest == "validation" else "test",
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / tokens / math.log(2) / 2,
        "nats": nats,
        "tokens": tokens,
        "by_position": [
            {"start": start, "end": end, "nats": float(part), "tokens": count}
            for start, end, part, count in (
                (0, 512, sum(d[:512].sum() for d in documents), 512 * len(documents)),
                (512, None, sum(d[512:].sum() for d in documents), tokens - 512 * len(documents)),
            )
        ],
        "documents": [
            {"name": f"d{i}", "tokens": len(d), "block_nats": sum_blocks(d)}
            for i, d in enumerate(documents)
        ],
    }


def make_constant(perplexity: float, name: str = "0") -> dict[str, Any]:
    return make_evaluation([np.full(n, math.log(perplexity)) for n in LENS], name)


def make_values(
    job: str,
    evaluations: dict[str, float | dict[str, Any]],
    validation: tuple[float, ...] = (),
    num_weights: int = 5_000_000,
    tokens: int = 6_000_000,
    settings: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """A result; evaluations are perplexities by name."""
    experiment, rest = job.split("/")
    family, arm = rest.rpartition("-seed")[0].split("-", 1)
    return {
        "job": job,
        "experiment": experiment,
        "family": family,
        "arm": arm,
        "seed": int(job[-1]),
        "settings": list(PLANNED.get(job, ()) if settings is None else settings),
        "commits": ["0123456789abcdef with changes"],
        "machine": {"processor": "abacus", "cores": 2, "threads": 1, "versions": {"torch": "2"}},
        "num_weights": num_weights,
        "config": {"training": {"learning_rate": 0.02, "precision": "bf16"}},
        "training": {
            "tokens": tokens,
            "seconds": 7200.0,
            "tokens_per_s": 2500.0,
            "validation": [
                {"tokens": 1000 * i, "nats_per_token": nats, "validation_tokens": 97}
                for i, nats in enumerate(validation, 1)
            ],
        },
        "evaluations": {
            name: make_constant(value, name) if isinstance(value, float) else value
            for name, value in evaluations.items()
        },
    }


def save(folder: Path, *values: dict[str, Any]) -> None:
    for one in values:
        path = folder / "runs" / f"{one['job']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(one))


def build(report: SimpleNamespace, folder: Path, output: str = "out") -> str:
    page = folder / output / "results.md"
    arguments = ["--results", str(folder / "runs"), "--output", str(page)]
    assert report.main.main(arguments) == 0
    return page.read_text()


MACHINE = {
    "processor": "abacus", "cores": 2, "threads": 1, "device": "Abacus", "commit": None,
    "versions": {"memorizing": "1", "torch": "2", "python": "3"},
}  # fmt: skip


def find_line(page: str, beginning: str, after: str = "") -> list[str]:
    """Cells of the first table row that begins so, behind a heading."""
    for line in page[page.index(after) :].splitlines():
        if line.startswith(f"| {beginning} "):
            return [cell.strip() for cell in line.strip("|").split("|")]
    raise AssertionError(f"no row {beginning!r}")


def make_seeds(report: SimpleNamespace, *evaluations: dict[str, Any]) -> dict[int, Any]:
    return {
        seed: report.results.Run(make_values(f"main/proofs-memory-seed{seed}", {"0": evaluation}))
        for seed, evaluation in enumerate(evaluations)
    }


@pytest.fixture(scope="module")
def token_nats() -> list[list[np.ndarray]]:
    """Four readings of two documents."""
    rng = np.random.default_rng(0)
    return [[rng.normal(3, 1, n) for n in LENS] for _ in range(4)]


def compare(report: SimpleNamespace, mine: list[np.ndarray], theirs: list[np.ndarray]) -> Any:
    return report.comparing.compare(
        make_seeds(report, make_evaluation(mine)), "0",
        make_seeds(report, make_evaluation(theirs)), "0",
    )  # fmt: skip


def test_a_comparison_is_that_of_the_tokens(report, token_nats):
    """As `memorizing evaluate` makes it: documents are drawn, and in each its blocks."""
    mine, theirs = token_nats[:2]
    expected = compare_token_nats(mine, theirs)
    found = compare(report, mine, theirs).difference
    assert (found.num_blocks, found.num_tokens) == (expected.num_blocks, expected.num_tokens)
    assert found.nats_per_token == pytest.approx(expected.nats_per_token)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_block_is_drawn_in_all_seeds_at_once(report, token_nats):
    evaluations = [make_evaluation(documents) for documents in token_nats]
    change = report.comparing.compare(
        make_seeds(report, *evaluations[:2]), "0", make_seeds(report, *evaluations[2:]), "0"
    )
    mine, theirs = (
        [(first + second) / 2 for first, second in zip(*pair, strict=True)]
        for pair in (token_nats[:2], token_nats[2:])
    )
    expected = compare(report, mine, theirs).difference
    assert change.difference.low == pytest.approx(expected.low)
    assert change.difference.high == pytest.approx(expected.high)
    by_seed = [
        math.expm1((evaluations[seed]["nats"] - evaluations[2 + seed]["nats"]) / sum(LENS))
        for seed in (0, 1)
    ]
    assert list(change.by_seed.values()) == pytest.approx(by_seed)


def test_only_seeds_of_both_are_compared(report):
    mine = make_seeds(report, make_constant(3.0), make_constant(5.0))
    theirs = make_seeds(report, make_constant(4.0))
    assert report.comparing.compare(mine, "0", theirs, "0").value == pytest.approx(-0.25)
    assert report.comparing.compare(mine, "8192", theirs, "0") is None
    assert report.comparing.measure(mine, "0") == pytest.approx(math.sqrt(15))


def test_other_documents_are_refused(report, token_nats):
    shorter = [token_nats[1][0], token_nats[1][1][:-5]]
    arms = [make_seeds(report, make_evaluation(d)) for d in (token_nats[0], shorter)]
    with pytest.raises(ConfigError, match="other documents"):
        report.comparing.compare(arms[0], "0", arms[1], "0")


def test_blocks_that_do_not_fit_their_tokens_are_refused(report):
    evaluation = make_constant(3.0)
    evaluation["documents"][1]["block_nats"].pop()
    with pytest.raises(ConfigError, match="'d1' has 8,209 tokens and 8 blocks"):
        report.comparing.read_blocks(evaluation)


def test_a_share_of_a_gap_is_one_of_nats(report):
    start, now, end = (make_constant(math.exp(nats)) for nats in (3.0, 2.25, 2.0))
    share = report.comparing.compute_share(start, now, end)
    assert share.value == pytest.approx(0.75)
    assert share.interval == pytest.approx((0.75, 0.75))


def test_a_share_of_a_gap_draws_documents(report):
    start, end = make_constant(math.exp(3.0)), make_constant(math.exp(2.0))
    now = make_evaluation([np.full(LENS[0], 2.0), np.full(LENS[1], 3.0)])  # all, and nothing
    share = report.comparing.compute_share(start, now, end)
    assert share.interval == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize(
    ("corpus", "change"),
    [("arXiv Math", -13.5), ("PG-19", -5.8), ("C4 (4K+)", -8.7), ("GitHub", -17.3),
     ("Isabelle", -16.3)],
)  # fmt: skip
def test_the_papers_changes_are_those_of_its_table(report, corpus, change):
    assert 100 * report.paper.compute_change((512, 65_536, True), corpus) == pytest.approx(
        change, abs=0.05
    )


def cut_part(page: str, title: str) -> str:
    """The part of the page whose heading holds the words."""
    parts = page.split("\n## ")
    (found,) = (part for part in parts if title in part.partition("\n")[0])
    return found
