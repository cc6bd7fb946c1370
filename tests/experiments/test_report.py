"""The page of results: its numbers, what is missing, and that it is the same each time."""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memorizing.errors import ConfigError
from memorizing.metrics import compare_token_nats

REPORT = Path(__file__).parents[2] / "experiments" / "report"
LENS = (3 * 4096 + 1031, 2 * 4096 + 17)
"""Tokens of the documents: whole drawn blocks, and a last one of more and of less than 1,024."""


@pytest.fixture(scope="module")
def report() -> Iterator[SimpleNamespace]:
    """The modules of the report, which a script finds beside it."""
    before = set(sys.modules)
    sys.path.insert(0, str(REPORT))
    try:
        names = ("results", "comparing", "paper", "formatting", "pictures", "sections")
        modules = {name: importlib.import_module(name) for name in names}
        parts = ("ablations", "beyond", "families", "finetuning", "learning", "scale", "table4")
        modules |= {name: importlib.import_module(f"sections.{name}") for name in parts}
        main = importlib.util.spec_from_file_location("report_main", REPORT / "__main__.py")
        assert main is not None
        assert main.loader is not None
        modules["main"] = importlib.util.module_from_spec(main)
        main.loader.exec_module(modules["main"])
        yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(REPORT))
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(REPORT)):
                del sys.modules[name]


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


def test_without_any_run_every_part_says_so(report, tmp_path):
    page = build(report, tmp_path)
    assert page.count("**Not run yet.**") == 19
    planned = report.results.load_results(tmp_path / "runs", tmp_path).planned
    assert f"{len(planned)} of {len(planned)} planned runs are not run" in page
    assert f"- `{planned[0]}`" in page
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.md"]


def test_passkeys_are_told_by_length(report, tmp_path):
    tested = {
        "asked": 50, "right": 49, "share": 0.98, "interval": [0.895, 0.996],
        "share_of_digits": 0.995, "machine": MACHINE,
    }  # fmt: skip
    values = {
        "settings": {"steps": 40, "rows": 8},
        "train_segments": [2, 16],
        "arms": {"memory": {"65536": tested}, "off": {"65536": tested | {"right": 0, "share": 0}}},
    }
    (tmp_path / "pretrained_passkey.json").write_text(json.dumps(values))
    page = build(report, tmp_path)
    assert "After 40 steps of 8 documents of at most 8,192 tokens:" in page
    line = find_line(page, "memory", "### Passkey")
    assert line == ["memory", "65,536", "49 of 50", "98% (90 to 100)", "100%"]
    assert find_line(page, "off", "### Passkey")[2:3] == ["0 of 50"]


def test_the_main_table_has_hand_computed_numbers(report, tmp_path):
    save(
        tmp_path,
        make_values("main/proofs-cache-seed0", {"0": 4.0}),
        make_values("main/proofs-memory-seed0", {"8192": 3.5, "65536": 3.2, "0 off": 5.0}),
        make_values("main/code-cache-seed0", {"0": 2.0}),
    )
    page = build(report, tmp_path)
    assert find_line(page, "proofs") == [
        "proofs", "4.00", "3.20", "-20.0% (-20.0 to -20.0)", "", "-16%", "Isabelle -16.3%",
    ]  # fmt: skip
    assert find_line(page, "code")[1:4] == ["2.00", "not run yet", "not run yet"]
    assert find_line(page, "proofs, bits per byte")[1] == "1.000"  # 4 = 2 bits for 2 bytes
    assert find_line(page, "proofs", "Controls")[1:] == [
        "-20.0% (-20.0 to -20.0)", "+25.0% (+25.0 to +25.0)", "not run yet", "not run yet",
    ]  # fmt: skip
    assert "interval below zero, on proofs. The aim is reached on proofs." in page
    assert "commit 0123456789ab with changes" in page


