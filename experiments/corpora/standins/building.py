"""A family's folder: built next to its place, then renamed; whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from memorizing.errors import CorpusError
from memorizing.storage.files import write_json
from standins.packages import Package
from standins.readers import READERS
from standins.texts import Documents, read_stacks

MANIFEST = ".built.json"
"""Hidden, so that no corpus takes it for a document."""
READERS_VERSION = 1
"""Goes up when a reader gives other documents: what was built before is then built anew."""


@dataclass(frozen=True)
class Built:
    """What is in a family's folder."""

    fingerprint: str
    """Of the packages, and of what reads them."""
    documents: int
    bytes: int
    sha256: str
    """Of the sorted names and contents of all files."""


def fingerprint_inputs(packages: Iterable[Package], stacks: Path | None = None) -> str:
    """What the folder of a family depends on: packages, readers, and the Stacks project's files."""
    digest = hashlib.sha256(f"readers {READERS_VERSION}\n".encode())
    for package in packages:
        digest.update(f"{package.name} {package.sha256} {package.reader}\n".encode())
    if stacks is not None:
        for name, raw in read_stacks(stacks):
            digest.update(f"{name} {hashlib.sha256(raw).hexdigest()}\n".encode())
    return digest.hexdigest()


def find_built(place: Path, fingerprint: str) -> Built | None:
    """What `place` holds, where that was built from the same inputs; None where nothing is there.

    Raises:
        CorpusError: something else is there.
    """
    if not place.exists():
        return None
    try:
        built = Built(**json.loads((place / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        built = None
    if built is None or built.fingerprint != fingerprint:
        raise CorpusError(
            f"{str(place)!r} exists and was not built from these packages; move it away, or choose "
            "another folder with --folder"
        )
    return built


def build_family(
    place: Path, files: Mapping[Package, Path], fingerprint: str, stacks: Path | None = None
) -> Built:
    """Read packages and write their documents to the folder `place`, which appears when all are.

    Args:
        place: a folder that does not exist.
        files: the packages and where their files are, verified.
        fingerprint: of `fingerprint_inputs`.
        stacks: a checkout of the Stacks project, or None.

    Raises:
        CorpusError: a package cannot be read, or two documents have the same name. Nothing is left
            behind, also after an interrupt.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".partial"))
    try:
        contents: dict[str, str] = {}
        num_documents = num_bytes = 0
        for source, one_document, documents in _read_sources(files, stacks):
            before = len(contents)
            for name, raw in documents:
                if name in contents:
                    raise CorpusError(f"{source} has a second document {name!r}; names must differ")
                _write(work, name, raw)
                contents[name] = hashlib.sha256(raw).hexdigest()
                num_bytes += len(raw)
            if len(contents) == before:
                raise CorpusError(
                    f"{source} holds no documents: it is not what packages.toml means by it"
                )
            num_documents += 1 if one_document else len(contents) - before
        lines = "".join(f"{name}\t{contents[name]}\n" for name in sorted(contents))
        digest = hashlib.sha256(lines.encode()).hexdigest()
        built = Built(fingerprint, num_documents, num_bytes, digest)
        write_json(work / MANIFEST, asdict(built))
        work.chmod(0o755)
        work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return built


def _read_sources(
    files: Mapping[Package, Path], stacks: Path | None
) -> Iterator[tuple[str, bool, Documents]]:
    """Each source's name, whether all its files are one document, and its files."""
    for package, path in files.items():
        reader = READERS[package.reader]
        yield package.file, reader.one_document, reader.read(package.name, path)
    if stacks is not None:
        yield f"checkout {str(stacks)!r}", False, read_stacks(stacks)


def _write(work: Path, name: str, raw: bytes) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise CorpusError(f"document name {name!r} leaves the corpus's folder")
    path = work.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
