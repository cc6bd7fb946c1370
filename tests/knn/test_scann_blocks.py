"""ScaNN's blocks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.knn.test_sealed import (
    BLOCK,
    K,
    draw_queries,
    make_ring,
)


def test_what_others_print_during_a_build_of_scann_is_kept(capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("scann")
    from memorizing.knn.scann_blocks import _hold_back_log

    with _hold_back_log():
        os.write(2, b"mine\nI0000 00:00:1.2 1 partitioner.cc:5] theirs\nW0000 00 x\nmine too\n")
    assert capfd.readouterr().err == "mine\nmine too\n"


def test_nothing_of_scann_is_written_or_read(tmp_path: Path):
    ring = make_ring("scann:block_len=53", BLOCK)
    ring.index.save(tmp_path, ring.stored)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "index.json"}
    for name in ("scann_docids.pkl", "0-0-0-0123456789abcdef-scann_docids.pkl"):
        (tmp_path / name).write_bytes(b"cos\nabort\n(tR.")
    ring.index.load(tmp_path, ring.stored)
    ring.search(draw_queries(), K)
