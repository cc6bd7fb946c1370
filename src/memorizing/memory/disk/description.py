"""What the entries of a folder have in common."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from memorizing.errors import MemoryFolderError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
}
"""How entries may be stored, by name."""


@dataclass(frozen=True)
class FolderDescription:
    """The model whose entries a folder holds, and their shape; fixed when it is created.

    Raises:
        MemoryFolderError: a value that is not allowed.
    """

    fingerprint: str
    """Of everything that stored entries depend on. Made by the caller, compared as it is."""
    layers: tuple[int, ...]
    """Layers of the model that have entries, ascending."""
    num_heads: int
    """H, heads of keys."""
    head_dim: int
    """D."""
    dtype: str = "bfloat16"
    """A name of `DTYPES`. With int8, every key and value has a factor of its own beside its codes:
    half of the bytes of bfloat16, and an error of at most max |x| / 254 in each number."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else the caller keeps with the entries; JSON."""

    def __post_init__(self) -> None:
        """Refuse what cannot work; layers become a tuple, settings what JSON gives back."""
        object.__setattr__(self, "layers", tuple(self.layers))
        _require(
            isinstance(self.fingerprint, str) and bool(self.fingerprint),
            "fingerprint",
            self.fingerprint,
            "a text that is not empty",
        )
        _require(
            bool(self.layers)
            and all(type(layer) is int and layer >= 0 for layer in self.layers)
            and list(self.layers) == sorted(set(self.layers)),
            "layers",
            self.layers,
            "one number or more, from 0, ascending",
        )
        for name in ("num_heads", "head_dim"):
            value = getattr(self, name)
            _require(type(value) is int and value >= 1, name, value, "1 or more")
        _require(
            isinstance(self.dtype, str) and self.dtype in DTYPES,
            "dtype",
            self.dtype,
            ", ".join(DTYPES),
        )
        _require(isinstance(self.settings, dict), "settings", self.settings, "a dict")
        try:
            settings = json.loads(json.dumps(self.settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise MemoryFolderError(
                f"settings of a memory are not JSON ({error}); use numbers that are finite, texts, "
                "lists and dicts"
            ) from error
        object.__setattr__(self, "settings", settings)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return DTYPES[self.dtype]

    @property
    def searched_dtype(self) -> torch.dtype:
        """Of the keys that are searched: of int8 entries, bfloat16."""
        return torch.bfloat16 if self.dtype == "int8" else self.stored_dtype

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of keys and values in all layers."""
        factor_bytes = 4 if self.dtype == "int8" else 0
        per_vector = self.head_dim * self.stored_dtype.itemsize + factor_bytes
        return 2 * len(self.layers) * self.num_heads * per_vector


def _require(is_allowed: bool, name: str, value: Any, allowed: str) -> None:
    if not is_allowed:
        raise MemoryFolderError(f"{name} of a memory is {value!r}; allowed: {allowed}")
