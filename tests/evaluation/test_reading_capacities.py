"""Every capacity and control, each computed once."""

import pytest

from memorizing.errors import ConfigError
from memorizing.evaluation import (
    evaluate_capacities,
    evaluate_documents,
)
from tests.evaluation.test_reading import START, make_documents, make_model


def test_capacities_come_rising_and_controls_after_them():
    reports: list[tuple[int, int]] = []
    documents = make_documents(37, 13)
    results = evaluate_capacities(
        make_model(),
        documents,
        START,
        capacities=(4099, 0, 11, 37),
        controls=("off", "other_document", "shuffled"),
        progress=lambda done, total: reports.append((done, total)),
    )
    assert list(results) == ["0", "11", "37", "4099", "off", "other_document", "shuffled"]
    assert [r.capacity for r in results.values()] == [0, 11, 37, 4099, 0, 4099, 4099]
    assert results["off"].control == "off"
    # 37 and 4099 both hold the documents, and off is capacity 0: five runs, not seven.
    assert {total for _, total in reports} == {5 * 50}
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert reports[-1][0] == 5 * 50
    for name, result in results.items():
        expected = evaluate_documents(
            make_model(), documents, START, capacity=result.capacity, control=result.control
        )
        assert result.nats == pytest.approx(expected.nats, rel=1e-6), name


def test_capacities_need_one():
    with pytest.raises(ConfigError, match="no capacity"):
        evaluate_capacities(make_model(), make_documents(13), START, capacities=())
