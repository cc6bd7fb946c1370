"""The files that a path in a corpus's name stands for: a file, a folder, a shell pattern."""

from __future__ import annotations

import glob
import itertools
from pathlib import Path

from memorizing.data.text import ReadLog, find_files
from memorizing.errors import CorpusError
from memorizing.settings import find_nearest


def list_files(where: str, log: ReadLog, suffixes: tuple[str, ...] = ()) -> dict[str, Path]:
    """Files by name, sorted: the path from the folder, or from the fixed part of a pattern.

    `suffixes` narrows down a folder; a file or pattern is taken at its word.

    Raises:
        CorpusError: the path does not exist, or a pattern matches no file.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        kept = find_files(
            path, log, keep=lambda name: not suffixes or name.lower().endswith(suffixes)
        )
        if not kept:
            what = " or ".join(suffixes) or "visible"
            raise CorpusError(
                f"folder {where!r} holds no {what} files; name a folder or file that does"
            )
        return {str(name): path / name for name in kept}
    if path.exists():
        return {path.name: path}
    if glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [name for name in found if name.is_file()]
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        if not files:
            raise CorpusError(f"pattern {where!r} matches no file; {_describe_absence(fixed)}")
        return {name.relative_to(fixed).as_posix(): name for name in files}
    raise explain_missing(path, where)


def list_subfolders(where: str) -> list[Path]:
    """Visible direct subfolders, sorted.

    Raises:
        CorpusError: the path is not a folder, or has no subfolders.
    """
    path = Path(where).expanduser()
    if not path.is_dir():
        raise explain_missing(path, where)
    folders = sorted(
        p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__pycache__"))
    )
    if not folders:
        raise CorpusError(
            f"folder {where!r} has no subfolders; each document is a subfolder: name the folder "
            "above"
        )
    return folders


def explain_missing(path: Path, where: str) -> CorpusError:
    """The error for a path that is not there, with the nearest names in the folder above it."""
    if path.exists():
        return CorpusError(f"{where!r} is a file; give a folder")
    above = path.parent
    if not above.is_dir():
        return CorpusError(f"path {where!r} does not exist; {_describe_absence(above)}")
    return CorpusError(
        f"path {where!r} does not exist; "
        f"{find_nearest(path.name, sorted(p.name for p in above.iterdir()))}"
    )


def _describe_absence(folder: Path) -> str:
    """The first part of a folder's path that is not there, and where a relative path begins."""
    missing = next((p for p in [*reversed(folder.parents), folder] if not p.exists()), None)
    if missing is None:
        return f"the folder {str(folder)!r} is there, but has no such file: check the rest of it"
    if folder.is_absolute():
        return f"there is no {str(missing)!r}: give an existing path"
    return (
        f"it is relative to the working directory '.', where there is no {str(missing)!r}: run "
        "this in the folder that has it, or give the whole path"
    )
