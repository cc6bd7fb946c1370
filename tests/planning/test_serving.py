"""What a served memory takes, counted by hand for a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from memorizing.errors import ConfigError
from memorizing.planning import ServingHardware, plan_serving

LAYERS, HEADS, KEY_HEADS, WIDTH = 5, 6, 3, 10
HARDWARE = ServingHardware(
    machine_gib=1.0, search_gb_s=1e-3, network_gb_s=1e-3, round_ms=7.0, shard_ms=2.0,
    process_gib=0.25, search_ms=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a config."""
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=31, hidden_size=HEADS * WIDTH, intermediate_size=41, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=WIDTH,
        max_position_embeddings=64, tie_word_embeddings=True, dtype="bfloat16",
    ).save_pretrained(path)  # fmt: skip
    return path


def test_a_shard_holds_its_part_of_what_is_searched(folder):
    found = plan_serving(str(folder), 1000, 3, HARDWARE, num_replicas=2, read="entries")
    entry = 2 * KEY_HEADS * WIDTH * 2
    assert found["bytes"]["entry"] == entry
    assert found["bytes"]["folder"] == 1000 * (entry + 4)
    assert found["bytes"]["shard"] == 2**28 + 334 * entry
    assert found["bytes"]["all_shards"] == 6 * found["bytes"]["shard"]
    assert found["machines"] == 2  # three processes a machine
    width = HEADS * WIDTH
    per_layer = 2 * width * width + 2 * width * KEY_HEADS * WIDTH + 3 * width * 41 + 2 * width
    assert found["num_weights"] == 31 * width + LAYERS * per_layer + width
    assert found["bytes"]["weights"] == 2 * found["num_weights"]
    assert found["bytes"]["cache"] == 2 * LAYERS * (512 + 4) * KEY_HEADS * WIDTH * 2


def test_entries_are_asked_for_with_every_token_in_a_round(folder):
    found = plan_serving(str(folder), 1000, 4, HARDWARE, read="entries", num_neighbors=3)
    assert found["operations"]["tokens"] == 1
    assert found["operations"]["search"] == 2 * HEADS * WIDTH * 1000
    assert found["operations"]["model"] == 2 * found["num_weights"]
    assert found["received_bytes"] == 4 * HEADS * 3 * (2 * WIDTH * 2 + 21)
    ms = found["ms"]
    assert ms["search"] == pytest.approx(250 * KEY_HEADS * WIDTH * 2 / 1e6 * 1e3)
    assert ms["asking"] == 7.0 + 4 * 2.0
    assert ms["network"] == pytest.approx(found["received_bytes"] / 1e6 * 1e3)
    assert ms["all"] == pytest.approx(sum(ms[key] for key in ("search", "asking", "network")))
    slow = replace(HARDWARE, search_ms=13.0)
    layers = plan_serving(str(folder), 1000, 4, slow, read="entries", layers=(1, 3))["ms"]
    assert layers["search"] == pytest.approx(2 * (13.0 + ms["search"]))


def test_heads_that_find_passages_read_their_keys_only(folder):
    found = plan_serving(str(folder), 1000, 2, HARDWARE, heads={3: [2, 3, 5]})
    assert found["heads"] == {3: [2, 3, 5]}
    assert found["settings"]["layers"] == [3]
    # Heads 2 and 3 share their keys.
    assert found["bytes"]["shard"] == 2**28 + 500 * (2 * 2 * WIDTH * 2 + 9)
    assert found["operations"]["tokens"] == 32
    assert found["operations"]["search"] == 2 * 16 * 3 * WIDTH * 1000
    assert (found["rounds"], found["ms"]["asking"]) == (4, 4 * (7.0 + 2 * 2.0))


def test_entries_of_all_layers_are_kept_where_these_are_read(folder):
    kept = plan_serving(str(folder), 7, 1, keep="entries")["bytes"]["entry"]
    assert kept == LAYERS * plan_serving(str(folder), 7, 1)["bytes"]["entry"]


def test_shards_that_are_needed_are_the_fewest_that_do_and_none_where_asking_takes_longer(folder):
    def count(within_ms: float) -> int | None:
        found = plan_serving(
            str(folder), 1000, 1, HARDWARE, read="entries", num_neighbors=1, within_ms=within_ms
        )
        return found["shards_within"]

    # 60 bytes of keys an entry are 60 ms; what is received from a shard, 6 heads of 61 bytes, 0.4.
    assert count(69.4) == 1
    assert count(69.3) == 2
    assert count(20.0) is None


def test_a_shard_that_no_machine_holds_is_told(folder):
    small = ServingHardware(machine_gib=0.3, process_gib=0.4)
    assert plan_serving(str(folder), 1000, 2, small)["machines"] is None


@pytest.mark.parametrize(
    ("numbers", "options"),
    [((0, 1), {}), ((5, 0), {}), ((5, 6), {}), ((5, 1), {"num_replicas": 0})],
)
def test_numbers_below_one_and_more_shards_than_entries_are_refused(folder, numbers, options):
    with pytest.raises(ConfigError, match="not more shards than entries"):
        plan_serving(str(folder), *numbers, **options)


def test_layers_and_models_that_are_not_there_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="from 0 to 4"):
        plan_serving(str(folder), 5, 1, layers=(5,))
    with pytest.raises(ConfigError, match="it has no config.json"):
        plan_serving(str(tmp_path), 5, 1)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        plan_serving(str(tmp_path), 5, 1)
