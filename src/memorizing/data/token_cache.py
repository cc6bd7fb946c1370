"""Token ids on disk, by the content they came from."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from memorizing.storage.files import write_bytes

_FORMAT = "memorizing tokens 1"
CACHE_VARIABLE = "MEMORIZING_CACHE"


def find_cache_dir() -> Path:
    """`MEMORIZING_CACHE`, or `~/.cache/memorizing`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path("~/.cache/memorizing")).expanduser()


class TokenCache:
    """A folder of files, one per text and tokenizer, each an .npz with a checksum.

    Ids are uint16 where they fit, else uint32. A file that is truncated or altered counts as absent
    and is written anew. The folder may be deleted at any time.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """Use `folder`, or the default one."""
        self.folder = (Path(folder) if folder is not None else find_cache_dir()) / "tokens"

    def locate(self, text: str, fingerprint: str) -> Path:
        """Where the tokens of a text are kept, by the SHA-256 of format, tokenizer and text."""
        digest = hashlib.sha256(f"{_FORMAT}\0{fingerprint}\0".encode())
        digest.update(text.encode("utf-8"))
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.npz"

    def read(self, path: Path, vocab_size: int) -> np.ndarray | None:
        """Tokens (n,) int32, or None where they are absent, damaged or out of the vocabulary."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                tokens = arrays["tokens"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        if (
            tokens.ndim != 1
            or tokens.dtype not in (np.uint16, np.uint32)
            or tokens.max(initial=0) >= vocab_size
        ):
            return None
        return tokens.astype(np.int32)

    def write(self, path: Path, tokens: np.ndarray) -> None:
        """Keep tokens.

        Raises:
            ResourceError: there is no space left, or the folder cannot be written.
        """
        small = tokens.max(initial=0) <= np.iinfo(np.uint16).max
        buffer = io.BytesIO()
        np.savez(buffer, tokens=tokens.astype(np.uint16 if small else np.uint32))
        write_bytes(path, buffer.getvalue())
