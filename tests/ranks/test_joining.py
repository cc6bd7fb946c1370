import socket
import subprocess
import sys

import pytest
import torch

from memorizing.errors import ConfigError, IndexUnavailableError, RankError
from memorizing.ranks import ALONE, find_world, join_ranks


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert find_world() == 1
    with join_ranks("cpu") as ranks:
        assert ranks is ALONE
        assert ranks.is_main
        assert ranks.deal(5) == range(5)
        assert ranks.sum([0.1, 2.0]) == [0.1, 2.0]
        assert ranks.find_device("cpu") == torch.device("cpu")


@pytest.fixture
def _launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_launched")
def test_several_processes_without_accelerate_are_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.state", None)
    assert find_world() == 3
    with pytest.raises(IndexUnavailableError, match="trainer"), join_ranks("cpu"):
        pass


@pytest.mark.usefixtures("_launched")
@pytest.mark.parametrize("value", ["soon", "0.5", "inf", "nan", "-45"])
def test_a_timeout_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setenv("MEMORIZING_RANK_TIMEOUT_S", value)
    with pytest.raises(ConfigError, match="MEMORIZING_RANK_TIMEOUT_S is"), join_ranks("cpu"):
        pass


@pytest.mark.usefixtures("_launched")
def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    with socket.create_server(("localhost", 0)) as taken:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(RankError, match="another port"), join_ranks("cpu"):
            pass


LEFT_ALONE = """
import os, sys
from memorizing.cli import main
main(["--version"])
from torch.distributed import TCPStore
store = TCPStore("localhost", 0, None, True, wait_for_workers=False)
begin, end = os.pipe()
if os.fork():
    os.read(begin, 1)
    os._exit(0)
mine = TCPStore("localhost", store.port, wait_for_workers=False)
mine.set("here", "1")
os.write(end, b" ")
try:
    while True:
        mine.get("here")
except RuntimeError as error:
    print("left alone")
os._exit(0)
"""


def test_a_connection_that_breaks_prints_nothing_of_torch() -> None:
    words = [sys.executable, "-c", LEFT_ALONE]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=100)
    assert "left alone" in done.stdout
    assert done.stderr == ""
