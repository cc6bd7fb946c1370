"""The machine's speed, measured on a model that takes milliseconds."""

from dataclasses import astuple

import pytest
import torch

from memorizing.config import load_config
from memorizing.demo.probe import measure_speed
from memorizing.knn import multiplies_bf16

CPU = torch.device("cpu")
TINY = load_config("demo").replace(
    [
        *("model.vocab_size=307", "model.num_layers=2", "model.memory_layers=[1]"),
        *("model.model_dim=22", "model.head_dim=6", "model.ffn_dim=34", "model.num_heads=2"),
        *("model.segment_len=37", "model.window=37", "model.capacity=71", "training.rows=2"),
    ]
)


def test_a_speed_has_a_precision_that_the_machine_multiplies_and_draws_no_random_number():
    torch.manual_seed(3)
    speed = measure_speed(TINY, CPU)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    if multiplies_bf16(CPU):
        assert "times as fast as" in speed.reason
    else:
        assert (speed.precision, speed.reason) == (
            "fp32",
            "this processor does not multiply bf16 itself",
        )
    assert all(seconds >= 0 for seconds in astuple(speed)[2:])
    # A step of training both models reads 2 x 2 x 37 tokens, forward and backward.
    assert speed.train_s > 2 * 2 * 37 * speed.read_s > 0


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_precision_that_is_set_is_measured_and_no_other(name):
    speed = measure_speed(TINY.replace([f"training.precision={name}"]), CPU)
    assert (speed.precision, speed.reason) == (name, "as set")
