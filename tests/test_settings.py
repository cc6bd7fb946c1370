import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from memorizing.errors import ConfigError
from memorizing.settings import (
    build_dataclass,
    check_types,
    describe_unknown,
    find_nearest,
    format_value,
    list_keys,
    parse_value,
)


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (2, 3)
    kind: Literal["plain", "fast"] = "plain"

    def __post_init__(self):
        check_types(self, "inner")


@dataclass(frozen=True)
class Outer:
    share: float = 0.5
    on: bool = False
    count: int = 5
    label: str = ""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        check_types(self, "outer")


def test_lists_become_tuples_and_whole_numbers_floats_where_declared():
    built = build_dataclass(Outer, {"share": 1, "inner": {"sizes": [7, 11]}})
    assert built == Outer(share=1.0, inner=Inner(sizes=(7, 11)))
    assert type(built.share) is float


@pytest.mark.parametrize("text", ["7,11", "7, 11", " 7 ,11,"])
def test_a_list_may_be_written_with_commas_alone(text):
    assert build_dataclass(Inner, {"sizes": text}).sizes == (7, 11)


def test_one_item_may_stand_for_a_list():
    assert build_dataclass(Inner, {"sizes": 7}).sizes == (7,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.5}, "outer.count is 1.5; allowed: a whole number"),
        ({"count": True}, "outer.count is True; allowed: a whole number"),
        ({"on": 1}, "outer.on is 1; allowed: true or false"),
        ({"share": "half"}, "outer.share is 'half'; allowed: a finite number"),
        ({"share": float("nan")}, "outer.share is nan; allowed: a finite number"),
        ({"share": float("inf")}, "outer.share is inf; allowed: a finite number"),
        ({"label": 3}, "outer.label is 3; allowed: a text"),
        ({"inner": {"kind": "slow"}}, "inner.kind is 'slow'; allowed: 'plain' or 'fast'"),
        ({"inner": {"sizes": "a"}}, r"inner.sizes is \('a',\); allowed: a list, each item a whole"),
        ({"inner": 3}, r"inner is 3; it is a table: write \[inner\]"),
        ({"inner": {"size": [3]}}, "unknown key 'inner.size'; did you mean 'inner.sizes'?"),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        build_dataclass(Outer, values)


def test_construction_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="inner.sizes"):
        Inner(sizes=[2, 3])  # type: ignore[arg-type]


def test_keys_are_listed_with_their_table():
    assert list(list_keys(Outer)) == ["share", "on", "count", "label", "inner.sizes", "inner.kind"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 0.001),
        ("true", True),
        ("[2, 3]", [2, 3]),
        ("'a b'", "a b"),
        ("python:stdlib", "python:stdlib"),
        (" plain ", "plain"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_a_value_is_toml_or_else_text(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    "value", [0.1, 1e-05, 10**20, 'quote " back \\ \x7f \x00 \n é', [1, 2], [], True]
)
def test_a_formatted_value_is_read_back(value):
    assert parse_value(format_value(value)) == value


def test_an_unknown_name_gets_the_nearest_or_else_all():
    assert describe_unknown("thing", "alpah", ["alpha", "beta"]).endswith("did you mean 'alpha'?")
    assert describe_unknown("thing", "zzz", ["alpha", "beta"]).endswith("known: alpha, beta")


def test_the_nearest_name_is_found_in_any_case_and_a_long_list_is_cut():
    assert find_nearest("ALPAH", ["Alpha", "beta"]) == "did you mean 'Alpha'?"
    numbers = [str(number) for number in range(100, 113)]
    assert find_nearest("zzz", numbers[:12]).endswith("110, 111")
    assert find_nearest("zzz", numbers).endswith("110, 111, ...")
    assert find_nearest("zzz", []) == "there is none"


def test_a_frozen_setting_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().kind = "fast"  # type: ignore[misc]
