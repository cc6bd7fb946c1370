"""The table of packages: what is fetched, in which version, and what is built of it."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from memorizing.errors import ConfigError, CorpusError

FAMILIES = {
    "proofs": "HOL Light and Coq libraries",
    "code": "Python packages",
    "math": "LaTeX",
    "books": "plain text of books",
    "web": "plain text of pages",
}
"""Family -> what its documents are; in the order in which they are built."""
SOURCES = ("debian", "pypi", "npm")


@dataclass(frozen=True)
class Package:
    """One file of a registry."""

    name: str
    family: str
    source: str
    """The registry: `debian`, `pypi` or `npm`."""
    version: str
    file: str
    """Its name in the registry."""
    sha256: str
    size: int
    """In bytes."""
    license: str
    reader: str
    """What makes documents of it: a key of `readers.READERS`."""


@dataclass(frozen=True)
class Result:
    """What a family is when it was built from these packages."""

    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Table:
    """Packages in the order in which they are read, and what comes out."""

    packages: tuple[Package, ...]
    results: dict[str, Result]
    """By family; `math_with_stacks` is mathematics with the Stacks project."""

    def of_family(self, family: str) -> list[Package]:
        """The packages of one family."""
        return [package for package in self.packages if package.family == family]


def load_table(path: Path) -> Table:
    """Read `packages.toml`.

    Raises:
        ConfigError: the file is missing, no TOML, or a package has other fields than `Package`.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        packages = tuple(Package(**row) for row in raw["package"])
        results = {name: Result(**row) for name, row in raw.get("result", {}).items()}
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{str(path)!r} is no table of packages ({error}); it needs [[package]] with the "
            f"fields {', '.join(Package.__dataclass_fields__)}"
        ) from None
    for package in packages:
        if package.family not in FAMILIES or package.source not in SOURCES:
            raise ConfigError(
                f"package {package.name!r} has the family {package.family!r} and the source "
                f"{package.source!r}; families: {', '.join(FAMILIES)}, sources: "
                f"{', '.join(SOURCES)}"
            )
        if package.file != Path(package.file).name:
            raise ConfigError(
                f"package {package.name!r}: file {package.file!r} is not a plain name"
            )
    return Table(packages, results)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(package: Package, path: Path) -> None:
    """Compare a file with what the table says of it.

    Raises:
        CorpusError: it is another file.
    """
    seen = hash_file(path)
    if seen != package.sha256:
        raise CorpusError(
            f"{path.name} ({path.stat().st_size:,} bytes) has the SHA-256 {seen}, but "
            f"{package.name} {package.version} of {package.source} has {package.sha256} "
            f"({package.size:,} bytes): it is damaged or another build; delete it, then fetch again"
        )
