"""The server as a process: a socket, uvicorn, and what ends it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from memorizing.errors import ConfigError
from memorizing.serving.app import Server

_POLL_S = 0.1
_ENDING_S = 5
"""To tell clients that their requests were given up."""


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens to nobody yet; port 0 takes a free one.

    Raises:
        ConfigError: the address is not of this machine, or it is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            stack.pop_all()
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened to: {error}; choose another port, or "
            "0 for any that is free"
        ) from error
    return listening


def run_server(server: Server, listening: socket.socket, grace_s: float) -> None:
    """Answer requests until SIGTERM or SIGINT.

    No new request is taken then; those that run and wait are answered for so many seconds, and
    given up after that, which their clients are told.

    Raises:
        KeyboardInterrupt: SIGINT ended it.
    """
    import uvicorn

    config = uvicorn.Config(
        server.build(),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=round(grace_s) + _ENDING_S,
        # A client's address is that of its connection, whatever it says.
        proxy_headers=False,
        server_header=False,
    )
    running = uvicorn.Server(config)

    def give_up() -> None:
        while not running.should_exit:
            time.sleep(_POLL_S)
        time.sleep(grace_s)
        server.line.close()

    threading.Thread(target=give_up, name="memorizing-grace", daemon=True).start()
    running.run(sockets=[listening])