def test_each_seed_is_shown_beside_all(report, tmp_path):
    for seed, (cache, memory) in enumerate([(4.0, 3.0), (4.0, 12.0)]):
        save(
            tmp_path,
            make_values(f"main/web-cache-seed{seed}", {"0": cache}),
            make_values(f"main/web-memory-seed{seed}", {"65536": memory}),
        )
    cells = find_line(build(report, tmp_path), "web")
    assert cells[2] == "6.00"  # exp of the mean of ln 3 and ln 12
    assert cells[3].startswith("+50.0%")
    assert cells[4] == "-25.0%, +200.0%"


def test_a_row_of_perplexities_is_of_the_seeds_that_all_its_columns_have(report, tmp_path):
    save(
        tmp_path,
        make_values("main/code-cache-seed0", {"0": 4.0}),
        make_values("main/code-cache-seed1", {"0": 9.0}),
        make_values("main/code-memory-seed0", {"512": 3.5, "8192": 3.0, "65536": 2.0}),
        make_values("main/code-memory-seed1", {"8192": 8.0, "65536": 8.0}),
        make_values("main/code-memory-seed2", {"8192": 99.0, "65536": 99.0}),
    )
    page = build(report, tmp_path)
    assert find_line(page, "code")[1:3] == ["6.00", "4.00"]  # seeds 0 and 1
    cells = find_line(page, "code", "by entries in memory")
    assert cells[1:] == ["4.00", "3.50", "not run yet", "3.00", "2.00"]  # seed 0
    assert find_line(page, "code")[4] == "-50.0%, -11.1%"


def test_the_first_tokens_are_said_of_every_family(report, tmp_path):
    mine = [np.concatenate([np.full(512, math.log(5.0)), np.full(n - 512, 1.0)]) for n in LENS]
    save(
        tmp_path,
        make_values("main/web-cache-seed0", {"0": 4.0}),
        make_values("main/web-memory-seed0", {"65536": make_evaluation(mine, "65536")}),
    )
    assert "differs from the cache alone by +25.0% on web." in build(report, tmp_path)


def test_table_4_compares_each_recipe_with_its_own_cache(report, tmp_path):
    save(
        tmp_path,
        make_values("table4/proofs-ours-512-xl-seed0", {"0": 4.0}),
        make_values("table4/proofs-ours-512-8192-xl-seed0", {"8192": 3.0, "65536": 2.4}),
        make_values("table4/proofs-paper-512-xl-seed0", {"0": 5.0}),
        make_values("table4/proofs-paper-512-8192-xl-seed0", {"8192": 4.0}),
    )
    page = build(report, tmp_path)
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in cut_part(page, "Table 4").splitlines()
        if line.startswith(("| 512 |", "| **512** |"))
    ]
    by_row = {tuple(row[:3]): row[3:] for row in reversed(rows)}
    assert by_row["512", "-", "512"] == ["2.46", "0", "4.00", "0", "5.00", "0"]
    assert by_row["512", "8,192", "512"] == [
        "2.08", "-15.4%", "3.00", "-25.0% (-25.0 to -25.0)", "4.00", "-20.0% (-20.0 to -20.0)",
    ]  # fmt: skip
    assert by_row["512", "1,536", "-"][2:] == ["not run yet", "", "not run yet", ""]
    assert find_line(page, "512 | 8,192 | 512", "Trained with a smaller memory")[3:] == [
        "-20.0% (-20.0 to -20.0)", "not run yet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arm", "row"),
    [("ours-512", (512, 0, False)), ("ours-512-xl", (512, 0, True)),
     ("ours-512-1536", (512, 1536, False)), ("ours-2048-65536-xl", (2048, 65_536, True))],
)  # fmt: skip
def test_the_name_of_an_arm_is_its_row(report, arm, row):
    assert report.table4.read_arm(arm) == ("ours", row)
    assert report.table4.name_arm("ours", row) == arm


