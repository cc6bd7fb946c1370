"""Text files of the user's own: a document each, or a document per repository."""

from __future__ import annotations

from collections.abc import Iterator

from memorizing.config import DataConfig
from memorizing.data.batch import Document
from memorizing.data.corpus import Corpus
from memorizing.data.order import shuffle_tree
from memorizing.data.reading.places import list_files, list_subfolders
from memorizing.data.text import ReadLog, concatenate_files, find_files, make_document, read_bytes


def open_files(where: str, config: DataConfig) -> Corpus:
    """`files:PATH`: one document per text file, named by its path in the folder.

    Raises:
        CorpusError: the path does not exist, or holds no files.
    """
    place_log = ReadLog()
    files = list_files(where, place_log)

    def read(log: ReadLog) -> Iterator[Document]:
        log.skipped.extend(place_log.skipped)
        for name, path in files.items():
            raw = read_bytes(path, name, log)
            document = None if raw is None else make_document(name, raw, log)
            if document is not None:
                yield document

    return Corpus(f"files:{where}, {len(files)} files", read)


def open_repositories(where: str, config: DataConfig, kind: str = "repositories") -> Corpus:
    """`repositories:PATH`: one document per subfolder, its text files joined in the paper's order.

    `kind` is what the corpus calls itself.

    Raises:
        CorpusError: the path is not a folder, or has no subfolders.
    """
    folders = list_subfolders(where)

    def read(log: ReadLog) -> Iterator[Document]:
        for folder in folders:
            ordered = shuffle_tree(find_files(folder, log), f"{config.seed}/{folder.name}")
            document = concatenate_files(
                folder.name, ((path, folder / path) for path in ordered), log
            )
            if document is not None:
                yield document

    return Corpus(f"{kind}:{where}, {len(folders)} folders", read)
