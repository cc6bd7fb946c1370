"""Opening a memory, of a folder here or served elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memorizing.errors import ConfigError

if TYPE_CHECKING:
    from memorizing.huggingface import MemorySession

_SCHEME = "ray://"


def is_address(path: Path | str | None) -> bool:
    """Whether a memory is served there, and no folder."""
    return isinstance(path, str) and path.startswith(_SCHEME)


def open_memory(
    model: Any,
    path: Path | str | None = None,
    *,
    keep_text: bool = False,
    tokenizer: Any = None,
    documents: Sequence[str] | None = None,
    dtype: str | None = None,
) -> MemorySession:
    """Open a memory for a model, of a folder or by the address under which it is served.

        with memorizing.open_memory(model, "repo.memory") as memory:
            memory.read(tokenizer, documents)
            model.generate(**inputs)

    Args:
        model: the model. One without a memory gets one like that which is there.
        path: see `memorizing.huggingface.open_memory`; or `ray://HOST:PORT/NAME`, as `memorizing
            memory serve` prints it, which is read and not changed. `?limit_s=2` behind it bounds
            how long shards of it are waited for (5 seconds): those that do not answer are left out
            of what is found, and warned of. `ray:///NAME` is of the cluster of this machine.
        keep_text: see `memorizing.huggingface.open_memory`.
        tokenizer: likewise.
        documents: likewise.
        dtype: likewise.

    Raises:
        MemoryFolderError: as `memorizing.huggingface.open_memory`; or a shard does not answer.
        ConfigError: likewise; or nothing is served there, or `keep_text` or `dtype` are given for
            what is served.
        IndexUnavailableError: an address, and Ray is not installed.
    """
    if not is_address(path):
        from memorizing.huggingface import open_memory as open_folder

        return open_folder(
            model, path, keep_text=keep_text, tokenizer=tokenizer, documents=documents, dtype=dtype
        )
    if keep_text or dtype is not None:
        raise ConfigError(
            f"{path} is served, and read as it is; leave keep_text and dtype out, or open its "
            "folder"
        )
    from memorizing.ray.opening import open_served

    return open_served(model, str(path), tokenizer=tokenizer, documents=documents)
