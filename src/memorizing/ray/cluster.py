"""Ray, imported where somebody asked for it, and its cluster, started or joined."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memorizing.errors import ConfigError, IndexUnavailableError, MemorizingError, ResourceError

NAMESPACE = "memorizing"
"""Of all our named actors."""
_OBJECT_STORE_BYTES = 2**27
"""Texts, queries and what was found go through it: little at a time."""


def import_ray() -> Any:
    """The package.

    Raises:
        IndexUnavailableError: it is not installed; the message has the command.
    """
    # Nobody is told that it is used, and what a later release will do needs no warning.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise IndexUnavailableError(
            f"this needs the package ray, which cannot be imported ({error}); install it with: pip "
            "install 'memorizing[ray]'"
        ) from error
    return ray


@contextmanager
def join_cluster(address: str | None, num_cpus: int | None = None) -> Iterator[Any]:
    """Be in a cluster while the block runs; gives Ray. See `enter_cluster`."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    enter_cluster(address, num_cpus)
    try:
        yield ray
    finally:
        ray.shutdown()


def enter_cluster(address: str | None, num_cpus: int | None = None) -> Any:
    """Be in a cluster from now on; gives Ray. A process that is in one already stays in that.

    Args:
        address: HOST:PORT of a cluster that this machine is a part of, or `auto` for the one that
            was started here; None starts one of this machine, which ends with this process.
        num_cpus: of the one that is started; None is those of the machine.

    Raises:
        IndexUnavailableError: Ray is not installed.
        ConfigError: there is no such cluster.
        ResourceError: none can be started here.
    """
    ray = import_ray()
    if ray.is_initialized():
        return ray
    here: dict[str, Any] = {
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                address=address or "local",
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level="ERROR",
                **({} if address else here),
            )
    except Exception as error:  # of no class of its own, where a node takes too long to start
        ray.shutdown()
        if address is None:
            raise ResourceError(
                f"Ray cannot be started on this machine ({error}); look at what else runs here, or "
                "start it with `ray start --head` and name it: --ray auto"
            ) from error
        raise ConfigError(
            f"no Ray cluster at {address} can be used ({error}); start one with `ray start "
            "--head`, and let this machine join it with `ray start --address=HOST:PORT`"
        ) from error
    return ray


def get(ref: Any) -> Any:
    """What an actor answered, or its error as it was raised.

    Raises:
        MemorizingError: the actor raised it.
        RayError: the actor or its machine is gone, or something else was raised.
    """
    ray = import_ray()
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MemorizingError):
            raise error.cause from None
        raise
