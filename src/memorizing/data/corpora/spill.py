"""Texts that belong together though they come scattered: gathered in a temporary file on disk."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from memorizing.data.text import clean_text
from memorizing.errors import ResourceError


class SpillStore:
    """Bytes by group and name, in a temporary folder that is removed at the end of a `with` block.

    Memory does not grow with what is stored: it takes one text at a time. The disk holds all of it:
    as many bytes as the texts have, and some more for an index. The folder is made where Python
    makes temporary files: set TMPDIR for another place.
    """

    def __enter__(self) -> SpillStore:
        """Make the temporary file."""
        self._folder = tempfile.TemporaryDirectory(prefix="memorizing-")
        path = Path(self._folder.name) / "texts.sqlite"
        self._database = sqlite3.connect(path, isolation_level=None)
        self._is_indexed = False
        # Nothing has to survive a crash.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute(
            "CREATE TABLE texts (place INTEGER PRIMARY KEY, collection TEXT, name TEXT, raw BLOB)"
        )
        self._database.execute("BEGIN")
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove it."""
        self._database.close()
        self._folder.cleanup()

    def add(self, group: str, name: str, raw: bytes) -> None:
        """Keep a text. What is not UTF-8 in the names is replaced by U+FFFD.

        Raises:
            ResourceError: the disk is full.
        """
        assert not self._is_indexed, "all texts are added before the first is read"
        row = (clean_text(group), clean_text(name), raw)
        self._execute("INSERT INTO texts (collection, name, raw) VALUES (?, ?, ?)", row)

    def list_groups(self) -> Iterator[str]:
        """Every group, in the order in which their first texts came."""
        self._index()
        rows = self._execute("SELECT collection FROM texts GROUP BY collection ORDER BY MIN(place)")
        return (group for (group,) in rows)

    def list_names(self, group: str) -> list[str]:
        """Names of a group, each once, in the order in which they came."""
        self._index()
        query = "SELECT name FROM texts WHERE collection = ? GROUP BY name ORDER BY MIN(place)"
        return [name for (name,) in self._execute(query, (group,))]

    def read(self, group: str, name: str, *, last: bool = False) -> bytes:
        """A text; the first, or the last, of those that have this group and name.

        Raises:
            KeyError: there is none.
        """
        self._index()
        order = "DESC" if last else "ASC"
        query = (
            "SELECT raw FROM texts WHERE collection = ? AND name = ? "
            f"ORDER BY place {order} LIMIT 1"
        )
        for (raw,) in self._execute(query, (group, name)):
            return raw
        raise KeyError(name)

    def _index(self) -> None:
        if not self._is_indexed:
            self._execute("COMMIT")
            self._execute("CREATE INDEX by_name ON texts (collection, name, place)")
            self._is_indexed = True

    def _execute(self, query: str, values: tuple[str | bytes, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(query, values)
        except sqlite3.OperationalError as error:
            raise ResourceError(
                f"cannot gather texts in {self._folder.name!r} ({error}); free space, or set "
                "TMPDIR to a folder with room for the whole corpus"
            ) from error
