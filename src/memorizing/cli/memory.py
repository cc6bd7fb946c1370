"""`memorizing memory`: what was read, as a folder. No model is loaded."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memorizing.cli.info import print_values
from memorizing.cli.options import JsonOption, option, prepare_files, write_result
from memorizing.cli.pretrained import describe_bytes
from memorizing.errors import MemoryFolderError
from memorizing.storage.folders import count_bytes
from memorizing.terminal import say, show

if TYPE_CHECKING:
    from memorizing.memory.disk import MemoryFolder

EXAMPLES = """\b
examples:
  memorizing memory info repo.memory
  memorizing memory list repo.memory --json documents.json
  memorizing memory merge library.memory application.memory --out both.memory
  memorizing memory forget repo.memory src/old.py notes.txt
  memorizing memory verify repo.memory
  memorizing memory serve repo.memory --shards 2
  memorizing memory serve /shared/repo.memory --shards 32 --replicas 2 --ray head:6379
"""

app = typer.Typer(
    help="Look at memories that `memorizing read` made, and change them.",
    epilog=EXAMPLES,
    rich_markup_mode=None,
)

PathArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the memory.")]


@app.callback()
def _set_up() -> None:
    """Look at memories that `memorizing read` made, and change them."""


@app.command("info")
def show_info(path: PathArgument, json_file: JsonOption = None) -> None:
    """Whose memory it is, how it is read and stored, and how much it holds."""
    prepare_files(json_file)
    values = describe(open_memory_folder(path))
    print_values(values)
    write_result(json_file, values)


@app.command("list")
def list_documents(path: PathArgument, json_file: JsonOption = None) -> None:
    """The documents that were read, oldest first, with their tokens."""
    prepare_files(json_file)
    folder = open_memory_folder(path)
    width = max((len(f"{document.num_tokens:,}") for document in folder.documents), default=0)
    for document in folder.documents:
        kept = "" if document.text is None else "  (text kept)"
        show(f"{document.num_tokens:>{width},} tokens  {document.name}{kept}")
    show(count(folder))
    documents = [
        {
            "name": document.name,
            "tokens": document.num_tokens,
            "entries": document.num_entries,
            "sha256": document.sha256,
            "text_kept": document.text is not None,
        }
        for document in folder.documents
    ]
    write_result(json_file, {"documents": documents})


@app.command("merge")
def merge(
    paths: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of memories of one model.")
    ],
    out: Annotated[Path, option("DIR", "The new memory: a new or empty folder.", "--out")],
    settings_of: Annotated[
        Path | None,
        option("DIR", "Which of them says how the new one is read, where they differ in that."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Make a new memory of several; they stay as they are.

    A document that several hold with the same text is kept once. With one DIR, it is packed into as
    few files as possible.
    """
    prepare_files(json_file)
    from memorizing.memory.disk import MemoryFolder

    settings = choose_settings(paths, settings_of)
    folder = MemoryFolder.merge(paths, out, settings)
    show(f"{out}: {count(folder)}")
    write_result(json_file, describe(folder))


@app.command("forget")
def forget(
    path: PathArgument,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Documents, as `memory list` names them.")
    ],
    json_file: JsonOption = None,
) -> None:
    """Remove documents: their entries and texts are gone from the disk afterwards.

    If one of the names is not there, nothing is forgotten.
    """
    from memorizing.data.text import clean_name

    prepare_files(json_file)
    folder = open_memory_folder(path)
    before = folder.num_entries
    # As documents are named whose files have such names.
    names = list(dict.fromkeys(map(clean_name, names)))
    with folder.lock():
        require_documents(folder, names)
        folder.forget(*names)
    show(f"forgot {len(names):,} documents, {before - folder.num_entries:,} entries")
    show(f"{path}: {count(folder)}")
    write_result(json_file, describe(folder))


@app.command("verify")
def verify(path: PathArgument, json_file: JsonOption = None) -> None:
    """Compare the checksums of everything in the memory; status 2 where a file was altered."""
    prepare_files(json_file)
    folder = open_memory_folder(path)
    files = folder.verify()
    show(f"{path} is whole: {len(files):,} files, {describe_bytes(count_bytes(path))}")
    write_result(json_file, {"memory": str(path), "files": list(files)})


