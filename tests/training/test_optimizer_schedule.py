import math

import pytest

from memorizing.config import TrainingConfig
from memorizing.training.optimizer import compute_peak_rate, compute_schedule


def test_the_papers_rate_is_its_formula() -> None:
    config = TrainingConfig(schedule="inverse_sqrt", warmup_steps=1000, steps=5000)
    peak = compute_peak_rate(config, 1.0)
    rates = [peak * compute_schedule(config, n) for n in (1, 500, 1000, 4000)]
    # lr(n) = min(n / 1000, 1) / sqrt(max(n, 1000))
    expected = [
        1e-3 / math.sqrt(1000),
        0.5 / math.sqrt(1000),
        1 / math.sqrt(1000),
        1 / math.sqrt(4000),
    ]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert max(rates) == pytest.approx(0.0316, abs=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Warm-up 4, 12 steps, final share 0.1: progress at 8 is (8 - 4) / (12 - 4) = 1/2.
        (
            "cosine",
            {1: 0.25, 4: 1.0, 6: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 8: 0.55, 12: 0.1},
        ),
        ("linear", {1: 0.25, 4: 1.0, 6: 0.775, 8: 0.55, 12: 0.1}),
        ("constant", {1: 0.25, 4: 1.0, 8: 1.0, 12: 1.0}),
        ("inverse_sqrt", {1: 0.25, 4: 1.0, 9: 2 / 3, 16: 0.5}),
    ],
)
def test_a_schedule_has_its_hand_computed_values(schedule: str, expected: dict[int, float]) -> None:
    config = TrainingConfig(schedule=schedule, warmup_steps=4, steps=12, final_share=0.1)  # type: ignore[arg-type]
    values = {step: compute_schedule(config, step) for step in expected}
    assert values == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    for schedule in ("inverse_sqrt", "cosine", "linear", "constant"):
        config = TrainingConfig(schedule=schedule, warmup_steps=0, steps=12)  # type: ignore[arg-type]
        assert compute_schedule(config, 1) == 1.0


def test_a_run_that_ends_within_its_warm_up_never_divides_by_zero() -> None:
    config = TrainingConfig(schedule="linear", warmup_steps=5, steps=5)
    assert [compute_schedule(config, n) for n in (1, 5)] == [0.2, 1.0]


def test_gates_keep_their_own_rate_under_the_papers_schedule() -> None:
    config = TrainingConfig(schedule="inverse_sqrt", warmup_steps=100)
    assert compute_schedule(config, 100) == 1.0