def test_equal_sizes_are_interpolated_and_never_extrapolated(report):
    point = report.scale.Point
    line = [point(16_000_000, 2.0), point(1_000_000, 8.0), point(4_000_000, 4.0)]
    describe = report.scale.describe_equal_size
    assert describe(point(1_000_000, 4.0), line) == "4.0"
    # Half of the way in nats is half of the way in the logarithm of the weights.
    assert describe(point(1_000_000, math.sqrt(4.0 * 2.0)), line) == "8.0"
    assert describe(point(4_000_000, 1.9), line) == "above 4.0"
    assert describe(point(2_000_000, 8.1), line) == "below 0.5"


def test_curves_are_compared_at_equal_tokens_of_a_seed(report, tmp_path):
    save(
        tmp_path,
        make_values("main/math-cache-seed0", {}, validation=(3.0, 2.5, 2.0)),
        make_values("main/math-memory-seed0", {}, validation=(3.0, 2.5 + math.log(0.9))),
    )
    results = report.results.load_results(tmp_path / "runs", tmp_path)
    curve = report.learning.read_curve(results, "math")
    assert curve.tokens.tolist() == [1000, 2000]
    assert curve.change.tolist() == pytest.approx([0.0, -0.1])
    assert report.learning.read_curve(results, "web") is None
    assert "end: on math the change grows, from +0.0% to -10.0%." in build(report, tmp_path)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gap_closed_is_one_between_the_ends_of_training(report, tmp_path, seed):
    other = 1 - seed  # of models that are not trained on
    save(
        tmp_path,
        make_values(f"main/proofs-cache-seed{seed}", {"0": 4.0}, (3.0, 2.0), tokens=50_000),
        make_values(f"main/proofs-memory-seed{seed}", {"8192": 2.0}, (3.0, 1.5)),
        make_values(f"main/proofs-cache-seed{other}", {"0": 9.0}, (3.0, 2.9), tokens=70_000),
        make_values(f"main/proofs-memory-seed{other}", {"8192": 8.0}, (3.0, 2.7)),
        make_values(f"finetuning/proofs-cache-to-memory-seed{seed}", {"8192": 8**0.5}, (1.9, 1.6)),
    )
    results = report.results.load_results(tmp_path / "runs", tmp_path)
    closing = report.finetuning.read_closing(results)
    assert closing.shares == pytest.approx([0.2, 0.8])
    assert [100 * tokens / closing.trained_tokens for tokens in closing.tokens] == [2, 4]
    part = cut_part(build(report, tmp_path), "Finetuning")
    assert f"Models of section 1 (proofs, seed {seed}) are trained on" in part
    cells = find_line(part, "8,192", "A memory for a model trained without")
    assert cells[1:] == ["2.83", "2.00", "50% (50 to 50)", "not run yet"]
    assert "The cache alone: 4.00 before, not run yet trained on without memory." in part


def test_a_larger_memory_is_compared_with_the_model_that_was_trained_on(report, tmp_path):
    save(
        tmp_path,
        make_values("main/proofs-memory-seed0", {"8192": 9.0, "65536": 9.0}),
        make_values("main/proofs-memory-seed1", {"8192": 5.0, "65536": 4.0}),
        make_values("main/proofs-memory-seed2", {"8192": 9.0, "65536": 9.0}),
        make_values("main/proofs-cache-seed1", {"0": 8.0}),
        make_values("finetuning/proofs-memory-to-8192-seed1", {"8192": 4.0}, tokens=650_000),
        make_values("finetuning/proofs-memory-to-65536-seed1", {"65536": 2.0}, tokens=650_000),
        make_values("finetuning/proofs-cache-to-cache-seed1", {"0": 6.0}, tokens=650_000),
        make_values(
            "finetuning/proofs-cache-to-memory-seed1", {"8192": 24**0.5, "65536": 3.0},
            tokens=650_000,
        ),
    )  # fmt: skip
    part = cut_part(build(report, tmp_path), "Finetuning")
    assert "4 runs, seed 1, 0.7M training tokens" in part
    assert find_line(part, "8,192")[1:] == ["5.00", "4.00", "-20.0% (-20.0 to -20.0)"]
    assert find_line(part, "65,536")[1:] == ["4.00", "2.00", "-50.0% (-50.0 to -50.0)"]
    # Both ends trained on as long: from 6 to 4, and the square root of 24 is half of that.
    cells = find_line(part, "8,192", "A memory for a model trained without")
    assert cells[1:3] == ["4.90", "5.00"]
    assert cells[4] == "50% (50 to 50)"
    assert "The cache alone: 8.00 before, 6.00 trained on without memory." in part


