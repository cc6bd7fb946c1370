"""The page of results: runs that do not fit each other, and results beside runs."""

import json
import math
from typing import Any

import numpy as np
import pytest

from tests.experiments.test_report import (
    LENS,
    MACHINE,
    build,
    cut_part,
    find_line,
    make_evaluation,
    make_values,
    save,
)


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


def test_what_is_adopted_is_compared_with_both_caches(report, tmp_path):
    perplexities = {"start": 4.0, "six": 3.0}
    caches = {"cache": 8.0, "six-cache": 6.0}
    save(
        tmp_path,
        *(
            make_values(f"adopting/code-{arm}-seed{seed}", {f"{size} validation": value})
            for size, arms in ((8192, perplexities), (0, caches))
            for arm, value in arms.items()
            for seed in (0, 2)
        ),
    )
    part = cut_part(build(report, tmp_path), "From our first recipe")
    assert "proofs:" not in part
    cells = find_line(part, "and documents begin better, six")
    assert [cell.split("(")[0].strip() for cell in cells[1:4]] == ["3.00", "-62.5%", "-50.0%"]
    assert cells[-1] == "-62.5%, -62.5%"
    assert find_line(part, "memory, first recipe")[1] == "not run yet"
    assert find_line(part, "cache alone, six tokens")[2].startswith("-25.0%")


def test_a_pointer_is_compared_on_the_seeds_of_all_by_the_present_recipe(report, tmp_path):
    old = ("model.conv_len=4",)
    save(
        tmp_path,
        make_values("main/code-cache-seed0", {"0": 8.0}),
        make_values("main/code-memory-seed0", {"65536": 4.0}),
        make_values("pointer/code-without-seed0", {"65536": 5.0}),
        # Another seed without its pointer, and one whose main runs are of an old recipe.
        make_values("pointer/code-without-seed1", {"65536": 7.0}),
        make_values("main/code-cache-seed1", {"0": 9.0}, settings=old),
        make_values("main/code-memory-seed1", {"65536": 1.0}, settings=old),
        # A family without any.
        make_values("main/math-cache-seed0", {"0": 8.0}),
        make_values("main/math-memory-seed0", {"65536": 6.0}),
    )
    part = cut_part(build(report, tmp_path), "From our first recipe")
    cells = find_line(part, "code")
    assert cells[1:4] == ["8.00", "5.00", "4.00"]
    assert [cell.split(" ")[0] for cell in cells[4:7]] == ["-37.5%", "-50.0%", "-20.0%"]
    assert "| math" not in part


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
        make_values("first/proofs-cache-seed0", {"0": 4.0}, (3.0, 2.5)),
        make_values("first/proofs-memory-seed0", {"8192": 3.5}, (3.0, 2.3)),
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


def test_main_runs_of_another_recipe_stand_only_where_a_family_has_none_of_the_present(
    report, tmp_path
):
    planned = report.results.load_results(tmp_path / "runs", tmp_path).planned
    before = ("model.conv_len=4",)

    def make_pair(family, seed, cache, memory, settings=()):
        return [
            make_values(job, evaluation, settings=(*settings, *planned[job]))
            for job, evaluation in (
                (f"main/{family}-cache-seed{seed}", {"0": cache}),
                (f"main/{family}-memory-seed{seed}", {"65536": memory}),
            )
        ]

    save(
        tmp_path,
        *make_pair("proofs", 0, 8.0, 4.0),
        *make_pair("proofs", 1, 80.0, 60.0, before),
        *make_pair("code", 0, 10.0, 9.0, before),
        *make_pair("math", 0, 20.0, 19.0, before),
        *make_pair("math", 1, 20.0, 19.0, before),
        make_pair("math", 1, 30.0, 29.0)[0],
    )
    page = build(report, tmp_path)
    rows = {family: find_line(page, family) for family in ("proofs", "code", "math")}
    assert rows["proofs"][:4] == ["proofs", "8.00", "4.00", "-50.0% (-50.0 to -50.0)"]
    # A present run without its partner replaces nothing, and is compared with nothing.
    assert [row[1] for row in rows.values()] == ["8.00", "10.00", "20.00"]
    assert "**code and math** are by our first recipe" in page
    assert "7 runs, seeds 0, 1," in cut_part(page, "Memory against the cache alone")
    assert "4 runs, seeds 0, 1," in cut_part(page, "Size of the memory")
