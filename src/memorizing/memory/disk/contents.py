"""A state of a folder with its files mapped: what a reader sees, whatever is written meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.manifest import Manifest, StoredDocument
from memorizing.memory.disk.segment import ADVICE, SegmentFile, decode_int8


class Contents:
    """Documents and entries, both in the order they were read.

    Entries are counted from 0 over all segments, documents from 0 in the order of `documents`.
    """

    def __init__(self, folder: Path, manifest: Manifest, known: Contents | None = None) -> None:
        """Map all segments that `known` has not mapped; sizes and headers are compared.

        Raises:
            FileNotFoundError: a segment is not there.
            MemoryFolderError: a segment is another one than the manifest says.
        """
        self.folder = folder
        self.manifest = manifest
        self._last_text = ("", "")
        mapped = {segment.record: segment for segment in known.segments} if known else {}
        self.segments = tuple(
            mapped.get(record) or SegmentFile(folder, record, manifest.description)
            for record in manifest.segments
        )

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """What was read."""
        return self.manifest.documents

    def find_document(self, name: str) -> StoredDocument | None:
        """The document of this name, or None."""
        return self._by_name.get(name)

    def document_of(self, entries: Tensor) -> Tensor:
        """Numbers of the documents whose entries these are, of the same shape."""
        numbers = self._check(entries)
        found = torch.searchsorted(self._first_entries, numbers, right=True) - 1
        return found.to(entries.device)

    def token_of(self, entries: Tensor) -> Tensor:
        """Places of the entries' tokens in their documents, of the same shape."""
        return self._tokens[self._check(entries)].long().to(entries.device)

    def read_entries(
        self, document: StoredDocument, numbers: Tensor
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Keys and values (H, n, D), per layer, of entries (n,) of a document, from its first.

        Raises:
            MemoryFolderError: a file of the folder is damaged.
        """
        segment, places = self._find_segment(document), numbers + document.first_entry
        is_coded = self.manifest.description.dtype == "int8"

        def get(name: str) -> Tensor:
            stored = segment.get_tensor(f"{name}s")[:, places]
            if not is_coded:
                return stored
            factors = segment.get_tensor(f"{name}_factors")[:, places]
            return decode_int8(stored, factors, torch.float32)

        for layer in self.manifest.description.layers:
            yield layer, (get(f"layers.{layer}.key"), get(f"layers.{layer}.value"))

    def read_text(self, name: str) -> str:
        """The text of a document.

        Raises:
            MemoryFolderError: there is no such document, or its text was not kept.
        """
        if self._last_text[0] == name:
            return self._last_text[1]
        document = self.find_document(name)
        if document is None or document.text is None:
            what = "holds no document" if document is None else "did not keep the text of"
            raise MemoryFolderError(
                f"this memory {what} {name!r}; keep the text when the document is read"
            )
        texts = self._find_segment(document).get_tensor("texts")
        content = texts[slice(*document.text)].numpy().tobytes()
        try:
            text = content.decode("utf-8", errors="surrogatepass")
        except UnicodeDecodeError as error:
            raise MemoryFolderError(
                f"the text of {name!r} in {self.folder} is not in UTF-8 ({error}); {ADVICE}"
            ) from error
        # Reports ask for many places in one text, one after the other.
        self._last_text = (name, text)
        return text

    def read_spans(self, document: StoredDocument) -> Tensor | None:
        """(num_tokens, 2) int32: characters [start, end) of its tokens; None was not kept.

        Raises:
            MemoryFolderError: the folder is damaged.
        """
        if document.spans is None:
            return None
        return self._find_segment(document).get_tensor("token_spans")[slice(*document.spans)]

    def _find_segment(self, document: StoredDocument) -> SegmentFile:
        return next(one for one in self.segments if one.record.file == document.segment)

    def _check(self, entries: Tensor) -> Tensor:
        numbers = entries.cpu()
        most = self.manifest.num_entries - 1
        if numbers.numel() and not (int(numbers.min()) >= 0 and int(numbers.max()) <= most):
            raise MemoryFolderError(
                f"entries {int(numbers.min())} to {int(numbers.max())} were asked for; this memory "
                f"has those from 0 to {most}"
            )
        return numbers

    @cached_property
    def _by_name(self) -> dict[str, StoredDocument]:
        return {document.name: document for document in self.documents}

    @cached_property
    def _first_entries(self) -> Tensor:
        counts = torch.tensor([document.num_entries for document in self.documents])
        return counts.cumsum(0) - counts

    @cached_property
    def _tokens(self) -> Tensor:
        parts = [segment.get_tensor("tokens") for segment in self.segments]
        return torch.cat([torch.empty(0, dtype=torch.int32), *parts])