def test_without_finetuned_runs_no_seed_is_named(report, tmp_path):
    save(tmp_path, make_values("main/proofs-memory-seed1", {"8192": 5.0}))
    part = cut_part(build(report, tmp_path), "Finetuning")
    assert "Models of section 1 (proofs) are trained on" in part


def cut_evaluation(perplexity: float, name: str = "0") -> dict[str, Any]:
    """Of the beginnings of the documents alone."""
    return make_evaluation([np.full(1024, math.log(perplexity)) for _ in LENS], name)


@pytest.mark.parametrize(
    "jobs",
    [
        ("table4/proofs-ours-512-xl-seed0", "table4/proofs-paper-512-xl-seed0"),
        ("table4/proofs-ours-512-xl-seed0", "sizes/proofs-small-cache-seed0"),
        ("sizes/proofs-large-cache-seed0", "sizes/proofs-small-cache-seed0"),
        ("window/proofs-window-512-seed0", "window/proofs-window-1024-seed0"),
        ("window/proofs-window-512-seed0", "table4/proofs-ours-512-xl-seed0"),
    ],
)
def test_readings_of_other_lengths_do_not_stand_side_by_side(report, tmp_path, capsys, jobs):
    save(
        tmp_path,
        make_values(jobs[0], {"0": 4.0}),
        make_values(jobs[1], {"0": cut_evaluation(3.0)}),
    )
    arguments = ["--results", str(tmp_path / "runs"), "--output", str(tmp_path / "results.md")]
    assert report.main.main(arguments) == 2
    said = capsys.readouterr().err
    assert "have read other documents, or other parts of them" in said
    assert all(job in said for job in jobs)


def test_a_part_says_how_much_of_a_document_is_read(report, tmp_path):
    save(
        tmp_path,
        make_values("main/web-cache-seed0", {"0": 4.0}),
        make_values("table4/proofs-ours-512-xl-seed0", {"0": cut_evaluation(4.0)}),
        make_values(
            "table4/proofs-ours-512-65536-xl-seed0", {"65536": cut_evaluation(3.0, "65536")}
        ),
    )
    page = build(report, tmp_path)
    part = cut_part(page, "Memory against the cache alone")
    assert "At most 13,319 tokens of a held-out document are read." in part
    part = cut_part(page, "Table 4")
    assert (
        "At most 1,024 tokens of a held-out document are read, so that larger memories hold no "
        "more than that." in part
    )
    assert "At most" not in cut_part(page, "Gain against training tokens")


def test_ablations_are_sorted_within_their_groups(report, tmp_path):
    perplexities = {"ours": 4.0, "k-8": 5.0, "k-128": 3.0, "layer-0": 8.0, "surprise": 4.0}
    save(
        tmp_path,
        *(
            make_values(f"ablations/proofs-{arm}-seed0", {"8192 validation": value})
            for arm, value in perplexities.items()
        ),
        make_values("ablations/proofs-cache-seed0", {"0 validation": 6.0}),
    )
    page = build(report, tmp_path)
    part = cut_part(page, "Ablations")
    rows = [line.split("|") for line in part.splitlines() if line.startswith(("| `", "| ours"))]
    names = ["ours", "`cache`", "`layer-0`", "`k-128`", "`k-8`", "`surprise`"]
    assert [row[1].strip() for row in rows] == names
    assert [row[4].split("(")[0].strip() for row in rows] == [
        "0", "+50.0%", "+100.0%", "-25.0%", "+25.0%", "+0.0%",
    ]  # fmt: skip


