import time

import pytest
import torch

from memorizing.training import choose_precision


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_precision_that_is_set_is_taken(name: str) -> None:
    choice = choose_precision(name, 13, 37)  # type: ignore[arg-type]
    assert choice.name == name
    assert choice.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def test_the_probe_is_short_and_says_what_it_measured() -> None:
    start = time.perf_counter()
    choice = choose_precision("auto", 256, 1024)
    assert time.perf_counter() - start < 5.0
    assert choice.name in ("fp32", "bf16")
    assert choice.reason.startswith(f"{choice.name}: bf16 matrix products run at ")


def test_the_probe_leaves_the_random_generator_alone() -> None:
    state = torch.get_rng_state()
    choose_precision("auto", 13, 37)
    assert torch.equal(torch.get_rng_state(), state)
