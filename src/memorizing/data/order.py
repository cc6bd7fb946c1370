"""Random orders that follow from a seed and names alone: the same with every Python and numpy.

An item's place follows from the SHA-256 of the seed and its own name, so adding an item leaves the
order of the others as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath


def hash_name(name: str, seed: int | str = "") -> int:
    """64 bits that are uniform over names: the start of SHA-256 of the seed and the name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def shuffle_names(names: Iterable[str], seed: int | str) -> list[str]:
    """The names in an order that is random in `seed` and independent of the order given."""
    return sorted(names, key=lambda name: (hash_name(name, seed), name))


def shuffle_tree(paths: Iterable[PurePosixPath], seed: int | str) -> list[PurePosixPath]:
    """Files of a directory tree in the paper's order (section 4.1, GitHub).

    The tree is walked with the entries of each directory in random order, so that every
    subdirectory is kept together at every level.
    """

    def key(path: PurePosixPath) -> tuple[int, ...]:
        parts = path.parts
        return tuple(hash_name("/".join(parts[: i + 1]), seed) for i in range(len(parts)))

    return sorted(sorted(paths), key=key)
