"""Writing a file so that it is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

from memorizing.errors import ResourceError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the system that mean: no space left."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name next to `path`, sync, then rename; folders are made where missing.

    Raises:
        ResourceError: there is no space left, or the folder cannot be written. Nothing is left
            behind.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        what = "no space left" if error.errno in FULL_DISK else error.strerror or str(error)
        raise ResourceError(
            f"cannot write {len(content):,} bytes to {str(path)!r}: {what}; free space or choose "
            "another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, whole or not at all; numbers that are not finite become null.

    Raises:
        ResourceError: the file cannot be written.
    """
    text = json.dumps(_replace_non_finite(values), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
