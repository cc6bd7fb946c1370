"""Tables fit 80 columns and say what they are about."""

import re

from memorizing.analysis import (
    describe_reach,
    make_position_table,
    make_result_table,
)
from memorizing.evaluation import compare_results
from tests.analysis.conftest import print_plainly


def test_the_table_has_baseline_capacities_and_controls(make_result):
    nats = [2.0, 2.0, 2.0], [2.0, 2.0]
    baseline = make_result(*nats, capacity=0)
    results = {
        "512": make_result([1.0, 2.0, 2.0], [1.0, 2.0], capacity=512),
        "65536": make_result([1.0, 1.0, 2.0], [1.0, 1.0], capacity=65_536),
        "off": make_result(*nats, capacity=0, control="off"),
        "other_document": make_result(*nats, capacity=65_536, control="other_document"),
        "shuffled": make_result(*nats, capacity=65_536, control="shuffled", num_bytes=None),
    }
    differences = {name: compare_results(r, baseline) for name, r in results.items()}
    text = print_plainly(
        make_result_table(results, baseline=baseline, differences=differences, title="Python")
    )
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines}
    assert rows["cache only"] == ["7.389", "1.0305"]
    # Two blocks, one per document: the resamples' extremes are one document twice.
    assert rows["512 entries"] == ["4.953", "0.8244", "-33.0%", "-39.3% to -28.3%"]
    assert rows["65,536 entries"] == ["3.320", "0.6183", "-55.1%", "-63.2% to -48.7%"]
    assert rows["memory off"] == ["7.389", "1.0305", "+0.0%", "+0.0% to +0.0%"]
    assert rows["another document's"] == ["7.389", "1.0305", "+0.0%", "+0.0% to +0.0%"]
    assert rows["values shuffled"] == ["7.389", "+0.0%", "+0.0% to +0.0%"]
    assert "diagnostics" in text
    assert "Python" in text


def test_positions_are_a_line_each(make_result):
    results = {
        "off": make_result([1.0] * 600, [2.0] * 3),
        "8,192": make_result([0.5] * 600, [2.0] * 3),
    }
    text = print_plainly(make_position_table(results))
    assert "0 to 511" in text
    assert "515" in text
    assert "512 to 2,047" in text
    assert "1.649" in text
    assert "2,048" not in text


def test_a_capacity_beyond_the_documents_is_said(make_result):
    within, beyond = make_result([1.0] * 600), make_result([1.0] * 600, capacity=8192)
    assert describe_reach({"512": within}) is None
    said = describe_reach({"512": within, "8192": beyond})
    assert said is not None
    assert "600 tokens" in said
    assert "8,192" in said
