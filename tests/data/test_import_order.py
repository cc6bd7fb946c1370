"""What is imported comes first."""

import logging
import random

from memorizing.data.corpora.isabelle import sort_by_imports


def test_what_is_imported_comes_before_what_imports_it():
    imports = {"main": ["lists", "sets"], "lists": ["order"], "sets": ["order", "lists"]}
    assert sort_by_imports(["main", "sets", "order", "lists"], imports) == [
        "order",
        "lists",
        "sets",
        "main",
    ]


def test_every_import_of_a_random_graph_precedes_it_and_each_name_comes_once():
    random.seed(7)
    names = [f"n{number}" for number in range(97)]
    imports = {name: random.sample(names[:i], min(i, 5)) for i, name in enumerate(names)}
    shuffled = random.sample(names, len(names))
    ordered = sort_by_imports([*shuffled, *shuffled[:11]], imports)
    assert sorted(ordered) == sorted(names)
    place = {name: number for number, name in enumerate(ordered)}
    assert all(place[needed] < place[name] for name in names for needed in imports[name])
    assert ordered == sort_by_imports(shuffled, imports)


def test_names_that_import_nothing_keep_their_order():
    assert sort_by_imports(["c", "a", "b"], {}) == ["c", "a", "b"]
    assert sort_by_imports([], {"a": ["b"]}) == []


def test_imports_from_elsewhere_are_passed_over(caplog):
    assert sort_by_imports(["b", "a"], {"b": ["HOL.Main", "a"], "HOL.Main": ["b"]}) == ["a", "b"]
    assert not caplog.records


def test_a_cycle_ends_in_the_name_that_is_reached_first_and_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        ordered = sort_by_imports(["a", "b", "c", "d"], {"a": ["b"], "b": ["c"], "c": ["a", "d"]})
    assert ordered == ["d", "c", "b", "a"]
    assert [record.getMessage() for record in caplog.records] == [
        "c imports a, which imports it: a cycle"
    ]


def test_a_name_that_imports_itself_is_no_cycle(caplog):
    assert sort_by_imports(["a"], {"a": ["a"]}) == ["a"]
    assert not caplog.records


def test_a_chain_longer_than_the_stack_is_sorted():
    names = [str(number) for number in range(50_021)]
    imports = {name: [before] for before, name in zip(names, names[1:], strict=False)}
    assert sort_by_imports(reversed(names), imports) == names
