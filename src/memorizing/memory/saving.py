"""A memory in a folder: its tensors in one safetensors file, and beside it what its index saved.

memory.safetensors   keys, values, counts; in the header the format and the index
index/               see `KeyIndex.save`; only for indexes that take long to build
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch

from memorizing.errors import StateError
from memorizing.files import write_atomically
from memorizing.index_settings import IndexSettings, parse_index
from memorizing.memory.store import Memory

_FORMAT = "memorizing memory 1"
_TENSORS = "memory.safetensors"
_INDEX = "index"


def save_memory(memory: Memory, folder: Path) -> None:
    """Write a memory and its index into a folder, which may be new.

    The index is written first: it names the keys it was built from, and is refused with others, so
    that an interrupt between the two loses no data but the index of before.

    Raises:
        ResourceError: a file cannot be written; what was there before is still whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    memory.index.save(folder / _INDEX)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in memory.state_dict().items()}
    metadata = {"format": _FORMAT, "index": str(memory.index.settings)}
    write_atomically(folder / _TENSORS, safetensors.torch.save(tensors, metadata))


def open_memory_folder(folder: Path, index: IndexSettings | None = None) -> Memory:
    """The memory that `save_memory` wrote, on the CPU.

    Args:
        folder: where it is.
        index: what searches it; None is the index it was saved with, which is then read and not
            built. Another one is built from the keys.

    Raises:
        StateError: the folder holds no memory, or one of another format, or is damaged, or its
            index was built from other keys.
        IndexUnavailableError: the index needs a package that is not installed.
    """
    path = folder / _TENSORS
    if not path.is_file():
        raise StateError(f"{folder} holds no memory: there is no {_TENSORS}; name another folder")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise StateError(
                    f"{path} is of the format {metadata.get('format')!r}; expected {_FORMAT!r}; "
                    "use the version of memorizing that wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise StateError(
            f"{path} is damaged ({error}); use another copy, or read the text again"
        ) from error
    saved = parse_index(metadata["index"])
    num_rows, num_heads, capacity, head_dim = tensors["keys"].shape
    memory = Memory(num_rows, num_heads, capacity, head_dim, tensors["keys"].dtype, index=saved)
    memory.keys, memory.values = tensors["keys"], tensors["values"]
    memory.num_appended = tensors["num_appended"]
    if index is None or index == saved:
        memory.index.load(folder / _INDEX, memory.stored_keys)
    else:
        memory.set_index(index)
    return memory
