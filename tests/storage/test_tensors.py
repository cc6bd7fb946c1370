"""Tensors in files, and headers that lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memorizing.errors import CheckpointError
from memorizing.storage.tensors import (
    AwaitedTensor,
    count_bytes,
    fetch_tensors,
    read_header,
    read_tensors,
    view_bytes,
    write_tensors,
)

ALL = (
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    + [torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8]
    + [torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64]
)


def read(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    return read_tensors(path, CheckpointError, "take another", **options)


def make_tensors() -> dict[str, torch.Tensor]:
    whole = torch.arange(35.0).view(5, 7)
    tensors = {str(dtype): torch.tensor([[0], [1], [1]]).to(dtype) for dtype in ALL}
    tensors |= {"whole": whole, "again": whole, "part": whole[1:4, 2:], "turned": whole.T}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}


def test_what_is_written_is_read_and_other_programs_read_it_too(tmp_path: Path) -> None:
    tensors = make_tensors()
    write_tensors(tmp_path / "x", tensors)
    others = load_file(tmp_path / "x")
    mine = read(tmp_path / "x", expected=tensors)
    assert mine.keys() == others.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for found in (mine[name], others[name]):
            assert found.dtype == tensor.dtype
            assert view_bytes(found) == view_bytes(tensor.contiguous())
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_other_programs_wrote_is_read(tmp_path: Path) -> None:
    tensors = {name: t.contiguous().clone() for name, t in make_tensors().items()}
    save_file(tensors, tmp_path / "x", metadata={"a": "b"})
    assert read_header(tmp_path / "x", CheckpointError, "").metadata == {"a": "b"}
    for name, found in read(tmp_path / "x").items():
        assert view_bytes(found) == view_bytes(tensors[name])
    save_file({}, tmp_path / "x")
    assert read(tmp_path / "x") == {}


def pack(header: object, num_bytes: int = 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def describe(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        pack(describe(), 23),
        pack(describe(), 25),
        pack(b"[" * 100_000),
        pack(b"\xff\xff"),
        pack([]),
        pack({"a": 1}),
        pack({"__metadata__": {"a": 1}, **describe()}),
        pack({"__metadata__": [], **describe()}),
        pack(describe(dtype="F4")),
        pack(describe(dtype=["F32"])),
        pack(describe(shape=[2**40, 2**40])),
        pack(describe(shape=[-2, -3])),
        pack(describe(shape=[2.0, 3])),
        pack(describe(shape=[True, 6])),
        pack(describe(shape=[1] * 100_000)),
        pack(describe(data_offsets=[0])),
        pack(describe(data_offsets=[-24, 0])),
        pack(describe(data_offsets=[2**70, 2**70 + 24])),
        pack({**describe(), "b": describe()["a"]}),
        pack({**describe(), "b": describe(data_offsets=[48, 72])["a"]}, 72),
    ],
    ids=range(23),
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or altered .*; take another") as caught:
        read(tmp_path / "x")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", [b"\xff", b"a\xe4/b", b"a\xc3\xa4/\xed\xb2\x80"])
def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    write_tensors(path, {"a": torch.arange(7)})
    assert read(path)["a"].tolist() == list(range(7))
    assert read_header(path, CheckpointError, "take another").places["a"].shape == (7,)


def test_other_tensors_than_expected_are_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.zeros(2, 3), "b": torch.zeros(5)})
    for expected, words in (
        ({"a": torch.zeros(2, 3)}, r"its b is \(5,\), expected none"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(5)}, r"its a is \(2, 3\), expected \(3, 2\)"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(5), "c": torch.tensor(0)}, "its c is missing"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / "x", expected=expected)


def test_a_file_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="take another"):
            read(path)


def test_any_changed_byte_of_a_header_gives_an_error_of_ours_or_tensors_of_the_file(
    tmp_path: Path,
) -> None:
    write_tensors(tmp_path / "x", {"a": torch.zeros(2, 3), "b": torch.ones(5, dtype=torch.int8)})
    content = (tmp_path / "x").read_bytes()
    num_refused = 0
    for place in range(len(content) - 29):
        for change in (1, 64):
            altered = bytearray(content)
            altered[place] ^= change
            (tmp_path / "y").write_bytes(altered)
            try:
                found = read(tmp_path / "y")
            except CheckpointError:
                num_refused += 1
            else:
                assert sum(t.numel() * t.element_size() for t in found.values()) == 29
    assert num_refused > 100


def test_what_is_awaited_is_put_together_when_its_turn_comes(tmp_path: Path) -> None:
    tensors = {
        "small": torch.arange(7, dtype=torch.uint8),
        "b": torch.arange(15.0).view(3, 5),
        "a": torch.arange(11.0),
    }
    asked: list[str] = []

    def await_one(name: str) -> AwaitedTensor:
        def fetch() -> torch.Tensor:
            asked.append(name)
            return tensors[name]

        return AwaitedTensor(tensors[name].dtype, tuple(tensors[name].shape), fetch)

    awaited = {**tensors, **{name: await_one(name) for name in ("small", "b")}}
    assert count_bytes(awaited) == 7 + 60 + 44
    whole = write_tensors(tmp_path / "whole", tensors)
    assert not asked
    assert write_tensors(tmp_path / "awaited", awaited) == whole
    # Processes that do not write fetch in the order of the file.
    written = asked.copy()
    assert [name for name, _ in fetch_tensors(awaited)] == ["a", "b", "small"]
    assert asked[len(written) :] == written == ["b", "small"]
