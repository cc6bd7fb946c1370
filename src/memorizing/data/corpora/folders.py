"""Files of a folder, or of what is installed: a document each, or a document per folder."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from memorizing.config import DataConfig
from memorizing.data.corpus import Corpus
from memorizing.data.reading.files import find_files, list_files, list_subfolders, read_bytes
from memorizing.data.text import (
    Document,
    ReadLog,
    concatenate_texts,
    make_document,
    shuffle_tree,
)
from memorizing.errors import CorpusError
from memorizing.settings import find_nearest

STANDARD_LIBRARY = "stdlib"
_NOT_STANDARD_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test")


def open_files(where: str, config: DataConfig) -> Corpus:
    """`files:PATH`: one document per text file, named by its path in the folder.

    Raises:
        CorpusError: the path does not exist, or holds no files.
    """
    found = ReadLog()
    return open_listed(f"files:{where}", list_files(where, found), found)


def open_listed(
    where: str, files: Mapping[str, Path], found: ReadLog, what: str = "files"
) -> Corpus:
    """A document per file, by their names; `found` is what was left out, `what` they are called."""

    def read(log: ReadLog) -> Iterator[Document | None]:
        for name, path in files.items():
            raw = read_bytes(path, name, log)
            yield None if raw is None else make_document(name, raw, log)

    return Corpus(f"{where}, {len(files)} {what}", read, found=found)


def open_repositories(where: str, config: DataConfig, kind: str = "repositories") -> Corpus:
    """`repositories:PATH`: one document per subfolder, its text files joined in the paper's order.

    `kind` is what the corpus calls itself.

    Raises:
        CorpusError: the path is not a folder, or has no subfolders.
    """
    folders = list_subfolders(where)

    def read(log: ReadLog) -> Iterator[Document | None]:
        for folder in folders:
            files = {path: folder / path for path in find_files(folder, log)}
            yield join_files(folder.name, files, f"{config.seed}/{folder.name}", log)

    return Corpus(f"{kind}:{where}, {len(folders)} folders", read)


def open_distributions(where: str, config: DataConfig) -> Corpus:
    """`python:NAME[,NAME...]`: one document per installed distribution, all its .py files.

    Raises:
        CorpusError: a distribution is not installed (with the nearest names that are).
    """
    names = [name.strip() for name in where.split(",") if name.strip()]
    places = {
        name: None if name == STANDARD_LIBRARY else _find_distribution(name) for name in names
    }

    def read(log: ReadLog) -> Iterator[Document | None]:
        for name, distribution in places.items():
            files = _list_sources(distribution) if distribution else _list_standard_library(log)
            yield join_files(name, files, config.seed, log)

    return Corpus(
        f"python:{','.join(names)}, {len(names)} installed distributions, a document each", read
    )


def open_subpackages(where: str, config: DataConfig) -> Corpus:
    """`subpackages:PACKAGE`: a document per subfolder of a package, which is not imported.

    Raises:
        CorpusError: there is no such package, or it has no subfolders.
    """
    folders = list_subfolders(str(_find_package(where)))

    def read(log: ReadLog) -> Iterator[Document | None]:
        for folder in folders:
            found = find_files(folder, log, lambda name: name.endswith(".py"))
            files = {PurePosixPath(folder.name) / path: folder / path for path in found}
            yield join_files(folder.name, files, config.seed, log)

    return Corpus(f"subpackages:{where}, {len(folders)} folders", read)


def join_files(
    name: str, files: Mapping[PurePosixPath, Path], seed: int | str, log: ReadLog
) -> Document | None:
    """One document of the files of a tree, as `concatenate_texts`, in the paper's order.

    Files that are binary or cannot be read are noted in `log`.
    """
    ordered = shuffle_tree(files, seed)
    contents = ((path, read_bytes(files[path], f"{path} in {name}", log)) for path in ordered)
    return concatenate_texts(name, contents, log)


def _find_distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        known = {str(d.metadata["Name"]) for d in metadata.distributions() if d.metadata["Name"]}
        raise CorpusError(
            f"distribution {name!r} is not installed; "
            f"{find_nearest(name, sorted({STANDARD_LIBRARY, *known}))}"
        ) from None


def _list_sources(distribution: metadata.Distribution) -> dict[PurePosixPath, Path]:
    """The .py files a distribution has installed; scripts outside its packages are left out."""
    files = distribution.files or []
    return {
        PurePosixPath(file): Path(str(file.locate()))
        for file in files
        if file.suffix == ".py" and ".." not in file.parts and not PurePosixPath(file).is_absolute()
    }


def _list_standard_library(log: ReadLog) -> dict[PurePosixPath, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = find_files(
        root,
        log,
        lambda name: name.endswith(".py") and not name.startswith("_sysconfigdata"),
        lambda path: "no library" if path.name in _NOT_STANDARD_LIBRARY else "",
    )
    return {path: root / path for path in found}


def _find_package(name: str) -> Path:
    top, *rest = name.split(".")
    try:
        # A top-level name: find_spec imports nothing. Its subpackages are reached as folders.
        spec = find_spec(top) if top else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        known = sorted(metadata.packages_distributions())
        raise CorpusError(f"package {top!r} is not installed; {find_nearest(top, known)}")
    places = [Path(location) for location in spec.submodule_search_locations or ()]
    for place in places:
        if place.joinpath(*rest).is_dir():
            return place.joinpath(*rest)
    folders = sorted(p.name for place in places for p in place.iterdir() if p.is_dir())
    nearest = find_nearest(rest[0] if rest else top, folders)
    raise CorpusError(f"package {name!r} is not a folder of {top!r}; {nearest}")
