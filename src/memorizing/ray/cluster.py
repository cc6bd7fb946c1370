"""Ray, imported where somebody asked for it, and its cluster, started or joined."""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memorizing.errors import (
    ConfigError,
    IndexUnavailableError,
    MemorizingError,
    RankError,
    ResourceError,
)

NAMESPACE = "memorizing"
"""Of all our named actors."""
_OBJECT_STORE_BYTES = 2**27
"""Texts, queries and what was found go through it: little at a time."""
_ANSWER_S = 10.0
"""That the head of a cluster has, to answer at all."""
_LOOK_S, _PATIENCE_S = 3.0, 12.0
"""How often it is looked whether it still does, and how long it may not."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)
"""Which a connection of HTTP/2 begins with, and no settings (RFC 9113, 3.4)."""


def import_ray() -> Any:
    """The package.

    Raises:
        IndexUnavailableError: it is not installed; the message has the command.
    """
    # Nobody is told that it is used, and what a later release will do needs no warning.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "ray" not in sys.modules:
        show_token()
    try:
        import ray
    except ImportError as error:
        raise IndexUnavailableError(
            f"this needs the package ray, which cannot be imported ({error}); install it with: pip "
            "install 'memorizing[ray]'"
        ) from error
    return ray


def show_token() -> None:
    """Let Ray show the token of this machine to a cluster that is named; in the environment.

    It does by itself where it finds the cluster, and settles that when it is imported.
    """
    given = [os.environ.get(f"RAY_AUTH_TOKEN{end}") for end in ("", "_PATH")]
    if any(given) or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def join_cluster(address: str | None, num_cpus: int | None = None) -> Iterator[Any]:
    """Be in a cluster while the block runs; gives Ray. See `enter_cluster`."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    enter_cluster(address, num_cpus)
    head = find_head(ray)
    try:
        yield ray
    finally:
        if not head.is_lost:
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
    if address not in (None, "auto"):
        check_head(address)
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
            "--head`, and let this machine join it with `ray start --address=HOST:PORT`; both, and "
            "this command, must have the same token (`ray get-auth-token`), or none"
        ) from error
    return ray


class Head:
    """The head of the cluster that this process is in.

    Without it Ray ends every process of the cluster after a minute, and whatever is asked of Ray
    until then waits for it.
    """

    def __init__(self, address: str) -> None:
        """Take HOST:PORT of one that answered."""
        self.address = address
        self.is_lost = False
        """Whether it is gone: Ray is not asked for anything more."""
        self._lock = threading.Lock()
        self._look_s = time.monotonic() + _LOOK_S
        self._lost_s: float | None = None

    def check(self) -> None:
        """Look whether it answers, every few seconds; costs nothing in between.

        Raises:
            RankError: it has not for a while.
        """
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._look_s:
                return
            try:
                check_head(self.address, _LOOK_S)
                self._lost_s = None
            except ConfigError as error:
                self._lost_s = now_s if self._lost_s is None else self._lost_s
                if now_s - self._lost_s >= _PATIENCE_S:
                    self.is_lost = True
                    raise RankError(
                        f"the head of the Ray cluster at {self.address} has not answered for "
                        f"{now_s - self._lost_s:.0f} s; what was written to disk is whole: start "
                        "the cluster again (ray start --head), and then this command"
                    ) from error
            self._look_s = time.monotonic() + _LOOK_S


def find_head(ray: Any) -> Head:
    """The head of the cluster that this process is in; the same one for all who ask."""
    return _make_head(ray.get_runtime_context().gcs_address)


@functools.cache
def _make_head(address: str) -> Head:
    return Head(address)


def check_head(address: str, limit_s: float | None = None) -> None:
    """Find out whether the head of a cluster answers. Ray itself would try for many minutes.

    Args:
        address: HOST:PORT.
        limit_s: that it has; None is ten seconds.

    Raises:
        ConfigError: it does not, or what answers is something else.
    """
    host, _, port = address.rpartition(":")
    limit_s = _ANSWER_S if limit_s is None else limit_s
    is_coded = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), limit_s) as connection:
            if is_coded:
                return
            connection.sendall(_PREFACE)
            kind = connection.recv(4)[3:]
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error}); write HOST:PORT as `ray start --head` "
            "prints it, and look whether it runs there"
        ) from error
    if kind != _PREFACE[-6:-5]:
        raise ConfigError(
            f"what answers at {address} is no Ray cluster; write HOST:PORT as `ray start --head` "
            "prints it, 6379 if not told otherwise"
        )


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
