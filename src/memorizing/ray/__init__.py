"""Several machines: documents read by many processes, one memory served by several, through Ray.

Ray (its actors, placement and restarts) comes with the extra `ray`, and is imported when the first
of this is used. Names load when they are first used: a shard needs no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memorizing.lazy import load_name

if TYPE_CHECKING:
    from memorizing.ray.opening import open_served
    from memorizing.ray.reading import RayReaders
    from memorizing.ray.serving import serve_memory

_MODULE_OF_NAME = {"RayReaders": "reading", "open_served": "opening", "serve_memory": "serving"}

__all__ = ["RayReaders", "open_served", "serve_memory"]


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use (PEP 562)."""
    return load_name(__name__, name, _MODULE_OF_NAME)
