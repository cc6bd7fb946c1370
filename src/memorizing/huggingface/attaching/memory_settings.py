"""How a model reads its memory: one frozen dataclass, validated at construction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from memorizing.config import check_capacity
from memorizing.index_settings import parse_index
from memorizing.settings import build_dataclass, check_types, require

_ONE_OR_MORE = (
    "window",
    "segment_len",
    "num_neighbors",
    "num_passages",
    "passage_len",
    "best_readings",
    "search_every",
)
_OF_PASSAGES = ("num_passages", "passage_len", "passage_margin", "best_readings", "search_every")
_MOST = 2**31
"""Positions and slots are numbered in 32 bits."""


@dataclass(frozen=True)
class MemorySettings:
    """What `add_memory` was told, or what it found out."""

    layers: tuple[int, ...]
    """Layers that read a memory, counted from 0."""
    window: int = 512
    """Token t sees tokens j with t - window < j <= t; the cache keeps no more."""
    segment_len: int = 512
    """The memory's clock: entries become retrievable at multiples of it. At most `window`."""
    num_sinks: int = 4
    """The first tokens of a text, which are always seen besides the window, and not stored in
    memory: pre-trained models rest their attention on them."""
    capacity: int = 65_536
    """Entries that the text being read or written now may have in memory, per row and head. What
    was read before (`MemorySession.read`, a folder) is not counted and not limited."""
    num_neighbors: int = 32
    """Entries retrieved per query and head: the paper's k."""
    combine: Literal["gate", "joint"] = "joint"
    """One softmax over local and retrieved scores, or a gate per head."""
    search: Literal["inner_product", "normalized"] = "inner_product"
    """What is nearest: the largest inner product with a key as it is, or with its direction. Where
    directions count, all keys of a head are as long as its keys are on average, which `add_memory`
    measures on fixed pseudo-random tokens."""
    distance: int = 512
    """Retrieved entries are seen as if they stood so many tokens before the query; `add_memory`
    takes the window: the farthest that local attention sees. Without rotary positions it has no
    meaning."""
    bias: float = 0.0
    """Where gates start: the logit of the gate, or what is added to the retrieved scores. Heads at
    -30 are closed: they do not search."""
    temperature: float = 1.0
    """Retrieved scores are divided by it, before anything is learned."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of what is stored while a text is read."""
    index: str = "exact"
    """What searches the memory, as `memorizing info indexes` lists them."""
    read: Literal["passages", "entries", "both"] = "passages"
    """What is read of a memory. `passages`: the heads that read it, and the words of the text, find
    contiguous passages, which every layer reads in front of the text; see
    `attaching/passage_room.py`. `entries`: these heads mix single entries into their layer (the
    paper's way). `both`: they do the one and the other."""
    num_passages: int = 4
    """Passages that are read at a time, at most. Where a model has no positions for so many,
    `add_memory` takes fewer by default, and shorter ones."""
    passage_len: int = 128
    """Entries of a passage, at most."""
    best_readings: int = 2
    """Times that the best passage stands there, one behind the other, where passages are read
    again: a model that has just read something twice goes on to say it. Entries that are kept know
    nothing of what stands before them: with `keep="entries"` it stands there once."""
    passage_margin: float = 6.0
    """Passages whose score, a logarithm, is so much lower than that of the best one are left out:
    one that is certain says more alone, and is read sooner. From 14 on, none are left out."""
    search_every: int = 32
    """Tokens that are written until passages are looked for again."""
    keep: Literal["text", "entries"] = "text"
    """What is kept for passages. `text`: the text, and a passage is read again where it stands.
    `entries`: keys and values of all layers, which are put there as they are; see
    `attaching/kept_passages.py`."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_types(self, "memory")
        for name in (*_ONE_OR_MORE, "capacity", "distance", "num_sinks"):
            least = 1 if name in _ONE_OR_MORE else 0
            value = getattr(self, name)
            require(least <= value < _MOST, name, value, f"{least} or more, below {_MOST:,}")
        require(
            self.segment_len <= self.window,
            "segment_len",
            self.segment_len,
            f"at most window = {self.window}: a token that is in neither would be lost until its "
            "segment ends",
        )
        check_capacity(self.capacity, self.num_neighbors)
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.passage_margin >= 0, "passage_margin", self.passage_margin, "0 or more")
        most = torch.finfo(torch.float16).max
        require(abs(self.bias) <= most, "bias", self.bias, f"from {-most:,.0f} to {most:,.0f}")
        parse_index(self.index)
        if self.keep == "entries":
            require(self.finds_passages, "keep", self.keep, "text, unless passages are read")
            require(
                self.search == "inner_product",
                "search",
                self.search,
                "inner_product where keep is entries: normalized keys cannot be read",
            )

    @property
    def finds_passages(self) -> bool:
        """Whether passages are read."""
        return self.read != "entries"

    @property
    def room_len(self) -> int:
        """Places in front of a text for passages and their start token; 0 without passages."""
        if not self.finds_passages:
            return 0
        return (self.num_passages + self.num_again) * self.passage_len + 1

    @property
    def num_again(self) -> int:
        """Times that the best passage stands there besides the first."""
        return self.best_readings - 1 if self.keep == "text" else 0

    def list_kept(self, num_cached: int) -> tuple[int, ...]:
        """Layers of a model, `num_cached` of which have keys, whose entries are kept, ascending."""
        others = range(num_cached) if self.keep == "entries" else ()
        return tuple(sorted({*self.layers, *others}))

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Where entries are read, what concerns passages is left out."""
        values = dataclasses.asdict(self) | {"layers": list(self.layers)}
        if self.keep == "text":
            del values["keep"]
        if self.read == "entries":
            for name in _OF_PASSAGES:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Any) -> MemorySettings:
        """What `to_dict` gave; one that does not say what is read is of the time of entries.

        Raises:
            ConfigError: an unknown or missing setting, or one that cannot work.
        """
        require(isinstance(values, dict) and "layers" in values, "memory", values, "has layers")
        return build_dataclass(cls, {"read": "entries", **values}, "memory.")
