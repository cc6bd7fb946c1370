"""Which index searches a memory, as frozen dataclasses and as text. Nothing here imports torch.

An index is written as its name, and options where they differ from their defaults:
`exact`, `buckets:num_buckets=1024`, `faiss_hnsw:num_links=32,ef_search=128`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from memorizing.errors import ConfigError
from memorizing.settings import (
    build_dataclass,
    check_types,
    describe_unknown,
    format_value,
    parse_value,
    require,
)


@dataclass(frozen=True)
class IndexSettings:
    """What every index has: a name, and options that are checked at construction."""

    name: ClassVar[str] = ""
    least: ClassVar[Mapping[str, int]] = {}
    """Option -> its smallest value, where that is not 1. What is no switch is a count."""
    not_above: ClassVar[Mapping[str, str]] = {}
    """Option -> the option it must not exceed, where that is not 0."""

    def __post_init__(self) -> None:
        """Refuse options that cannot work."""
        check_types(self, self.name)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = self.least.get(field.name, 1)
            require(
                isinstance(value, bool) or value >= least,
                f"{self.name}.{field.name}",
                value,
                f"{least} or more",
            )
        for option, limit in self.not_above.items():
            require(
                not getattr(self, limit) or getattr(self, option) <= getattr(self, limit),
                f"{self.name}.{option}",
                getattr(self, option),
                f"at most {limit}, {getattr(self, limit)}",
            )

    def __str__(self) -> str:
        """The text that `parse_index` reads."""
        options = [
            f"{field.name}={format_value(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ":".join([self.name, *([",".join(options)] if options else [])])


@dataclass(frozen=True)
class ExactSettings(IndexSettings):
    """Every key is scored; nothing is missed, whatever the stored dtype."""

    name: ClassVar[str] = "exact"


@dataclass(frozen=True)
class BucketSettings(IndexSettings):
    """Every key is scored; the best few of each bucket are candidates (as on TPUs)."""

    name: ClassVar[str] = "buckets"
    num_buckets: int = 512
    per_bucket: int = 1
    """Survivors of each bucket: K'."""


@dataclass(frozen=True)
class Int8Settings(IndexSettings):
    """Keys as 8-bit integers with a scale each; the best are scored again with the stored keys."""

    name: ClassVar[str] = "int8"
    oversample: int = 2
    """Candidates scored again, as a multiple of k."""


@dataclass(frozen=True)
class SealedSettings(IndexSettings):
    """Another library's index over sealed blocks; what is in no block is searched exactly."""

    is_saved: ClassVar[bool] = False
    """Whether blocks are worth a file; otherwise they are built again from the keys."""
    block_len: int = 16_384
    """Entries of a block; a block is built when as many are waiting."""
    oversample: int = 2
    """Candidates taken from the blocks, as a multiple of k; they are scored again in fp32."""


@dataclass(frozen=True)
class FaissFlatSettings(SealedSettings):
    """Faiss, brute force in fp32."""

    name: ClassVar[str] = "faiss_flat"
    oversample: int = 1


@dataclass(frozen=True)
class FaissFp16Settings(SealedSettings):
    """Faiss, brute force over keys stored in fp16."""

    name: ClassVar[str] = "faiss_fp16"


@dataclass(frozen=True)
class FaissInt8Settings(SealedSettings):
    """Faiss, brute force over keys stored in 8 bits a dimension."""

    name: ClassVar[str] = "faiss_int8"


@dataclass(frozen=True)
class FaissIvfSettings(SealedSettings):
    """Faiss, inverted lists of keys: those of the `num_probes` nearest cells are scored."""

    name: ClassVar[str] = "faiss_ivf"
    is_saved: ClassVar[bool] = True
    oversample: int = 1
    not_above: ClassVar[Mapping[str, str]] = {"num_probes": "num_lists"}
    least: ClassVar[Mapping[str, int]] = {"num_lists": 0}
    num_lists: int = 0
    """Cells of a block; 0 is 4 times the square root of its keys. There are fewer where they would
    hold less than 39 keys each on average."""
    num_probes: int = 32
    """Cells that are searched for a query."""
    num_bits: int = 16
    """Of a number of the copies of keys: 16, or 8 for half of the memory. The best are scored again
    with the stored keys: 8 wants `oversample` of 2 or more."""
    train_on_queries: bool = False
    """Learn from queries (`SealedIndex.observe_queries`) which cells to search for a query."""

    def __post_init__(self) -> None:
        """As that of `IndexSettings`."""
        super().__post_init__()
        bits = self.num_bits
        require(bits in (8, 16), f"{self.name}.num_bits", bits, "8 or 16")


@dataclass(frozen=True)
class FaissHnswSettings(SealedSettings):
    """Faiss, a navigable graph over fp16 keys. Slow to build, fast for few queries."""

    name: ClassVar[str] = "faiss_hnsw"
    is_saved: ClassVar[bool] = True
    least: ClassVar[Mapping[str, int]] = {"num_links": 2}
    num_links: int = 32
    """Links of a key in the upper layers of the graph, and half of those in the lowest (M)."""
    ef_construction: int = 40
    """Candidates that are looked through to place a key."""
    ef_search: int = 128
    """Candidates that are looked through for a query; at least as many as are asked for."""


@dataclass(frozen=True)
class ScannSettings(SealedSettings):
    """ScaNN: a tree of partitions and anisotropic hashes (Linux, Python up to 3.13)."""

    name: ClassVar[str] = "scann"
    not_above: ClassVar[Mapping[str, str]] = {"leaves_to_search": "num_leaves"}
    oversample: int = 4
    num_leaves: int = 1024
    """Partitions of a block; fewer where they would hold less than 50 keys each on average."""
    leaves_to_search: int = 128
    """Partitions that are searched for a query."""


_SETTINGS: dict[str, type[IndexSettings]] = {
    settings.name: settings
    for settings in (
        ExactSettings,
        BucketSettings,
        Int8Settings,
        FaissFlatSettings,
        FaissFp16Settings,
        FaissInt8Settings,
        FaissIvfSettings,
        FaissHnswSettings,
        ScannSettings,
    )
}


def list_indexes() -> list[str]:
    """Names of all indexes, exact search first."""
    return list(_SETTINGS)


def parse_index(text: str) -> IndexSettings:
    """Read `name` or `name:option=value,option=value`.

    Raises:
        ConfigError: an unknown name or option, or a value that is not allowed.
    """
    name, _, options = text.partition(":")
    if name.strip() not in _SETTINGS:
        raise ConfigError(describe_unknown("index", name.strip(), list_indexes()))
    values: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(
                f"the index {text!r} has the option {option!r}; write name:option=value"
            )
        # Older settings ask for what exact search always does now.
        if (name.strip(), key.strip()) != ("exact", "rescore"):
            values[key.strip()] = parse_value(value)
    return build_dataclass(_SETTINGS[name.strip()], values, f"{name.strip()}.")
