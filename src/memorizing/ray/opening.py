"""A served memory, opened by its address: ray://[HOST:PORT]/NAME[?limit_s=SECONDS]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.huggingface import MemorySession
from memorizing.huggingface.attaching.fingerprint import Fingerprint
from memorizing.huggingface.sessions.opening import fit_model
from memorizing.huggingface.sessions.stores import choose_documents
from memorizing.ray.asking import Replica, Shards
from memorizing.ray.cluster import NAMESPACE, enter_cluster, get
from memorizing.ray.served import ServedStore
from memorizing.ray.serving import name_replica
from memorizing.ray.shard import Description

LIMIT_S = 5.0
"""That shards have to answer."""
_DESCRIBE_S = 60.0
_FORM = "ray://HOST:PORT/NAME, or ray:///NAME for the cluster that this machine is in"


@dataclass(frozen=True)
class Address:
    """Where a memory is served."""

    cluster: str
    """HOST:PORT, or auto."""
    name: str
    limit_s: float = LIMIT_S


def parse_address(address: str) -> Address:
    """The parts of an address.

    Raises:
        ConfigError: it is none; with the form of one.
    """
    parts = urlsplit(address)
    name, options = parts.path.strip("/"), dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme != "ray" or not name or "/" in name or options.keys() - {"limit_s"}:
        raise ConfigError(f"{address!r} is no address of a served memory; write {_FORM}")
    try:
        limit_s = float(options.get("limit_s", LIMIT_S))
    except ValueError:
        limit_s = math.nan
    if not 0 < limit_s < math.inf:
        raise ConfigError(
            f"limit_s of {address!r} is {options['limit_s']!r}; give seconds, more than 0"
        )
    return Address(parts.netloc or "auto", name, limit_s)


def open_served(
    model: Any,
    address: str,
    *,
    tokenizer: Any = None,
    documents: Sequence[str] | None = None,
    fingerprint: Fingerprint | None = None,
) -> MemorySession:
    """Open a memory that `memorizing memory serve` serves; see `memorizing.open_memory`.

    This process is in its cluster from now on.

    Raises:
        ConfigError: no such cluster, nothing served under this name, or as `open_memory`.
        MemoryFolderError: as `open_memory`, or a shard does not answer.
        IndexUnavailableError: Ray is not installed.
    """
    parsed = parse_address(address)
    ray = enter_cluster(parsed.cluster)
    described = describe(ray, parsed, address)
    with fit_model(model, address, described.folder, fingerprint) as (attachment, _):
        shards = Shards(
            address,
            [
                [find_replica(ray, parsed, shard, one) for one in range(described.num_replicas)]
                for shard in range(len(described.edges) - 1)
            ],
            parsed.limit_s,
        )
        chosen = None
        if documents is not None:
            chosen = choose_documents(described.documents, documents, address)
        store = ServedStore(shards, described, lambda: attachment.open_heads, chosen)
    # It has what a session that writes nothing asks of a folder.
    return MemorySession(attachment, cast(Any, store), keep_text=True, tokenizer=tokenizer)


def find_replica(ray: Any, address: Address, shard: int, replica: int) -> Replica:
    """The actor of a shard.

    Raises:
        ConfigError: there is none.
    """
    name = name_replica(address.name, shard, replica)
    try:
        return Replica(name, ray.get_actor(name, NAMESPACE))
    except ValueError as error:
        raise ConfigError(
            f"no memory named {address.name!r} is served in the Ray cluster {address.cluster}; "
            "serve it there with `memorizing memory serve DIR --ray ADDRESS`"
        ) from error


def describe(ray: Any, address: Address, shown: str) -> Description:
    """What the first shard says of the memory.

    Raises:
        ConfigError: there is none.
        MemoryFolderError: no replica of it answers.
    """
    replica, number = find_replica(ray, address, 0, 0), 0
    while True:
        ref = replica.submit("describe")
        try:
            if ray.wait([ref], timeout=_DESCRIBE_S)[0]:
                return get(ref)
        except ray.exceptions.RayActorError:
            pass
        number += 1
        try:
            replica = find_replica(ray, address, 0, number)
        except ConfigError:
            raise MemoryFolderError(
                f"the first shard of {shown} does not answer; open it again when Ray has "
                "restarted it"
            ) from None
