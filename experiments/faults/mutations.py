"""Files changed as damage and malice change them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

WORDS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[", b"]", b'"', b"NaN", b"-1", b"1e999", b"null",
    b"\x1b[31m", b"9" * 30, b"../", b"/dev/null", b"\xed\xa0\x80", b"\r", b" " * 99,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**53, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "../x", "/etc/passwd", "\x1b[31m", "\u202e", "\ud800", "\0", "9" * 500,
    [], {}, [[]], [1, 2, 3], [None], {"": None}, {"index": "scann"}, "scann", "faiss_hnsw", "fp8",
    [0] * 1000, "a" * 10_000,
)  # fmt: skip
"""What stands in the place of a value of JSON."""


def nest(depth: int) -> bytes:
    """JSON that no recursive reader survives."""
    return b"[" * depth + b"]" * depth


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled, moved or put in."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((1, 2, 8, 64, 1000)))
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[min(start, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[start:stop]
        elif kind == 2:
            data[start:start] = data[start:stop]
        elif kind == 3:
            data[start:start] = draw.choice(WORDS)
        elif kind == 4:
            data[start:stop] = draw.randbytes(stop - start)
        elif kind == 5:
            data[start:stop] = bytes(stop - start)
        elif draw.random() < 0.3:
            del data[start:]
    return bytes(data)


def list_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All containers and keys of nested JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(children):
        yield value, key
        if isinstance(child, (dict, list)):
            yield from list_places(child)


def mutate_json(values: Any, draw: random.Random) -> Any:
    """Some values replaced, left out, or put under another name. In place."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = list(list_places(values)) if isinstance(values, (dict, list)) else []
        if not places:
            return values
        holder, key = draw.choice(places)
        kind = draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(("x", "../x", "", "\x1b"))] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], int):
            holder[key] += draw.choice((-1, 1, 1000, -(2**40)))
        elif kind == 3:
            other, other_key = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        else:
            # A copy: what is put into it next must not stand in all files.
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return values


def mutate(content: bytes, draw: random.Random, sign: Callable[[Any], Any] | None) -> bytes:
    """A changed file; JSON is changed as JSON half of the time.

    Args:
        content: of the file.
        draw: decides.
        sign: makes the checksum right that JSON holds of itself; None where it has none.
    """
    kind = draw.random()
    if kind < 0.01:
        return nest(draw.choice((500, 100_000)))
    if kind < 0.5:
        try:
            values = json.loads(content)
        except ValueError:
            return mutate_bytes(content, draw)
        values = mutate_json(values, draw)
        if sign is not None and isinstance(values, dict) and draw.random() < 0.8:
            values = sign(values)
        return json.dumps(values).encode("utf-8", "surrogatepass")
    if kind < 0.7 and (header := find_header(content)) is not None:
        length, values = header
        head = json.dumps(mutate_json(values, draw)).encode("utf-8", "surrogatepass")
        return len(head).to_bytes(8, "little") + head + content[8 + length :]
    return mutate_bytes(content, draw)


def find_header(content: bytes) -> tuple[int, Any] | None:
    """Length and values of the header of a safetensors file; None where it is none."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8:
        return None
    try:
        return length, json.loads(content[8 : 8 + length])
    except ValueError:
        return None
