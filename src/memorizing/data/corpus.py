"""A corpus: documents that are read one by one, and what was left out on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memorizing.data.text import Document, ReadLog, clean_name
from memorizing.errors import CorpusError

Reader = Callable[[ReadLog], Iterator[Document | None]]
"""Yields None for what has no text; the log then says so."""


class Corpus:
    """Documents that are read anew, in the same order, each time `documents` is called."""

    def __init__(
        self,
        description: str,
        read: Reader,
        *,
        found: ReadLog | None = None,
        max_documents: int = 0,
    ) -> None:
        """Take a line that says what this is, and what reads it.

        Args:
            description: the line.
            read: reads it; it is given the log of the reading.
            found: what was left out while its files were looked for.
            max_documents: reading stops after so many; 0 is all.
        """
        self.description = clean_name(description)
        self._read = read
        self._found = found or ReadLog()
        self._max_documents = max_documents
        self._log = ReadLog()

    def __str__(self) -> str:
        """The description."""
        return self.description

    @property
    def skipped(self) -> list[str]:
        """What the last reading left out and why, a line each; complete once it has ended.

        What a rule leaves out, such as documents that are too short, is one line with its number.
        """
        return self._log.lines

    @property
    def num_replaced(self) -> int:
        """Files or rows of the last reading in which bytes that are not UTF-8 were replaced."""
        return self._log.num_replaced

    def take(self, num_documents: int) -> Corpus:
        """The same corpus, but reading stops after so many documents; 0 is all."""
        if not num_documents:
            return self
        description = f"{self.description}, the first {num_documents:,} documents"
        return Corpus(description, self._read, found=self._found, max_documents=num_documents)

    def documents(self) -> Iterator[Document]:
        """Read the documents one by one. Starts `skipped` and `num_replaced` afresh.

        Raises:
            CorpusError: no document has text, two have the same name, or the source cannot be read.
        """
        self._log = log = ReadLog(list(self._found.items))
        names: set[str] = set()
        for document in self._read(log):
            if document is None:
                continue
            if document.name in names:
                raise CorpusError(
                    f"two documents of {self.description} are named {document.name!r}; names "
                    "must differ: give each once, or remove the name column: rows are then numbered"
                )
            names.add(document.name)
            yield document
            if len(names) == self._max_documents:
                return
        if not names:
            reasons = "; ".join(self.skipped[:3]) or "nothing was found there"
            raise CorpusError(
                f"{self.description} has no document with text ({reasons}); name another place "
                "or corpus"
            )
