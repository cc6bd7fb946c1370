"""Scattered texts are gathered by group."""

import tempfile
from pathlib import Path

import pytest

from memorizing.data.corpora.spill import SpillStore


def test_groups_and_names_come_in_the_order_of_their_first_text():
    with SpillStore() as store:
        for group, name in (("b", "2"), ("a", "1"), ("b", "1"), ("c", "x"), ("a", "0"), ("b", "2")):
            store.add(group, name, f"{group}{name}".encode())
        store.add("b", "2", b"again")
        assert list(store.list_groups()) == ["b", "a", "c"]
        assert list(store.list_texts("b")) == ["2", "1"]
        assert store.list_texts("nothing") == {}
        assert store.read(store.list_texts("b")["2"]) == b"b2"
        assert list(store.list_texts("b", last=True)) == ["2", "1"]
        assert store.read(store.list_texts("b", last=True)["2"]) == b"again"


def test_texts_can_be_read_while_groups_are_listed():
    with SpillStore() as store:
        for number in range(101):
            store.add(f"g{number % 7}", str(number), bytes([number, 0, 255]))
        found = {
            (group, name): store.read(place)
            for group in store.list_groups()
            for name, place in store.list_texts(group).items()
        }
    assert found == {(f"g{n % 7}", str(n)): bytes([n, 0, 255]) for n in range(101)}


def test_nothing_is_left_behind_also_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail():
        with SpillStore() as store:
            store.add("a", "b", b"c")
            assert list(Path(tmp_path).iterdir())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(Path(tmp_path).iterdir())


def test_a_name_that_is_not_utf_8_is_kept_readable():
    with SpillStore() as store:
        store.add("caf\udce9", "\ud800", b"x")
        (group,) = store.list_groups()
        ((name, place),) = store.list_texts(group).items()
        assert (group, name) == ("caf\ufffd", "\ufffd")
        assert store.read(place) == b"x"
