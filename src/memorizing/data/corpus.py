"""A corpus: documents that are read one by one, and what was left out on the way."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator

from memorizing.data.text import Document, ReadLog
from memorizing.errors import CorpusError

Reader = Callable[[ReadLog], Iterator[Document]]


class Corpus:
    """Documents that are read anew, in the same order, each time `documents` is called."""

    def __init__(self, description: str, read: Reader) -> None:
        """Take a line that says what this is, and what reads it."""
        self.description = description
        self._read = read
        self._log = ReadLog()

    def __str__(self) -> str:
        """The description."""
        return self.description

    @property
    def skipped(self) -> list[str]:
        """What the last reading left out and why, a line each; complete once it has ended.

        What a rule leaves out, such as documents that are too short, is one line with its number.
        """
        counts = self._log.num_passed_over
        return [*self._log.skipped, *(f"{count:,} {reason}" for reason, count in counts.items())]

    @property
    def num_replaced(self) -> int:
        """Files or rows of the last reading in which bytes that are not UTF-8 were replaced."""
        return self._log.num_replaced

    def take(self, num_documents: int) -> Corpus:
        """The same corpus, but reading stops after so many documents; 0 is all."""
        if not num_documents:
            return self

        def read(log: ReadLog) -> Iterator[Document]:
            with contextlib.closing(self._read_generator(log)) as documents:
                yield from itertools.islice(documents, num_documents)

        return Corpus(f"{self.description}, the first {num_documents:,} documents", read)

    def _read_generator(self, log: ReadLog) -> Generator[Document, None, None]:
        yield from self._read(log)

    def documents(self) -> Iterator[Document]:
        """Read the documents one by one. Starts `skipped` and `num_replaced` afresh.

        Raises:
            CorpusError: no document has text, two have the same name, or the source cannot be read.
        """
        self._log = log = ReadLog()
        names: set[str] = set()
        for document in self._read(log):
            if document.name in names:
                raise CorpusError(
                    f"two documents of {self.description} are named {document.name!r}; names "
                    "must differ: give each once, or remove the name column: rows are then numbered"
                )
            names.add(document.name)
            yield document
        if not names:
            reasons = "; ".join(self.skipped[:3]) or "nothing was found there"
            raise CorpusError(
                f"{self.description} has no document with text ({reasons}); name another place "
                "or corpus"
            )


def summarize_error(error: BaseException) -> str:
    """The first line of another library's error, for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
