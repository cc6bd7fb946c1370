"""The compressed commentary format of SWORD modules (zCom4), one block per chapter.

`.czs` has 12 bytes per block, little-endian: offset in `.czz`, compressed size, expanded size.
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

from memorizing.errors import CorpusError
from standins.archives import read_members

_MAX_BLOCK_BYTES = 16 * 2**20


def read_chapters(path: Path, book: str, num_chapters: int) -> dict[int, bytes]:
    """Chapters of a book of the Old Testament by number, in OSIS markup.

    Raises:
        CorpusError: the package has no such module, or blocks that cannot be expanded.
    """
    members = read_members(path, lambda name: name.endswith(("/ot.czs", "/ot.czz")))
    by_ending = {name.rsplit(".", 1)[1]: raw for name, raw in members.items()}
    if set(by_ending) != {"czs", "czz"}:
        raise CorpusError(f"package {path.name!r} is no SWORD commentary: ot.czs or ot.czz lacks")
    index, blocks = by_ending["czs"], by_ending["czz"]
    begins = re.compile(rb'\s*<chapter n="(\d+)" osisID="%s\.\d+"' % book.encode())
    chapters: dict[int, bytes] = {}
    for offset, size, expanded in struct.iter_unpack("<III", index[: len(index) // 12 * 12]):
        expander = zlib.decompressobj()
        try:
            raw = expander.decompress(blocks[offset : offset + size], _MAX_BLOCK_BYTES)
        except zlib.error as error:
            raise CorpusError(f"package {path.name!r} has a damaged block ({error})") from error
        if len(raw) != expanded:
            raise CorpusError(
                f"package {path.name!r} has a block of {len(raw):,} bytes, not {expanded:,}"
            )
        if found := begins.match(raw):
            chapters[int(found[1])] = raw
    if sorted(chapters) != list(range(1, num_chapters + 1)):
        raise CorpusError(
            f"package {path.name!r} has {len(chapters)} of {num_chapters} chapters of {book}"
        )
    return chapters
