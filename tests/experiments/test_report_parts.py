"""The page of results: what its parts show."""

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


def test_without_any_run_every_part_says_so(report, tmp_path):
    page = build(report, tmp_path)
    assert page.count("**Not run yet.**") == 23
    planned = report.results.load_results(tmp_path / "runs", tmp_path).planned
    assert f"{len(planned)} of {len(planned)} planned runs are not run" in page
    assert f"- `{next(iter(planned))}`" in page
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


def test_many_beginnings_stand_beside_the_few(report, tmp_path):
    pair = {
        "spans": 128, "perplexity": {"cache": 4.0, "memory": 3.9}, "machine": MACHINE,
        "change": {
            "perplexity_change": -0.025, "perplexity_low": -0.05, "perplexity_high": 0.01,
        },
    }  # fmt: skip
    save(
        tmp_path,
        make_values("main/code-cache-seed7", {"0": 4.0}),
        make_values("main/code-memory-seed7", {"8192": 3.0, "65536": 2.0}),
    )
    (tmp_path / "document_starts.json").write_text(json.dumps({"pairs": {"code-seed7": pair}}))
    part = cut_part(build(report, tmp_path), "Size of the memory")
    assert find_line(part, "code, seed 7")[1:] == [
        "128", "4.00", "3.90", "-2.5% (-5.0 to +1.0)",
    ]  # fmt: skip


def test_the_longest_of_each_standard_test_stands_beside_what_others_report(report, tmp_path):
    def cell(length, task, arm, share):
        ends = {"low": share - 0.1, "high": share + 0.1}
        return {"length": length, "task": task, "arm": arm, "share": share, **ends}

    scores = {
        "memory/512": {"first": 1.0, "first_whole": 1.0},
        "memory/1024": {"first": 0.5, "first_whole": 0.25},
        "memory_x4/1024": {"first": 0.75, "first_whole": 0.5},
        "without/2048": {"first": 0.9, "first_whole": 0.9},
    }
    other = {"memory_x4/1024": {"first": 0.85, "first_whole": 0.7}}
    look_up = {"weights": 5000, "chance": 0.1, "scores": {"0": scores, "1": other}}
    ruler = {
        "model": "tiny", "samples": 20, "window": 512, "layer": 3, "precision": "bf16",
        "machine": MACHINE,
        "cells": [
            cell(4096, "niah_single_1", "passages", 1.0),
            cell(8192, "niah_single_1", "passages", 0.9),
            cell(8192, "niah_multikey_2", "passages", 0.6),
            cell(8192, "ruler_vt", "passages", 0.2),
            cell(8192, "niah_single_1", "window", 0.15),
        ],
    }  # fmt: skip
    cells = [{"num_blocks": n, "sizes": {"num_pairs": p}} for n, p in ((3, 64), (16, 9), (16, 70))]
    recall = {
        "task": "recall",
        "settings": {"block_len": 128, "cells": cells},
        "seeds": {
            seed: {"memory/16 blocks, pairs 70": {"right": right, "asked": 64, "exact": 1.0}}
            for seed, right in (("0", 64), ("1", 60))
        },
    }
    (tmp_path / "synthetic_recall.json").write_text(json.dumps(recall))
    (tmp_path / "dictionary_lookup.json").write_text(json.dumps(look_up | {"recipe": "ours"}))
    (tmp_path / "pretrained_ruler.json").write_text(json.dumps(ruler))
    page = build(report, tmp_path)
    title = "Standard tests"
    assert find_line(page, "dictionary look-up", title)[-3:] == [
        "a small one, 5,000 weights", "80.0% (whole values 60.0%)", "1,024",
    ]  # fmt: skip
    assert find_line(page, "multi-query associative recall", title)[-3:] == [
        "a small one, 70 pairs", "96.9%", "2,176",
    ]  # fmt: skip
    assert find_line(page, "passkey", title)[-3:] == ["", "not run yet", ""]
    assert find_line(page, "RULER, needles", title)[-3:] == ["tiny, passages", "75.0%", "8,192"]
    assert find_line(page, "4,096", "### RULER") == [
        "4,096", "`niah_single_1`", "100% (90 to 110)", "",
    ]  # fmt: skip
    assert find_line(page, "8,192", "### RULER")[2:] == ["90% (80 to 100)", "15% (5 to 25)"]


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
    memory, cache = (results.find("main", arm, "math") for arm in ("memory", "cache"))
    curve = report.learning.read_curve(memory, cache)
    assert curve.tokens.tolist() == [1000, 2000]
    assert curve.change.tolist() == pytest.approx([0.0, -0.1])
    assert report.learning.read_curve({}, cache) is None
    assert "end: on math the change grows, from +0.0% to -10.0%." in build(report, tmp_path)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gap_closed_is_one_between_the_ends_of_training(report, tmp_path, seed):
    other = 1 - seed  # of models that are not trained on
    save(
        tmp_path,
        make_values(f"first/proofs-cache-seed{seed}", {"0": 4.0}, (3.0, 2.0), tokens=50_000),
        make_values(f"first/proofs-memory-seed{seed}", {"8192": 2.0}, (3.0, 1.5)),
        make_values(f"first/proofs-cache-seed{other}", {"0": 9.0}, (3.0, 2.9), tokens=70_000),
        make_values(f"first/proofs-memory-seed{other}", {"8192": 8.0}, (3.0, 2.7)),
        make_values(f"finetuning/proofs-cache-to-memory-seed{seed}", {"8192": 8**0.5}, (1.9, 1.6)),
    )
    results = report.results.load_results(tmp_path / "runs", tmp_path)
    closing = report.finetuning.read_closing(results)
    assert closing.shares == pytest.approx([0.2, 0.8])
    assert [100 * tokens / closing.trained_tokens for tokens in closing.tokens] == [2, 4]
    part = cut_part(build(report, tmp_path), "Finetuning")
    assert f"Models of our first recipe (proofs, seed {seed}), trained on" in part
    cells = find_line(part, "8,192", "A memory for a model trained without")
    assert cells[1:] == ["2.83", "2.00", "50% (50 to 50)", "not run yet"]
    assert "The cache alone: 4.00 before, not run yet trained on without memory." in part