def test_an_experiment_that_no_part_knows_is_listed(report, tmp_path):
    save(
        tmp_path,
        make_values("novelty/code-brave-seed0", {"8192": 3.0}),
        make_values("novelty/code-ours-seed0", {"8192": 4.0}),
        make_values("main/code-odd-seed0", {"8192": 7.0}),
    )
    page = build(report, tmp_path)
    cells = find_line(page, "code | `brave`", "### `novelty`")
    assert cells[3:6] == ["`novelty/ours`", "3.00", "-25.0% (-25.0 to -25.0)"]
    assert find_line(page, "code | `odd`", "### `main`")[3:5] == ["nothing alike is run", "7.00"]


def test_a_run_is_not_compared_with_one_of_other_training(report, tmp_path):
    save(
        tmp_path,
        make_values("novelty/code-brave-seed0", {"8192": 3.0}, tokens=1_000_000),
        make_values("novelty/code-ours-seed0", {"8192": 4.0}, tokens=2_000_000),
    )
    cells = find_line(build(report, tmp_path), "code | `brave`")
    assert cells[3] == "nothing alike is run"


def make_look_up(*right: float) -> dict[str, Any]:
    """Of a recipe, as learned and read three times as sharply."""
    names = ("memory/512", "memory_x3/512")
    scores = {name: {"first": share} for name, share in zip(names, right, strict=True)}
    return {"chance": 0.25, "weights": 7, "scores": {"100": scores}, "machines": [MACHINE]}


def test_synthetic_tasks_are_pooled_over_seeds(report, tmp_path):
    def score(right: int) -> dict[str, Any]:
        return {"right": right, "asked": 100, "exact": right / 100, "own_share": None}

    seeds = {"0": {"memory/8 blocks": score(90)}, "1": {"memory/8 blocks": score(70)}}
    (tmp_path / "passkey.json").write_text(
        json.dumps({"task": "passkey", "settings": {}, "seeds": seeds})
    )
    look_up = {"chance": 0.25, "scores": {"0": {"memory/512": {"first": 0.5}}, "1": {}}}
    (tmp_path / "look_up.json").write_text(json.dumps(look_up))
    chosen_from = {"brave": make_look_up(0.75, 0.5), "odd": make_look_up(0.25, 1.0)}
    (tmp_path / "choice.json").write_text(json.dumps(chosen_from))
    (tmp_path / "benchmark.json").write_text("[1, 2]")
    page = build(report, tmp_path)
    assert find_line(page, "memory", "### Passkey")[1:] == [
        "8 blocks", "80.0% (73.9 to 85.0)", "90.0%", "70.0%",
    ]  # fmt: skip
    assert find_line(page, "512", "look_up.json")[1:] == ["50.0%"]
    assert find_line(page, "tokens read", "choice.json")[3:] == ["x1", "x3"]
    assert find_line(page, "512 | `brave`", "choice.json")[2:] == ["7", "75.0%", "50.0%"]
    assert find_line(page, "512 | `odd`", "choice.json")[2:] == ["7", "25.0%", "100.0%"]
    assert page.count("Measured on Abacus; abacus, 2 cores") == 1


