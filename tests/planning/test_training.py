"""What a training takes on several GPUs, counted by hand."""

from __future__ import annotations

import pytest

from memorizing.config import Config, ModelConfig, TrainingConfig
from memorizing.errors import ConfigError
from memorizing.planning import TrainingHardware, plan_training
from memorizing.training import count_weights

MODEL = ModelConfig(
    vocab_size=499, num_layers=3, model_dim=52, num_heads=4, head_dim=13, ffn_dim=211,
    segment_len=17, window=17, memory_layers=(0, 2), capacity=131, num_neighbors=5,
)  # fmt: skip
WEIGHTS = count_weights(MODEL)
LAYER = (WEIGHTS - 499 * 52) // 3


def make(**training: object) -> Config:
    return Config(model=MODEL, training=TrainingConfig(rows=6, **training))  # type: ignore[arg-type]


def plan(num_gpus: int, gpu_bytes: float = 2**40, **training: object) -> dict:
    hardware = TrainingHardware(
        gpu_gib=gpu_bytes / 2**30,
        tflops=1e-3,
        search_tflops=1e-4,
        lookup_us=3.0,
        network_gb_s=1e-2,
    )
    return plan_training(make(**training), num_gpus, hardware)


def test_memories_and_caches_stay_with_their_rows():
    found = plan(3)
    assert found["memory"]["bytes_per_entry"] == 2 * 2 * 4 * 13 * 2
    assert found["memory"]["bytes"] == 6 * 131 * 2 * 2 * 4 * 13 * 2
    assert found["ways"][0]["bytes"]["memories"] * 3 == found["memory"]["bytes"]
    assert found["ways"][0]["bytes"]["caches"] == 2 * 17 * 2 * 4 * 13 * 3 * 2


def test_weights_in_parts_are_a_share_and_what_is_put_together():
    whole, parts = (plan(3, shard=shard)["ways"][0]["bytes"]["weights"] for shard in (False, True))
    assert whole == 16 * WEIGHTS
    assert parts == 16 * WEIGHTS // 3 + 8 * 499 * 52 + 12 * LAYER


def test_a_step_takes_its_operations_and_what_is_exchanged():
    found = plan(3)
    assert found["operations"]["search"] == 2 * (2 * 17) * (4 * 13) * 131 * 2
    assert found["communication"]["bytes"] == pytest.approx(2 * 2 / 3 * 4 * WEIGHTS)
    seconds = found["seconds"]
    assert seconds["model"] == pytest.approx(found["operations"]["model"] / 1e9)
    lookups = 2 * 17 * 4 * 2
    assert seconds["search"] == pytest.approx(found["operations"]["search"] / 1e8 + lookups * 3e-6)
    assert seconds["communication"] == pytest.approx(found["communication"]["bytes"] / 1e7)
    assert found["tokens_per_s"] == pytest.approx(6 * 17 / seconds["all"])
    assert plan(1)["communication"]["bytes"] == 0
    twice = plan(3, gradient_checkpointing=True)
    assert twice["operations"]["search"] == 2 * found["operations"]["search"]
    assert twice["operations"]["model"] == pytest.approx(4 / 3 * found["operations"]["model"])


@pytest.mark.parametrize(
    ("training", "exchanges"),
    [
        ({"shard": True}, 3),
        ({"shard": True, "accumulation": 6}, 6),
        ({"shard": True, "optimizer": "muon"}, 5),
        ({"optimizer": "muon"}, 2),
    ],
)
def test_weights_in_parts_are_exchanged_for_every_part_of_a_batch(training, exchanges):
    assert plan(3, **training)["communication"]["exchanges"] == exchanges


def test_the_first_way_that_fits_is_chosen_and_one_byte_less_takes_the_next():
    ways = plan(3)["ways"]
    assert [way["settings"] for way in ways[:2]] == [{}, {"training.accumulation": 6}]
    size = ways[0]["bytes"]["all"]
    assert plan(3, size)["chosen"] == 0
    found = plan(3, size - 1)
    assert found["chosen"] == 1
    assert [way["fits"] for way in found["ways"][:2]] == [False, True]


def test_where_nothing_fits_it_says_so_and_what_would():
    smallest = min(way["bytes"]["all"] for way in plan(6)["ways"])
    found = plan(2, smallest)
    assert found["chosen"] is None
    assert found["least_gpus"] == 6
    assert plan(2, 1000)["least_gpus"] is None
    assert plan(2, 1000)["memory"]["most_capacity"] == 0


def test_a_capacity_that_fits_fits_and_one_more_does_not():
    found = plan(2)
    most, entry = found["memory"]["most_capacity"], found["memory"]["bytes_per_entry"]
    without = found["ways"][0]["bytes"]["all"] - found["ways"][0]["bytes"]["memories"]
    assert without + 3 * most * entry <= 2**40 < without + 3 * (most + 1) * entry


def test_adafactor_gives_way_to_adamw_where_weights_are_in_parts():
    settings = [way["settings"] for way in plan(3, optimizer="adafactor")["ways"]]
    assert {"training.shard": True, "training.optimizer": "adamw"} in settings


def test_rows_that_do_not_divide_keep_weights_whole():
    assert not any("training.shard" in way["settings"] for way in plan(4)["ways"])


@pytest.mark.parametrize("num_gpus", [0, 7])
def test_there_is_a_row_for_every_gpu(num_gpus):
    with pytest.raises(ConfigError, match="at most one for each row"):
        plan(num_gpus)


def test_no_machine_has_less_than_nothing():
    with pytest.raises(ConfigError, match=r"hardware.tflops is 0.0; allowed: above 0"):
        TrainingHardware(tflops=0.0)
