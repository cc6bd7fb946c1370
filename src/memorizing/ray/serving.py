"""A memory that is served: its documents divided over named actors, for as long as a block runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.memory import MemoryFolder
from memorizing.ray.cluster import NAMESPACE, Head, find_head, get, join_cluster
from memorizing.ray.shard import Shard


def name_replica(name: str, shard: int, replica: int) -> str:
    """The name of the actor of a shard."""
    return f"{name}/{shard}/{replica}"


@dataclass(frozen=True)
class Served:
    """A memory that can be opened by its address."""

    address: str
    """For `memorizing.open_memory`."""
    num_entries: tuple[int, ...]
    """Per shard."""
    num_nodes: int
    """Machines of the cluster."""
    head: Head
    """Of the cluster: to be checked every few seconds."""


@contextmanager
def serve_memory(
    path: Path | str,
    *,
    name: str | None = None,
    num_shards: int = 2,
    num_replicas: int = 1,
    cluster: str | None = None,
) -> Iterator[Served]:
    """Serve a memory while the block runs. Nobody writes into its folder meanwhile.

    Documents stay whole, and in their order; shards have about as many entries each. Shards that
    die are started again by Ray, on another machine if need be, where the folder has to be at the
    same place.

    Args:
        path: of the folder.
        name: that it is opened by; None is that of the folder.
        num_shards: parts.
        num_replicas: processes that have the same part.
        cluster: see `join_cluster`.

    Raises:
        ConfigError: more shards than documents, no such cluster, or a name that is taken.
        MemoryFolderError: no memory, or one that is being written.
    """
    folder = MemoryFolder.open(Path(path).resolve())
    name = name or folder.path.stem
    if not name or "/" in name or "?" in name:
        raise ConfigError(f"a memory cannot be served as {name!r}; give a name without / or ?")
    if num_replicas < 1:
        raise ConfigError(f"num_replicas is {num_replicas}; allowed: 1 or more")
    with folder.lock(), join_cluster(cluster) as ray:
        counts = [document.num_entries for document in folder.documents]
        edges = divide(counts, num_shards)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        actors, head = [], find_head(ray)
        try:
            for shard, replica in itertools.product(range(num_shards), range(num_replicas)):
                options = {
                    "name": name_replica(name, shard, replica),
                    "namespace": NAMESPACE,
                    "num_cpus": 0,
                    "max_restarts": -1,
                    # Replicas of a shard on different machines, where there are as many.
                    "scheduling_strategy": place(nodes[(shard + replica) % len(nodes)], soft=True),
                }
                make = ray.remote(Shard).options(**options).remote
                try:
                    actors.append(make(folder.path, shard, edges, num_replicas))
                except ValueError as error:
                    raise ConfigError(
                        f"a memory named {name!r} is served in this cluster already; give another "
                        "name"
                    ) from error
            _wait_for(ray, actors)
            address = ray.get_runtime_context().gcs_address
            entries = tuple(sum(counts[a:b]) for a, b in itertools.pairwise(edges))
            yield Served(f"ray://{address}/{name}", entries, len(nodes), head)
        finally:
            for actor in actors if not head.is_lost else ():
                ray.kill(actor)


def _wait_for(ray: Any, actors: Sequence[Any]) -> None:
    """Wait until all shards are there.

    Raises:
        MemorizingError: a shard cannot open the folder.
    """
    for ref in [actor.describe.remote() for actor in actors]:
        try:
            get(ref)
        except ray.exceptions.RayActorError as error:
            raise MemoryFolderError(
                f"a shard cannot be started: {error}; every machine of the cluster must have the "
                "folder of the memory at the same place"
            ) from error


def divide(num_entries: Sequence[int], num_shards: int) -> tuple[int, ...]:
    """The first document of every shard, and the number of all: about equally many entries.

    Raises:
        ConfigError: fewer documents than shards.
    """
    if not 1 <= num_shards <= len(num_entries):
        raise ConfigError(
            f"num_shards is {num_shards}; allowed: 1 to {len(num_entries)}, the documents of this "
            "memory, which stay whole"
        )
    ends, total = list(itertools.accumulate(num_entries)), sum(num_entries)
    edges = [0]
    for shard in range(1, num_shards):
        # As near as possible to its share, with a document at least for every shard.
        first, last = edges[-1] + 1, len(num_entries) - (num_shards - shard)
        share = total * shard / num_shards
        edges.append(min(range(first, last + 1), key=lambda edge: abs(ends[edge - 1] - share)))
    return (*edges, len(num_entries))