def test_building_twice_gives_the_same_bytes(report, tmp_path):
    for family in ("proofs", "web"):
        save(
            tmp_path,
            make_values(f"main/{family}-cache-seed0", {"0": 4.0}, (3.0, 2.5)),
            make_values(
                f"main/{family}-memory-seed0", {"512": 3.9, "8192": 3.5, "65536": 3.2}, (3.0, 2.3)
            ),
        )
    for size, weights in (("small", 2_000_000), ("large", 11_000_000)):
        for arm, name in (("cache", "0"), ("memory", "8192")):
            job = f"sizes/proofs-{size}-{arm}-seed0"
            save(tmp_path, make_values(job, {name: 4.0 - weights / 1e7}, num_weights=weights))
    save(
        tmp_path,
        make_values("finetuning/proofs-cache-to-memory-seed0", {"8192": 3.6}, (2.4,)),
        make_values("ablations/proofs-ours-seed0", {"8192 validation": 4.0}),
        make_values("ablations/proofs-joint-seed0", {"8192 validation": 4.1}),
    )
    pages = [build(report, tmp_path, name) for name in ("first", "again")]
    assert pages[0] == pages[1]
    pictures = sorted((tmp_path / "first").glob("*.png"))
    assert len(pictures) == 6
    for picture in pictures:
        assert f"]({picture.name})" in pages[0]
        assert picture.read_bytes() == (tmp_path / "again" / picture.name).read_bytes()
        assert picture.stat().st_size < 100_000


def test_a_broken_file_is_named(report, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "half.json").write_text('{"job": ')
    assert report.main.main(["--results", str(tmp_path / "runs"), "--output", "unused"]) == 2
    assert "half.json" in capsys.readouterr().err


def test_labels_are_moved_apart_and_no_farther(report):
    spread = report.pictures.spread
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.2, 0.2, 0.25], 0.1) == pytest.approx([0.1167, 0.2167, 0.3167], abs=1e-4)


def test_minus_zero_is_zero(report):
    assert report.formatting.format_percent(-0.0001) == "+0.0%"


def test_recipes_are_compared_family_by_family(report, tmp_path):
    save(
        tmp_path,
        make_values("recipes/proofs-ours-seed0", {"8192": 3.0, "65536": 2.9}),
        make_values("recipes/proofs-paper-seed0", {"8192": 4.0, "65536": 3.9}, tokens=2_500_000),
        make_values("recipes/code-ours-seed0", {"8192": 3.96, "65536": 2.9}),
        make_values("recipes/code-paper-seed0", {"8192": 4.0, "65536": 3.9}),
        make_values("rates/proofs-paper-1.0-seed0", {"8192 validation": 5.0}),
    )
    part = cut_part(build(report, tmp_path), "Our recipe against the paper's")
    cells = find_line(part, "proofs | 8,192")
    assert cells[2:5] == ["4.00", "3.00", "-25.0% (-25.0 to -25.0)"]
    assert "at 8,192 entries: proofs." in part
    assert find_line(part, "`paper-1.0`") == ["`paper-1.0`", "5.00"]
    assert "paper's recipe: rate used above 0.02, best of those tried 0.02." in part
    assert "Our recipe: rate used above 0.02, best of those tried not tried yet." in part


def test_the_best_rate_is_that_of_the_lowest_perplexity(report, tmp_path):
    for rate, perplexity in ((0.01, 5.0), (0.04, 4.0), (0.02, 6.0)):
        values = make_values(f"rates/proofs-ours-{rate}-seed0", {"8192 validation": perplexity})
        values["config"]["training"]["learning_rate"] = rate
        save(tmp_path, values)
    part = cut_part(build(report, tmp_path), "Our recipe against the paper's")
    assert "Our recipe: rate used above not run yet, best of those tried 0.04." in part


