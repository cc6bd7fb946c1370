import sys

import pytest
import torch

from memorizing.errors import ConfigError, IndexUnavailableError
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
