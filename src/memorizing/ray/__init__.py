"""Several machines: documents read by many processes, one memory served by several, through Ray.

Ray (its actors, placement and restarts) comes with the extra `ray`, and is imported when the first
of this is used.
"""

from memorizing.ray.opening import open_served
from memorizing.ray.reading import RayReaders
from memorizing.ray.serving import serve_memory

__all__ = ["RayReaders", "open_served", "serve_memory"]
