"""Several machines: documents read by many processes, one memory served by several, through Ray.

Ray (its actors, placement and restarts) comes with the extra `ray`, and is imported when the first
of this is used.
"""

from memorizing.ray.reading import RayReaders

__all__ = ["RayReaders"]
