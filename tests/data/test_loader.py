"""Rows read whole documents, every token once, and continue where they were."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.data import SegmentLoader, TokenizedDocument
from memorizing.errors import CheckpointError, CorpusError

START = 997


def make_documents(lengths):
    """Documents whose tokens are all different, so that a token tells where it is from."""
    ends = np.cumsum(lengths)
    return [
        TokenizedDocument(f"d{i}", np.arange(end - n, end, dtype=np.int32) + 1000, 3 * n)
        for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def read_documents(batches):
    """Targets of every reading of a document, in the order in which the readings began."""
    current, finished = {}, []
    for batch in batches:
        for row, index in enumerate(batch.doc_id.tolist()):
            if index < 0:
                continue
            if batch.doc_start[row]:
                current[row] = (index, [])
                finished.append(current[row])
            assert current[row][0] == index
            assert batch.position[row] == len(current[row][1])
            current[row][1].extend(batch.targets[row][batch.valid[row]].tolist())
    return finished


def same(a, b):
    names = ("tokens", "targets", "valid", "doc_start", "doc_id", "position")
    return all(getattr(a, n).equal(getattr(b, n)) for n in names)


def test_a_hand_written_reading():
    documents = make_documents([5, 2, 3])
    first, second = SegmentLoader(documents, num_rows=2, segment_len=3, start_token=START)
    assert first.tokens.tolist() == [[START, 1000, 1001], [START, 1005, START]]
    assert first.targets[0].tolist() == [1000, 1001, 1002]
    assert first.valid.tolist() == [[True, True, True], [True, True, False]]
    assert first.doc_start.tolist() == [True, True]
    assert second.tokens[:, :2].tolist() == [[1002, 1003], [START, 1007]]
    assert second.valid.tolist() == [[True, True, False], [True, True, True]]
    assert (second.doc_start.tolist(), second.doc_id.tolist()) == ([False, True], [0, 2])
    assert second.position.tolist() == [3, 0]
    assert second.num_targets == 5


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=11),
    num_rows=st.integers(1, 5),
    segment_len=st.integers(1, 7),
    seed=st.none() | st.integers(0, 3),
)
def test_every_token_is_a_target_once_and_follows_its_predecessor(
    lengths, num_rows, segment_len, seed
):
    documents = make_documents(lengths)
    loader = SegmentLoader(documents, num_rows, segment_len, START, seed=seed)
    assert loader.num_targets == sum(lengths)
    batches = list(loader)
    # Rows take documents in turn: none waits for another, and none is idle while one is left.
    ends = [0] * num_rows
    for index in [
        batch.doc_id[row].item()
        for batch in batches
        for row in range(num_rows)
        if batch.doc_start[row]
    ]:
        ends[ends.index(min(ends))] += -(-lengths[index] // segment_len)
    assert len(batches) == max(ends)
    assert sum(int((b.doc_id >= 0).sum()) for b in batches) == loader.num_segments
    readings = read_documents(batches)
    assert sorted(index for index, _ in readings) == list(range(len(lengths)))
    for index, targets in readings:
        assert targets == documents[index].tokens.tolist()
    for batch in batches:
        for row in range(num_rows):
            length = int(batch.valid[row].sum())
            assert batch.valid[row].tolist() == [True] * length + [False] * (segment_len - length)
            assert (length == 0) == (int(batch.doc_id[row]) == -1)
            if length:
                tokens, targets = batch.tokens[row], batch.targets[row]
                assert tokens[1:length].equal(targets[: length - 1])
                assert int(tokens[0]) == (START if batch.doc_start[row] else int(targets[0]) - 1)


def test_a_finished_row_takes_the_next_document_in_the_next_batch():
    ids = [b.doc_id.tolist() for b in SegmentLoader(make_documents([6, 2, 2, 2, 2]), 2, 2, START)]
    assert ids == [[0, 1], [0, 2], [0, 3], [4, -1]]


def test_rows_with_nothing_left_are_all_invalid():
    *_, last = SegmentLoader(make_documents([7, 3]), 3, 3, START)
    assert last.doc_id.tolist() == [0, -1, -1]
    assert not last.valid[1:].any()
    assert not last.doc_start.any()


def test_the_order_follows_the_seed():
    documents = make_documents([1] * 13)
    orders = [
        [int(b.doc_id) for b in SegmentLoader(documents, 1, 2, START, seed=seed)]
        for seed in (0, 0, 1, None)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[3] == list(range(13))


def test_repeating_starts_the_next_epoch_in_a_new_order_without_a_gap():
    documents = make_documents([4, 1, 5, 2, 3, 7, 1])
    loader = SegmentLoader(documents, 3, 2, START, seed=1, repeat=True)
    batches = [next(loader) for _ in range(29)]
    assert all((b.doc_id >= 0).all() for b in batches)
    taken = [index for index, _ in read_documents(batches)]
    epochs = [taken[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.epoch >= 2


def test_more_rows_than_documents_read_further_epochs():
    loader = SegmentLoader(make_documents([3, 5]), 5, 2, START, seed=0, repeat=True)
    assert sorted(next(loader).doc_id.tolist())[1:4] != [-1, -1, -1]
    assert loader.epoch == 2


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_a_loader_continues_exactly_where_its_state_was_taken(repeat, steps):
    documents = make_documents([9, 2, 14, 3, 1, 6, 5])

    def make():
        return SegmentLoader(documents, 3, 2, START, seed=3, repeat=repeat)

    loader = make()
    for _ in range(steps):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    count = 0
    for expected, seen in zip(loader, resumed, strict=not repeat):
        assert same(expected, seen)
        count += 1
        if count == 31:
            break
    assert count > 0
    assert resumed.state_dict() == loader.state_dict()


def test_a_state_is_not_changed_by_reading_on():
    loader = SegmentLoader(make_documents([9, 4]), 2, 2, START)
    state = loader.state_dict()
    copy = json.dumps(state)
    next(loader)
    assert json.dumps(state) == copy
    assert json.dumps(loader.state_dict()) != copy


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_rows": 3}, "num_rows"),
        ({"segment_len": 5}, "segment_len"),
        ({"seed": 2}, "seed"),
        ({"repeat": True}, "repeat"),
    ],
)
def test_a_state_of_another_loader_is_refused(change, key):
    settings = {
        "documents": make_documents([9, 4]),
        "num_rows": 2,
        "segment_len": 2,
        "start_token": START,
        "seed": 1,
    }
    state = SegmentLoader(**settings).state_dict()
    with pytest.raises(CheckpointError, match=f"has {key} ="):
        SegmentLoader(**{**settings, **change}).load_state_dict(state)
    with pytest.raises(CheckpointError, match="lacks rows"):
        SegmentLoader(**settings).load_state_dict({k: v for k, v in state.items() if k != "rows"})


def test_a_state_of_other_documents_is_refused():
    state = SegmentLoader(make_documents([9, 4]), 2, 2, START).state_dict()
    with pytest.raises(CorpusError, match="other documents"):
        SegmentLoader(make_documents([9, 5]), 2, 2, START).load_state_dict(state)
    changed = make_documents([9, 4])
    changed[1].tokens[2] += 1
    with pytest.raises(CorpusError, match="other text"):
        SegmentLoader(changed, 2, 2, START).load_state_dict(state)


def test_a_state_that_was_saved_before_contents_were_compared_is_read():
    documents = make_documents([9, 4])
    loader = SegmentLoader(documents, 2, 2, START)
    next(loader)
    state = {key: value for key, value in loader.state_dict().items() if key != "content"}
    names = "".join(f"{one.name}\0{len(one.tokens)}\0" for one in documents)
    assert state["documents"] == hashlib.sha256(names.encode()).hexdigest()
    resumed = SegmentLoader(documents, 2, 2, START)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == loader.state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [[0, 2]]},
        {"rows": [[0, 2], [2, 0]]},
        {"rows": [[0, -2], [1, 2]]},
        {"rows": [[0], [1, 2]]},
        {"rows": None},
        {"taken": 3},
        {"taken": "x"},
        {"epoch": float("inf")},
    ],
)
def test_a_state_that_was_altered_is_refused(change):
    loader = SegmentLoader(make_documents([9, 4]), 2, 2, START)
    state = {**loader.state_dict(), **change}
    with pytest.raises(CheckpointError, match="altered"):
        loader.load_state_dict(state)


def test_nothing_to_read_is_refused():
    with pytest.raises(CorpusError, match="no documents"):
        SegmentLoader([], 2, 3, START)
    with pytest.raises(CorpusError, match="'d1' has no tokens"):
        SegmentLoader(make_documents([3, 0]), 2, 3, START)
    with pytest.raises(ValueError, match="must be 1 or more"):
        SegmentLoader(make_documents([3]), 0, 3, START)
