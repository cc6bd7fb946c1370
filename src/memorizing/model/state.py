"""The history of our own model: that of the rows, and the caches of local attention."""

from __future__ import annotations

from dataclasses import dataclass

from memorizing.memory.history import Entries, History


@dataclass(frozen=True, kw_only=True)
class ModelState(History):
    """Where every row is in its document, and what the model keeps of what it read."""

    xl_caches: tuple[Entries, ...]
    """Per layer, the last tokens' keys and values, aligned on the right; how many count follows
    from `position`."""