def test_a_larger_memory_is_compared_with_the_model_that_was_trained_on(report, tmp_path):
    save(
        tmp_path,
        make_values("first/proofs-memory-seed0", {"8192": 9.0, "65536": 9.0}),
        make_values("first/proofs-memory-seed1", {"8192": 5.0, "65536": 4.0}),
        make_values("first/proofs-memory-seed2", {"8192": 9.0, "65536": 9.0}),
        make_values("first/proofs-cache-seed1", {"0": 8.0}),
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
    save(tmp_path, make_values("first/proofs-memory-seed1", {"8192": 5.0}))
    part = cut_part(build(report, tmp_path), "Finetuning")
    assert "Models of our first recipe (proofs), trained on" in part


def make_copying() -> dict[str, Any]:
    """As `experiments/copying` writes it: memory is ahead of one cache and not of the other."""

    def make_change(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01}

    def make_arm(change: float, share: float, against: float) -> dict[str, Any]:
        return {
            "without": {
                "perplexity": 4.0,
                "change": make_change(change),
                "change_by_seed": [change],
            },
            "with_memory": {"perplexity": 3.0},
            "memory_against_it": make_change(against),
            "memory_on_top": make_change(-0.25),
            "share_of_gain": {"value": share, "low": share - 0.1, "high": share + 0.1},
            "share_left": {"value": 0.3, "low": None, "high": None},
        }

    classes = {
        "new to the document": {
            "share_of_tokens": 0.07,
            "share_of_gain": -0.01,
            "without": {"nothing": 9.0, "together": 9.5},
            "with_memory": {"nothing": 9.1, "together": 9.6},
            "memory": {"value": 0.1, "low": None, "high": None},
            "memory_on_top": make_change(0.1),
        }
    }
    per_token = {"memory": 1024, "knn_lm": 514, "ngram": 6}
    size = {
        "bytes": {
            "total": 8192 * 1024,
            "per_token": per_token,
            "tokens_kept": {name: 8192 * 1024 // size for name, size in per_token.items()},
        },
        "arms": {"nothing": make_arm(0.0, 0.0, -0.2), "together": make_arm(-0.1, 0.4, 0.05)},
        "classes": classes,
    }
    proofs = {
        "seeds": [0, 7],
        "documents": {"d": 81_920},
        "sizes": {"8192": size},
        "machines": [MACHINE],
    }
    return {
        "families": {"proofs": proofs},
        "arms": {"nothing": "the model alone", "together": "both"},
    }


def test_copying_is_shown_once_it_is_measured(report, tmp_path):
    assert "More than copying?" not in build(report, tmp_path)
    (tmp_path / "copying.json").write_text(json.dumps(make_copying()))
    part = cut_part(build(report, tmp_path), "More than copying?")
    commands = "queue --run main/proofs`, `python experiments/copying --families proofs`."
    assert commands in part
    assert "### Proofs, a memory of 8,192 entries, seeds 0, 7" in part
    assert (
        "8.0 MiB a document hold 8,192 entries of 1,024 bytes, 16,320 hidden states of 514 bytes "
        "and 1,398,101 tokens for n-grams of 6 bytes (more than the longest document has)."
    ) in part
    assert find_line(part, "the model alone")[1:6] == [
        "4.00", "0", "", "", "-20.0% (-21.0 to -19.0)",
    ]  # fmt: skip
    assert find_line(part, "both")[2:] == [
        "-10.0% (-11.0 to -9.0)", "", "40% (30 to 50)", "+5.0% (+4.0 to +6.0)", "3.00",
        "-25.0% (-26.0 to -24.0)", "no gain",
    ]  # fmt: skip
    assert find_line(part, "new to the document")[1:] == [
        "7.0%", "9.00", "9.50", "9.10", "9.60", "+10.0%", "+10.0% (+9.0 to +11.0)", "-1%",
    ]  # fmt: skip
    assert "with an interval below zero, in none; it adds to them in proofs with 8,192." in part


def test_other_attentions_are_compared_at_equal_time_and_at_equal_tokens(report, tmp_path):
    rows = [
        {"name": "linformer", "ratio": 1.5, "state_bytes": 3 * 2**20, "seconds": 0.6},
        {"name": "cache", "ratio": 1.0, "state_bytes": 2**20, "seconds": 0.4},
    ]
    machine = {"rows": rows, "machine": MACHINE}
    (tmp_path / "step_times_attentions.json").write_text(json.dumps(machine))
    early = [np.concatenate([np.full(512, math.log(3.0)), np.full(n - 512, 1.0)]) for n in LENS]
    constant = [np.full(n, math.log(4.0)) for n in LENS]
    save(
        tmp_path,
        make_values("attentions/code-cache-seed0", {"0": make_evaluation(constant)}),
        make_values("attentions/code-linformer-seed0", {"0": make_evaluation(early)}),
        make_values("attentions/code-linformer-tokens-seed0", {"0": 5.0}, tokens=2_000_000),
        make_values("attentions/code-memory-seed0", {"8192": 2.0}),
    )
    part = cut_part(build(report, tmp_path), "Other attentions")
    timed, short = (f"### Code, trained {what}" for what in ("in as much", "on as many"))
    assert part.index(timed) < part.index(short)
    line = find_line(part, "Linformer:", timed)
    assert line[0] == "Linformer: 512 and slots for 4,096 before"
    assert line[6:] == ["-25.0%", "-32.0%", "1.50", "3.0 MiB", "5.00M"]
    assert find_line(part, "memory of 8,192 in", timed)[2:4] == ["2.00", "-50.0% (-50.0 to -50.0)"]
    cache = find_line(part, "Transformer-XL:", timed)
    assert (cache[2:4], cache[5]) == (["4.00", "0"], "-50.0% (-50.0 to -50.0)")
    assert find_line(part, "Performer:", timed)[2:4] == ["not run yet", "not run yet"]
    assert find_line(part, "Linformer:", short)[1:6] == [
        "2.0M", "5.00", "not run yet", "", "-60.0% (-60.0 to -60.0)",
    ]  # fmt: skip
    assert find_line(part, "memory of 8,192 in", short)[2] == "2.00"
    assert "Proofs" not in part
    # Beside Linformer and the cache: the interval of one is below zero, and of the other too.
    assert "Of 2 comparisons at equal time, memory is ahead" in part
    assert "not run yet" not in find_line(part, "Transformer-XL:", timed)


def test_the_amount_of_training_at_which_memory_begins_to_help_is_interpolated(report, tmp_path):
    changes = {
        "paper": (0.2, 0.1, 0.1, -0.1),
        "paper-mixed": (0.1, 0.1, 0.05, 0.03),
        "muon": (-0.1, 0.1, -0.2, -0.3),
        "muon-mixed-induced": (-0.2, -0.3, -0.4, -0.5),
    }
    for arm, found in changes.items():
        nats = tuple(2.0 + math.log1p(change) for change in found)
        save(
            tmp_path,
            make_values(f"amounts/proofs-{arm}-seed0", {"8192": 3.0}, validation=nats),
            make_values(f"amounts/proofs-{arm}-cache-seed0", {"0": 4.0}, validation=(2.0,) * 4),
        )
    part = cut_part(build(report, tmp_path), "amount of training")
    # Between 3,000 and 4,000 tokens, half of the way in their logarithm.
    assert math.sqrt(3000 * 4000) == pytest.approx(report.amounts.find_beginning(
        read_amount(report, tmp_path, "paper")
    ))  # fmt: skip
    assert report.amounts.find_beginning(read_amount(report, tmp_path, "paper-mixed")) is None
    # It helps at the first evaluation, and not at the second.
    begins = report.amounts.find_beginning(read_amount(report, tmp_path, "muon"))
    assert begins == pytest.approx(2000 * 1.5 ** (1 / 3))
    assert "Adafactor, four tokens mixed: not by 0.0M" in part
    assert "start (ours): at the first evaluation, -24.1% a doubling" in part
    assert (
        find_line(part, "Adafactor, single tokens (the paper's)")[-1] == "-25.0% (-25.0 to -25.0)"
    )
    assert find_line(part, "Muon, single tokens")[-2] == "-30.0%"


def read_amount(report, folder, arm):
    results = report.results.load_results(folder / "runs", folder)
    memory, cache = (results.find("amounts", a) for a in (arm, f"{arm}-cache"))
    return report.learning.read_curve(memory, cache)


def test_open_questions_are_there_once_they_are_measured(report, tmp_path):
    assert "Open questions" not in build(report, tmp_path)
    row = {"count": 2, "read_all": 0.0, "nats_per_token": 1.0, "perplexity": 3.0}
    change = {"perplexity_change": -0.081, "perplexity_low": -0.1, "perplexity_high": -0.06}
    access = {
        "run": "proofs-memory-seed0",
        "most": 64,
        "tokens": 4096,
        "capacity": 8192,
        "machine": MACHINE,
        "rows": [
            {"access": "count", "read": 2.0, "read_nothing": 0.0, **row},
            {"access": "threshold", "read": 1.84, "read_nothing": 0.64, **row,
             "against_count": change},
        ],
    }  # fmt: skip
    (tmp_path / "thresholds.json").write_text(json.dumps(access))
    page = build(report, tmp_path)
    assert find_line(page, "threshold", "Access by a threshold")[1:] == [
        "2", "1.8", "64.0%", "3.00", "-8.1% (-10.0 to -6.0)",
    ]  # fmt: skip
    assert "What kind of memory" not in page

    def describe(family, far):
        counted = {"tokens": 3, "share_of_tokens": 0.25, "nats_saved_per_token": 0.5}
        rows = [{"name": name, "share_of_saved": 0.75, **counted} for name in ("0 to 255", far)]
        rate = {"name": "any", "rate": 0.2, "low": 0.1, "high": 0.3}
        return {
            "name": f"main/{family}-memory-seed0",
            "documents": 2,
            "tokens": 6,
            "lookups": [{"what": "lemmas", "num_tokens": 5, "num_names": 4, "rates": [rate] * 3}],
            **dict.fromkeys(("distances", "classes", "earlier"), rows),
            "machine": MACHINE,
        }

    runs = [describe("code", "256 to 511"), describe("proofs", "512 to 1,023")]
    lookups = {"max_tokens": 0, "runs": {run["name"]: run for run in runs}}
    (tmp_path / "lookups.json").write_text(json.dumps(lookups))
    part = cut_part(build(report, tmp_path), "Open questions")
    assert find_line(part, "tokens back")[1] == "proofs, of tokens"
    shown = ["25%", "75%", "0.50"]
    assert find_line(part, "0 to 255")[1:] == [*shown, *shown]
    assert find_line(part, "512 to 1,023")[1:] == [*shown, "", "", ""]
    assert find_line(part, "code, lemmas")[1:] == ["5", "4", *["20.0% (10.0 to 30.0)"] * 3]
    assert "Read whole: proofs 2 documents, 6 tokens; code 2 documents, 6 tokens." in part
