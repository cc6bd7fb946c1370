"""Which entries of a ring are in blocks and which are not, as ranges of entry numbers.

Entries of a row are counted from the start of its document; entry e lies in slot e % capacity.
"""

from __future__ import annotations

from collections.abc import Sequence

from memorizing.knn.index import StoredKeys


def list_living(stored: StoredKeys) -> list[range]:
    """Per row, the entries that are there."""
    return [
        range(count - size, count)
        for count, size in zip(stored.num_appended, stored.sizes, strict=True)
    ]


def plan_blocks(
    living: range, sealed: Sequence[range], sealed_until: int, block_len: int
) -> list[range]:
    """Which entries are due to be sealed.

    All whole blocks of the entries that came after the last block; and of older entries that lost
    their block (only a block longer than `block_len` leaves that many) the newest whole block, so
    that one call does not have to build a large memory again.

    Args:
        living: entries that are there.
        sealed: those of the blocks, oldest first.
        sealed_until: the entry after the newest that was ever sealed.
        block_len: entries of a block.
    """
    start = max(living.start, sealed_until)
    due = [
        range(first, first + block_len)
        for first in range(start, living.stop - block_len + 1, block_len)
    ]
    end = sealed[0].start if sealed else start
    if end - living.start >= block_len:
        due.append(range(end - block_len, end))
    return due


def list_stretches(living: range, sealed: Sequence[range], capacity: int) -> list[range]:
    """Living entries outside the blocks, as ranges of entries in consecutive slots."""
    stretches = []
    start = living.start
    for block in [*sealed, range(living.stop, living.stop)]:
        wrap = start - start % capacity + capacity
        for stretch in (range(start, min(block.start, wrap)), range(wrap, block.start)):
            if stretch:
                stretches.append(stretch)
        start = block.stop
    return stretches