def test_readings_of_a_larger_memory_are_compared_with_the_runs_own(report, tmp_path):
    readings = {"8192": 5.0, "65536": 4.0, "262144": 3.0}
    save(
        tmp_path,
        make_values("long/proofs-memory-seed0", readings) | {"trains": False},
        make_values("main/proofs-memory-seed0", {"8192": 1.0, "65536": 1.0}),
    )
    page = build(report, tmp_path)
    part = page[page.index("### `long`") :]
    assert find_line(part, "proofs | `memory` | 8192")[3:6] == [
        "its own 65536", "5.00", "+25.0% (+25.0 to +25.0)",
    ]  # fmt: skip
    assert find_line(part, "proofs | `memory` | 65536")[3:6] == ["-", "4.00", ""]
    assert find_line(part, "proofs | `memory` | 262144")[5].startswith("-25.0%")
    # 6M tokens at 2,500 a second; what only measures has not trained.
    assert "Training took 0.7 hours of one worker" in page
    assert "over 1 of 1 trainings" in page


def test_windows_are_shown_with_the_times_that_were_measured_in_turns(report, tmp_path):
    save(
        tmp_path,
        make_values("table4/proofs-ours-512-xl-seed0", {"0": 4.0}, tokens=1_000_000),
        make_values("table4/proofs-ours-512-8192-xl-seed0", {"8192": 3.0}, tokens=1_000_000),
        make_values("window/proofs-window-512-seed0", {"0": 3.8}, tokens=1_250_000),
        make_values("window/proofs-window-2048-seed0", {"0": 3.5}, tokens=700_000),
    )
    times = {"cache": 1.0, "memory": 1.2, "window-2048": 1.5}
    rows = [{"name": name, "ratio": ratio} for name, ratio in times.items()]
    (tmp_path / "step_times.json").write_text(json.dumps({"rows": rows}))
    part = cut_part(build(report, tmp_path), "A longer window instead")
    assert find_line(part, "window 512, cache alone")[3:] == ["1.0M", "1.00", "1.00"]
    assert find_line(part, "window 512, in as much time")[3:] == ["1.2M", "1.00", "1.25"]
    assert find_line(part, "window 2,048, in as much time")[3:] == ["0.7M", "1.50", "1.05"]
    assert find_line(part, "window 512, memory of 8,192")[3:] == ["1.0M", "1.20", "1.20"]


def test_approximate_search_and_stale_entries_are_shown(report, tmp_path):
    difference = {"perplexity_change": -0.125}
    rows = [
        {"index": "no memory", "perplexity": 8.0},
        {
            "index": "exact",
            "recall": 0.98,
            "perplexity": 7.0,
            "against_exact": {"perplexity_change": 0.0},
            "against_no_memory": difference,
        },
    ]
    values = {
        "run": "main/proofs-memory-seed0",
        "capacity": 65_536,
        "tokens_per_document": 1024,
        "rows": rows,
    }
    pair = {"nats_per_token": 1.0, "perplexity": math.e, "key_cosine": 1.0, "key_norm_ratio": 1.0}
    pairs = [
        {**pair, "read_at": 20, "written_at": 20, "steps_old": 0},
        {**pair, "read_at": 20, "written_at": 10, "steps_old": 10, "nats_per_token": 1.1},
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "approximate_search.json").write_text(json.dumps(values))
    (tmp_path / "staleness.json").write_text(
        json.dumps({"models": {"normalized": {"pairs": pairs}}})
    )
    part = cut_part(build(report, tmp_path), "Searching approximately")
    assert find_line(part, "`exact`")[1:] == ["0.980", "7.00", "+0.00%", "-12.5%"]
    assert find_line(part, "normalized | 20 | 10")[4] == "+10.5%"
    assert "`main/proofs-memory-seed0`, 65,536 entries, the first 1,024 tokens" in part


def test_models_whose_checkpoints_are_read_are_no_experiment_of_their_own(report, tmp_path):
    save(
        tmp_path,
        make_values("staleness/proofs-raw-seed0", {"8192 validation": 4.0}, tokens=800_000),
    )
    page = build(report, tmp_path)
    part = cut_part(page, "Searching approximately")
    assert "staleness.py`. 1 run, seed 0, 0.8M training tokens" in part
    assert "The models are trained, but **not read yet**." in part
    assert "### `staleness`" not in page
