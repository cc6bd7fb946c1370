from __future__ import annotations

import sys
from pathlib import Path

import pytest

from memorizing.errors import ResourceError
from memorizing.training import read_metrics
from memorizing.training.reporting import MISSING_TENSORBOARD, MetricsLog


def test_every_line_is_read_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(2, {"train": {"nats_per_token": 1.25, "gate": {"1": [0.5, 0.25]}}})
    log.write(3, {"validation": {"perplexity": 7.0}})
    log.close()
    assert read_metrics(log.path) == [
        {"step": 2, "train": {"nats_per_token": 1.25, "gate": {"1": [0.5, 0.25]}}},
        {"step": 3, "validation": {"perplexity": 7.0}},
    ]


def test_a_resumed_log_forgets_later_steps_and_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3, 5):
        log.write(step, {"train": {"tokens": step}})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 7, "tra')
    log = MetricsLog(path, step=3)
    log.write(4, {"train": {"tokens": 4}})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_a_new_log_starts_empty_whatever_was_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    log.close()
    assert read_metrics(log.path) == []


def test_nested_numbers_become_scalars_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    log.write(11, {"train": {"nats_per_token": 1.25, "gate": {"1": [0.5, 0.25]}, "note": "x"}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"train/nats_per_token": 1.25, "train/gate/1/0": 0.5, "train/gate/1/1": 0.25}
    assert set(events.Tags()["scalars"]) == set(tags)
    for tag, value in tags.items():
        [scalar] = events.Scalars(tag)
        assert (scalar.step, scalar.value) == (11, value)


def test_without_tensorboard_the_log_is_written_and_the_lack_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The import fails as it does where it is not installed, whatever was imported before.
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said: list[str] = []
    log = MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb", 0, said.append)
    log.write(1, {"train": {"tokens": 3}})
    log.close()
    assert said == [MISSING_TENSORBOARD]
    assert not (tmp_path / "tb").exists()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "train": {"tokens": 3}}]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.close()
    with Path("/dev/full").open("ab", buffering=0) as log._file:
        with pytest.raises(ResourceError, match="no space left"):
            log.write(1, {"train": {"tokens": 3}})
        log.close()  # does not fail again


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_tensorboard_log_on_a_full_disk_ends_and_the_metrics_go_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", say=said.append)
    log.write(1, {"train": {"tokens": 3}})
    assert log._events is not None
    log._events.file.close()
    with Path("/dev/full").open("ab", buffering=0) as file:
        log._events._records._writer = log._events.file = file
        for step in (2, 3):
            log.write(step, {"train": {"tokens": 3}})
        log.close()
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3]
    [line] = said
    assert "no space left" in line


@pytest.mark.parametrize("place", ["tensorboard", "tensorboard/deeper"])
def test_a_tensorboard_log_that_cannot_be_opened_is_said_and_training_goes_on(
    tmp_path: Path, place: str
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    said: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / place, say=said.append)
    log.write(1, {"train": {"tokens": 3}})
    log.close()
    assert len(read_metrics(log.path)) == len(said) == 1
    assert "the metrics go on" in said[0]


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\n",
        b'{"step": "2"}\n',
        b"[1]\n",
        b"3\n",
        b'{"step": 2, "tra\n',
        b"[" * 100_000 + b"\n",
        b'{"train": {}}\n',
        b"\x00\x00\n",
    ],
)
def test_a_damaged_line_is_left_out_and_those_after_it_stay(tmp_path: Path, damage: bytes) -> None:
    lines = [b'{"step": 1}\n', damage, b'{"step": 3}\n', b'{"step": 4}']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3, 4]
    MetricsLog(tmp_path / "metrics.jsonl", step=3).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 3}\n'
