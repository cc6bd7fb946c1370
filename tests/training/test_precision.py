import time

import pytest
import torch

from memorizing.training import choose_precision, precision


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_precision_that_is_set_is_taken(name: str) -> None:
    choice = choose_precision(name, 13, 37)  # type: ignore[arg-type]
    assert choice.name == name
    assert choice.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def test_the_probe_is_short_and_says_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Small sizes: also a processor that emulates bf16 is asked here.
    monkeypatch.setattr(precision, "multiplies_bf16", lambda _: True)
    monkeypatch.setattr(precision, "PROBE_TOKENS", 64)
    start = time.perf_counter()
    choice = choose_precision("auto", 256, 1024)
    assert time.perf_counter() - start < 5.0
    assert choice.name in ("fp32", "bf16")
    assert choice.reason.startswith(f"{choice.name}: bf16 matrix products run at ")


def test_emulated_bf16_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda _: False)
    monkeypatch.setattr(precision, "_time_pair", lambda *_: pytest.fail("it was timed"))
    choice = choose_precision("auto", 4096, 4096)
    assert choice.name == "fp32"
    assert choice.reason == "fp32: this processor does not multiply bf16"
    assert choose_precision("bf16", 4096, 4096).name == "bf16"


def test_the_probe_leaves_the_random_generator_alone() -> None:
    state = torch.get_rng_state()
    choose_precision("auto", 13, 37)
    assert torch.equal(torch.get_rng_state(), state)
