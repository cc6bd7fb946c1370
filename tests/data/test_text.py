"""Orders that follow from names, and text from bytes."""

from pathlib import PurePosixPath

from memorizing.data.text import (
    ReadLog,
    decode_text,
    make_document,
    shuffle_names,
    shuffle_tree,
)

TREE = [
    PurePosixPath(p)
    for p in (
        "a.py",
        "b.py",
        "core/x.py",
        "core/y.py",
        "core/deep/p.py",
        "core/deep/q.py",
        "tools/m.py",
        "tools/n.py",
    )
]


def test_a_tree_order_keeps_every_subdirectory_together():
    for seed in range(7):
        order = [str(p) for p in shuffle_tree(TREE, seed)]
        assert sorted(order) == sorted(map(str, TREE))
        for folder in ("core/", "core/deep/", "tools/"):
            places = [i for i, name in enumerate(order) if name.startswith(folder)]
            assert places == list(range(places[0], places[0] + len(places)))


def test_a_tree_order_follows_the_seed_and_not_the_order_given():
    assert shuffle_tree(reversed(TREE), 3) == shuffle_tree(TREE, 3)
    assert len({tuple(shuffle_tree(TREE, seed)) for seed in range(11)}) > 5


def test_a_new_name_leaves_the_order_of_the_others():
    names = [f"n{i}" for i in range(23)]
    with_new = shuffle_names([*names, "new"], 5)
    assert [n for n in with_new if n != "new"] == shuffle_names(names, 5)
    assert shuffle_names(names, 5) != shuffle_names(names, 6)


def test_bytes_that_are_not_utf8_are_replaced_counted_and_still_paid_for():
    log = ReadLog()
    document = make_document("latin", "café".encode("latin-1"), log)
    assert document is not None
    assert (document.text, document.num_bytes, log.num_replaced) == ("caf\ufffd", 4, 1)
    assert decode_text("plain \u00e9".encode(), log) == "plain \u00e9"
    assert log.num_replaced == 1


def test_a_document_of_white_space_is_skipped_by_name():
    log = ReadLog()
    assert make_document("blank", b" \n\t\n", log) is None
    assert log.lines == ["blank: no text"]