@app.command("serve")
def serve(
    path: PathArgument,
    shards: Annotated[int, option("N", "Parts, each a process or more.", min=1)] = 2,
    replicas: Annotated[int, option("R", "Processes that have the same part.", min=1)] = 1,
    name: Annotated[
        str | None, option("NAME", "What it is opened by. Default: that of DIR.")
    ] = None,
    ray: Annotated[
        str | None,
        option(
            "ADDRESS", "A Ray cluster, HOST:PORT or auto. Default: one of this machine.", "--ray"
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Serve a memory from several processes or machines, until Ctrl-C.

    Models read it by the address that is printed: `memorizing generate MODEL --memory ray://...`.
    Nobody writes into it meanwhile. Every machine must have DIR at the same place.
    """
    prepare_files(json_file)
    folder = open_memory_folder(path)
    from memorizing.ray import serve_memory

    say(f"memory: {path}, {count(folder)}")
    with serve_memory(
        path, name=name, num_shards=shards, num_replicas=replicas, cluster=ray
    ) as served:
        entries = ", ".join(f"{number:,}" for number in served.num_entries)
        say(
            f"{shards} shards of {entries} entries, {replicas} of each, on {served.num_nodes} "
            "machines; Ctrl-C ends it"
        )
        show(served.address)
        sys.stdout.flush()
        write_result(json_file, {"address": served.address, "entries": list(served.num_entries)})
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                served.head.check()
                time.sleep(1)
    say("not served any more")


def open_memory_folder(path: Path) -> MemoryFolder:
    """The memory in a folder.

    Raises:
        MemoryFolderError: there is none, or it is damaged.
    """
    from memorizing.memory.disk import MemoryFolder

    return MemoryFolder.open(path)


def describe(folder: MemoryFolder) -> dict[str, Any]:
    """What there is to say about a memory, as plain values."""
    description = folder.description
    settings = description.settings
    memory = settings.get("memory")
    documents = folder.documents
    return {
        "memory": str(folder.path),
        "model": settings.get("model"),
        "layers": list(description.layers),
        "dtype": description.dtype,
        "documents": len(documents),
        "texts_kept": sum(document.text is not None for document in documents),
        "tokens": sum(document.num_tokens for document in documents),
        "entries": folder.num_entries,
        "bytes_per_entry": description.bytes_per_entry,
        "segments": len(folder.contents.segments),
        "bytes": count_bytes(folder.path),
        "heads": description.num_heads,
        "head_dim": description.head_dim,
        "fingerprint": description.fingerprint,
        "settings": {
            key: value
            for key, value in (memory.items() if isinstance(memory, dict) else ())
            if key != "dtype" and (key != "layers" or value != list(description.layers))
        },
    }


def count(folder: MemoryFolder) -> str:
    """Documents, tokens, entries and bytes on a line."""
    tokens = sum(document.num_tokens for document in folder.documents)
    return (
        f"{len(folder.documents):,} documents, {tokens:,} tokens, {folder.num_entries:,} entries, "
        f"{describe_bytes(count_bytes(folder.path))} on disk"
    )


def require_documents(folder: MemoryFolder, names: Sequence[str]) -> None:
    """Refuse names that are not there, before any is forgotten.

    Raises:
        MemoryFolderError: with the nearest names that are.
    """
    from memorizing.settings import find_nearest

    known = [document.name for document in folder.documents]
    for name in names:
        if name not in known:
            raise MemoryFolderError(
                f"{folder.path} holds no document {name!r}, so nothing was forgotten; "
                f"{find_nearest(name, known)}"
            )


def choose_settings(paths: Sequence[Path], settings_of: Path | None) -> dict[str, Any]:
    """How a merged memory is read.

    Raises:
        MemoryFolderError: the memories differ in that and no one was chosen, or they were read with
            different tokenizers.
    """
    folders = {path: open_memory_folder(path) for path in paths}
    if settings_of is not None and settings_of not in folders:
        raise MemoryFolderError(
            f"--settings-of is {str(settings_of)!r}, which is not among the memories that are "
            f"merged: {', '.join(map(str, paths))}"
        )
    chosen = paths[0] if settings_of is None else settings_of
    settings = {"tokenizer": None, **folders[chosen].description.settings}
    for path, folder in folders.items():
        other = folder.description.settings
        if not isinstance(other.get("memory") or {}, dict):
            raise MemoryFolderError(
                f"the settings of {path} are none that memorizing writes; read its texts again"
            )
        tokenizer = other.get("tokenizer")
        settings["tokenizer"] = settings["tokenizer"] or tokenizer
        if tokenizer not in (None, settings["tokenizer"]):
            raise MemoryFolderError(
                f"{chosen} and {path} were read with different tokenizers, so their tokens do not "
                "mean the same; read one of them again"
            )
        difference = describe_difference(settings, other)
        if settings_of is None and difference:
            raise MemoryFolderError(
                f"{chosen} and {path} are read differently ({difference}); say which of them the "
                "new memory shall follow: --settings-of DIR"
            )
    return settings


def describe_difference(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """The first setting in which two memories are read differently; empty where there is none."""
    first, second = mine.get("memory") or {}, other.get("memory") or {}
    for key in sorted({*first, *second}):
        if first.get(key) != second.get(key):
            return f"{key} {first.get(key)} and {second.get(key)}"
    # The name of a model may be that of another copy.
    rest = sorted({*mine, *other} - {"memory", "model", "tokenizer"})
    return next((key for key in rest if mine.get(key) != other.get(key)), "")
