"""Of tokens of names that memory helped with: whether it looked at the line that defines them."""

import numpy as np
import pytest

from memorizing.analysis import find_uses, rate_lookups
from memorizing.analysis.inspection import Inspection, Source
from memorizing.analysis.lookups import Use
from memorizing.analysis.traces import Trace

TEXT = "def foo(x):\n  x\nfoo(y)\n"
"""A token is a character: `foo` is defined in 0 to 10, and used in 16 to 18."""


def look(places, *, gain=1.0, capacity=97, segment_len=5, text=TEXT):
    """An inspection in which the one head looks at `places`: a token's place by token."""
    n = len(text)
    found = np.full((n, 1, 1), -1, np.int64)
    for token, place in places.items():
        found[token] = place
    codes = np.array([ord(c) for c in text])
    ones = np.ones((n, 1), np.float32)
    trace = Trace(np.ones(n, np.float32), ((0, 0),), found, ones[..., None], ones[..., None], ones)
    baseline = np.full(n, 1 + gain, np.float32)
    source = Source("text.py", n, 0, text, codes, np.arange(1, n + 1))
    return Inspection(
        "m", "with", "without", (source,), trace, baseline, segment_len, capacity, None
    )


def test_a_place_in_the_line_of_the_definition_is_right():
    uses = find_uses(look({16: 4, 17: 10, 18: 11, 20: 4}))
    # `y` is defined nowhere; the end of the line is no more of it.
    assert [use.name for use in uses] == ["foo"] * 3
    assert [use.memory for use in uses] == [True, True, False]
    assert not any(use.is_lemma for use in uses)


def test_an_exact_match_is_the_newest_place_behind_the_token_before():
    # Behind "\n" in 15 stands 12, behind "f" 5, behind "o" 7, each in memory since token 15.
    uses = find_uses(look({16: 4, 17: 4, 18: 4}))
    assert [use.match for use in uses] == [False, True, True]
    assert uses[0].chance == pytest.approx(11 / 15)


def test_what_has_left_the_memory_cannot_be_looked_at():
    # In memory are tokens 7 to 14, of which 7 to 10 define the name.
    uses = find_uses(look({16: 8, 17: 5}, capacity=8))
    assert [(use.memory, use.match, use.chance) for use in uses] == [
        (True, False, 0.5),
        (False, False, 0.5),
    ]
    assert find_uses(look({16: 12}, capacity=4)) == []


def test_tokens_that_gained_little_or_had_nothing_retrieved_are_left_out():
    assert find_uses(look({16: 4}, gain=0.69)) == []
    assert len(find_uses(look({16: 4}, gain=0.7))) == 1
    assert find_uses(look({})) == []


def test_rates_of_several_texts_draw_texts():
    def uses(name, *right):
        return [Use(name, False, memory, not memory, 0.25) for memory in right]

    one, other = uses("foo", True, True, False), uses("foo", False)
    found = rate_lookups([one + uses("bar", True), [], other])
    assert [(found[0].what, found[0].num_tokens, found[0].num_names)] == [("definitions", 5, 3)]
    memory, match, chance = found[0].rates
    assert (memory.rate, match.rate, chance.rate) == pytest.approx((0.6, 0.4, 0.25))
    # A quarter of the draws have the second text alone, and 1 in 64 the first with `bar` alone;
    # 3 of 32 have `foo` but once: 5 of 6 are right.
    assert (memory.low, memory.high) == pytest.approx((0, 5 / 6))
    assert (chance.low, chance.high) == pytest.approx((0.25, 0.25))
    assert rate_lookups([]) == rate_lookups([[]]) == []


def test_lemmas_are_rated_alone():
    found = rate_lookups([[Use("a", True, True, False, 0.5), Use("b", False, False, True, 0.5)]])
    assert [one.what for one in found] == ["definitions", "lemmas"]
    assert [one.rates[0].rate for one in found] == [0.0, 1.0]
