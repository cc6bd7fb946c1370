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

        Add all texts before the first is listed: later ones take longer.

        Raises:
            ResourceError: the disk is full.
        """
        row = (clean_text(group), clean_text(name), raw)
        self._execute("INSERT INTO texts (collection, name, raw) VALUES (?, ?, ?)", *row)

    def list_groups(self) -> Iterator[str]:
        """Every group, in the order in which their first texts came."""
        self._index()
        rows = self._execute("SELECT collection FROM texts GROUP BY collection ORDER BY MIN(place)")
        return (group for (group,) in rows)

    def list_texts(self, group: str, *, last: bool = False) -> dict[str, int]:
        """Names of a group, in the order in which they came, and where their texts are.

        Args:
            group: whose.
            last: of texts of one name the last is meant, and not the first.
        """
        self._index()
        return dict(
            self._execute(
                f"SELECT name, {'MAX' if last else 'MIN'}(place) FROM texts WHERE collection = ? "
                "GROUP BY name ORDER BY MIN(place)",
                group,
            )
        )

    def read(self, place: int) -> bytes:
        """The text at a place that `list_texts` gave."""
        return self._execute("SELECT raw FROM texts WHERE place = ?", place).fetchone()[0]

    def _index(self) -> None:
        self._execute("CREATE INDEX IF NOT EXISTS by_name ON texts (collection, name, place)")

    def _execute(self, query: str, *values: str | bytes | int) -> sqlite3.Cursor:
        try:
            return self._database.execute(query, values)
        except sqlite3.OperationalError as error:
            raise ResourceError(
                f"cannot gather texts in {self._folder.name!r} ({error}); free space, or set "
                "TMPDIR to a folder with room for the whole corpus"
            ) from error
