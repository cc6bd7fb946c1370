"""Many processes read what one would have read, and what a killed one read is read again."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from memorizing.errors import ConfigError
from memorizing.huggingface import open_memory
from memorizing.huggingface.loading import load_pretrained
from memorizing.memory import MemoryFolder
from memorizing.ray import RayReaders
from memorizing.ray.reading import load_reader
from tests.huggingface.sessions.tools import TOKENIZER
from tests.huggingface.tools import LAYER, find_model, give_memory, make_tokens

DOCUMENTS = {
    f"document {number}": " ".join(f"w{token}" for token in make_tokens(1, length, seed=length)[0])
    for number, length in enumerate((67, 30, 38, 5, 101, 13, 53, 1, 71))
}


def read(model: Any, path: Path, **options: Any) -> Any:
    memory = open_memory(model, path, keep_text=True)
    return memory.read(TOKENIZER, DOCUMENTS, **{"progress": False, **options})


def load_entries(path: Path) -> dict[str, tuple[str, torch.Tensor, torch.Tensor]]:
    """Per document its text, and its keys and values."""
    folder = MemoryFolder.open(path)
    folder.verify()
    found = {}
    for one in folder.documents:
        entries = dict(folder.contents.read_entries(one, torch.arange(one.num_entries)))
        found[one.name] = (folder.contents.read_text(one.name), *entries[LAYER])
    return found


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    model = load_pretrained(str(model_folder))[0]
    give_memory(model)
    return model


@pytest.fixture(scope="module")
def alone(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "memory"
    read(model, path)
    return path


def make_readers(model_folder: Path, num_workers: int) -> RayReaders:
    """A document at a time."""
    load = partial(load_reader, str(model_folder), "float32", "cpu", None, {})
    readers = RayReaders(load, num_workers)
    readers.batch_bytes = 1
    return readers


def check_same(found: Path, expected: Path) -> None:
    mine, theirs = load_entries(found), load_entries(expected)
    assert mine.keys() == theirs.keys()
    for name, (text, *entries) in theirs.items():
        assert mine[name][0] == text
        assert all(map(torch.equal, mine[name][1:], entries))
    assert [one.name for one in found.iterdir() if one.is_dir() or "part" in one.name] == []


def list_workers() -> list[int]:
    """Processes of workers, by what Ray makes of their names."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if "ray::Worker" in " ".join(one.cmdline()):
                found.append(one.pid)
    return found


def wait_for_the_end_of_workers() -> None:
    deadline = time.monotonic() + 20
    while list_workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list_workers() == []


def test_what_a_killed_worker_read_is_read_again_and_nothing_twice(
    cluster, model, model_folder, alone, tmp_path
):
    readers, counted = make_readers(model_folder, 2), []

    def kill_one(name: str, num_tokens: int) -> None:
        if not counted:
            for pid in list_workers():
                os.kill(pid, signal.SIGKILL)
        counted.append((name, num_tokens))

    with pytest.warns(UserWarning, match="a worker died while it read document"):
        report = read(model, tmp_path / "memory", readers=readers, progress=kill_one)
    check_same(tmp_path / "memory", alone)
    assert readers.num_deaths >= 1
    tokens = {name: len(text.split()) + 1 for name, text in DOCUMENTS.items()}
    assert sorted(counted) == sorted(tokens.items())
    assert (report.num_documents, report.num_tokens) == (len(tokens), sum(tokens.values()))
    wait_for_the_end_of_workers()


def test_an_interrupt_keeps_what_was_read_whole_and_the_rest_is_read_later(
    cluster, model, model_folder, alone, tmp_path
):
    def interrupt(name: str, num_tokens: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "memory"
    with pytest.raises(KeyboardInterrupt):
        read(model, path, readers=make_readers(model_folder, 1), progress=interrupt)
    num_read = len(MemoryFolder.open(path).documents)
    assert 1 <= num_read < len(DOCUMENTS)
    report = read(model, path)
    assert (len(report.skipped), report.num_documents) == (num_read, len(DOCUMENTS) - num_read)
    check_same(path, alone)


def test_an_error_of_a_worker_is_raised_as_it_was(cluster, model, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        read(model, tmp_path / "memory", readers=make_readers(Path("nowhere"), 1))
    wait_for_the_end_of_workers()


def test_workers_read_into_a_folder_only():
    model = find_model()
    give_memory(model)
    with pytest.raises(ConfigError, match="read into a folder, and this memory has none"):
        read(model, None, readers=make_readers(Path("nowhere"), 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_bytes", "num_workers", "expected"),
    [(None, 3, 2**16), (0, 3, 2**12), (2**20, 7, 2**20 // 28), (2**40, 7, 2**16)],
)
def test_batches_are_a_share_of_all_neither_tiny_nor_huge(num_bytes, num_workers, expected):
    readers = RayReaders(lambda: (None, None), num_workers, num_bytes=num_bytes)
    assert readers.batch_bytes == expected


def test_there_is_a_worker_at_least():
    with pytest.raises(ConfigError, match="num_workers is 0; allowed: 1 or more"):
        RayReaders(lambda: (None, None), 0)
