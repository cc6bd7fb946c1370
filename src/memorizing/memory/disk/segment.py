"""A segment file that is mapped: checked by size and header at once, by checksum when first read.

Segment files never change, so that many processes may map one while others are added. A mapped file
stays readable when its name is gone.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import stat
import threading
from pathlib import Path

import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.description import FolderDescription
from memorizing.memory.disk.layout import plan_segment
from memorizing.memory.disk.manifest import SegmentRecord

PLAIN_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Flags that open no link, and wait for no pipe."""

_ADVICE = "use another copy of the memory, or read the text again"


class SegmentFile:
    """The tensors of one segment. What they hold must not be changed; it would not be saved."""

    def __init__(self, folder: Path, record: SegmentRecord, description: FolderDescription) -> None:
        """Map the file.

        Raises:
            FileNotFoundError: it is not there.
            MemoryFolderError: it is no file, or another one than the manifest says.
        """
        self.record = record
        self.path = folder / record.file
        self._layout = plan_segment(description, record.counts)
        self._is_verified = False
        self._lock = threading.Lock()
        content = map_plain_file(self.path, self._layout.num_bytes)
        header = self._layout.header
        if content[: len(header)] != header:
            raise MemoryFolderError(
                f"{self.path} has another header than its manifest says: it was altered; {_ADVICE}"
            )
        self._content = content

    def verify(self) -> None:
        """Compare the checksum, once.

        Raises:
            MemoryFolderError: the file was altered.
        """
        with self._lock:
            if self._is_verified:
                return
            if hashlib.sha256(self._content).hexdigest() != self.record.sha256:
                raise MemoryFolderError(
                    f"{self.path} was altered: its checksum is not that of its manifest; {_ADVICE}"
                )
            self._is_verified = True

    def get_tensor(self, name: str) -> Tensor:
        """A tensor by reference; entries are aligned.

        Raises:
            MemoryFolderError: the file was altered.
        """
        self.verify()
        place = self._layout.places[name]
        if not place.num_bytes:
            return torch.empty(place.shape, dtype=place.dtype)
        content, start = self._content, place.start
        if start % place.dtype.itemsize:
            content, start = bytearray(content[start : start + place.num_bytes]), 0
        count = math.prod(place.shape)
        flat = torch.frombuffer(content, dtype=place.dtype, count=count, offset=start)
        return flat.view(place.shape)


def map_plain_file(path: Path, num_bytes: int) -> mmap.mmap:
    """Map a file, privately: whoever writes to the memory writes to a copy.

    Raises:
        FileNotFoundError: there is none.
        MemoryFolderError: it is no plain file, cannot be read or has another size.
    """
    try:
        descriptor = os.open(path, PLAIN_FILE)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MemoryFolderError(
            f"{path} cannot be read ({error.strerror}); a memory consists of plain files, no links"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MemoryFolderError(f"{path} is no file; {_ADVICE}")
        if status.st_size != num_bytes:
            raise MemoryFolderError(
                f"{path} has {status.st_size:,} bytes and its manifest says {num_bytes:,}: it was "
                f"cut off or altered; {_ADVICE}"
            )
        return mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
