"""What answers, or does not, where a cluster is said to be; and what it is shown."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from memorizing.errors import ConfigError, RankError
from memorizing.ray import cluster
from memorizing.ray.cluster import Head, check_head, show_token

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""Of HTTP/2: none, for the whole connection."""


@contextmanager
def listen(answer: bytes | None, port: int = 0) -> Iterator[str]:
    """The address of what takes one connection, and answers; None keeps silent."""
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(ConnectionResetError):
                connection.recv(1000)
                if answer is not None:
                    connection.sendall(answer)
                    connection.recv(1000)
                else:
                    time.sleep(0.3)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_what_speaks_as_the_head_of_a_cluster_does_is_taken_for_one():
    with listen(SETTINGS) as address:
        check_head(address)


def test_a_head_that_does_not_answer_for_a_while_is_lost_and_one_that_rests_is_not(monkeypatch):
    monkeypatch.setattr(cluster, "_LOOK_S", 0.02)
    monkeypatch.setattr(cluster, "_PATIENCE_S", 0.2)
    with listen(SETTINGS) as address:
        head = Head(address)
        head.check()  # not looked yet
        time.sleep(0.02)
        head.check()
    for _ in range(2):  # nothing listens
        time.sleep(0.03)
        head.check()
    with listen(SETTINGS, int(address.split(":")[1])):
        time.sleep(0.03)
        head.check()  # and the time begins anew
    time.sleep(0.2)
    head.check()
    assert not head.is_lost
    time.sleep(0.25)
    with pytest.raises(
        RankError, match=f"the head of the Ray cluster at {address} has not answered for 0 s"
    ):
        head.check()
    assert head.is_lost


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b"\x15\x03\x03"])
def test_what_answers_otherwise_is_told(answer):
    with listen(answer) as address, pytest.raises(ConfigError, match="is no Ray cluster; write"):
        check_head(address)


def test_what_keeps_silent_is_waited_for_a_while(monkeypatch):
    monkeypatch.setattr(cluster, "_ANSWER_S", 0.05)
    with listen(None) as address, pytest.raises(ConfigError, match="timed out"):
        check_head(address)


def test_where_nothing_listens_it_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address} .*refused"):
        check_head(address)


@pytest.mark.parametrize("address", ["host", "host:", "host:port", "127.0.0.1:-1", ":"])
def test_what_is_no_address_of_a_head_is_told(address):
    with pytest.raises(ConfigError, match="write HOST:PORT as `ray start --head` prints it"):
        check_head(address)


@pytest.mark.parametrize(("mode", "expected"), [(None, "token"), ("disabled", "disabled")])
def test_a_token_of_this_machine_is_shown_unless_told_otherwise(
    monkeypatch, tmp_path: Path, mode, expected
):
    for name in ("MODE", "TOKEN", "TOKEN_PATH"):
        monkeypatch.setenv(f"RAY_AUTH_{name}", "")  # so that it is put back
        monkeypatch.delenv(f"RAY_AUTH_{name}")
    monkeypatch.setenv("HOME", str(tmp_path))
    show_token()
    assert "RAY_AUTH_MODE" not in os.environ
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("7")
    show_token()
    assert os.environ["RAY_AUTH_MODE"] == expected
