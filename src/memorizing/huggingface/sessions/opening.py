"""Opening a memory for a model: what a folder says is compared with the model, or followed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.huggingface.attaching.attachment import (
    Attachment,
    add_memory,
    describe_heads,
    find_attachment,
    get_attachment,
    list_open_heads,
    parse_heads,
    remove_memory,
)
from memorizing.huggingface.attaching.fingerprint import (
    Fingerprint,
    explain_difference,
    shorten,
)
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.sessions.session import MemorySession
from memorizing.huggingface.sessions.stores import FolderStore, RamStore, choose_documents
from memorizing.index_settings import parse_index
from memorizing.memory.disk import FolderDescription, MemoryFolder


def open_memory(
    model: Any,
    path: Path | str | None = None,
    *,
    keep_text: bool = False,
    tokenizer: Any = None,
    documents: Sequence[str] | None = None,
    dtype: str | None = None,
    fingerprint: Fingerprint | None = None,
) -> MemorySession:
    """Open a memory for a model that `add_memory` was called on.

        with memorizing.open_memory(model, "repo.memory") as memory:
            memory.read(tokenizer, documents)
            model.generate(**inputs)

    Args:
        model: the model. One without a memory gets one like that of the folder.
        path: folder that holds a memory, or where one is made at the first `read`; None keeps what
            is read only as long as the session lives, unless `save` is called.
        keep_text: also keep the texts of documents read from now on, for `Sources` and reports.
            Where passages are read they always are.
        tokenizer: of the model, where passages are read from a folder: words find them too. `read`
            gives one. Without it, passages that are kept as entries are found by heads alone.
        documents: patterns of names; only documents that one of them matches are searched, as if
            the folder had no others, and nothing is read or forgotten. A pattern is a name, or one
            of `fnmatch` for whole names, in which case counts: `*` is any characters, slashes too,
            `?` is one, `[ab]` one of these. None is all.
        dtype: of a new folder's entries; None is that of the memory.
        fingerprint: of the model as it is now, for whoever opens many memories and knows that no
            weight changed: `get_attachment(model).fingerprint()`. None computes it, which is a pass
            over the weights.

    Raises:
        MemoryFolderError: the folder is no memory, or one of another model or other layers, or it
            is damaged; a pattern that matches no document.
        ConfigError: the model has no memory, and there is no folder to tell what it should be; or
            `documents` is no list of patterns of a folder.

    Warns:
        UserWarning: the folder is of an older format, which does not say all that is compared; or
            passages are found by other heads than those it was made for.
    """
    if documents is not None:
        _check_patterns(documents, path)
    folder = None if path is None else MemoryFolder.find(path)
    described = None if folder is None else folder.description
    with fit_model(model, path, described, fingerprint) as (attachment, mine):
        description = _describe(attachment, mine, dtype)
        index = parse_index(attachment.settings.index)
        chosen = None
        if documents is not None:
            chosen = choose_documents(folder.documents if folder else (), documents, path)
        store = (
            RamStore(description, index)
            if path is None
            else FolderStore(Path(path), folder, description, index, chosen)
        )
    keep_text = keep_text or attachment.settings.finds_passages
    return MemorySession(attachment, store, keep_text=keep_text, tokenizer=tokenizer)


@contextmanager
def fit_model(
    model: Any, path: object, described: FolderDescription | None, fingerprint: Fingerprint | None
) -> Iterator[tuple[Attachment, Fingerprint]]:
    """The memory of a model and its fingerprint, compared with a memory that is there.

    A model without one gets one like that; where the block fails, it is taken from it again.

    Args:
        model: see `open_memory`.
        path: for messages.
        described: of the memory; None is a new one.
        fingerprint: see `open_memory`.

    Raises:
        ConfigError, MemoryFolderError: see `open_memory`.
    """
    followed = described if find_attachment(model) is None else None
    if followed is not None:
        add_memory(model, **_read_settings(path, followed).to_dict())
    try:
        attachment = get_attachment(model)
        if followed is not None:
            heads = parse_heads(followed.settings.get("heads"))
            attachment.load_heads(heads, str(path), MemoryFolderError)
        mine = attachment.fingerprint() if fingerprint is None else fingerprint
        if described is not None:
            _check_folder(path, described, attachment, mine)
        yield attachment, mine
    except BaseException:
        if followed is not None:
            remove_memory(model)
        raise


def _check_patterns(patterns: Any, path: Path | str | None) -> None:
    """Refuse what are no patterns, or of nothing.

    Raises:
        ConfigError: with what is allowed.
    """
    is_list = isinstance(patterns, Sequence) and not isinstance(patterns, (str, bytes))
    if not is_list or not patterns or not all(one and isinstance(one, str) for one in patterns):
        raise ConfigError(
            f"documents is {patterns!r}; give one pattern of names or more, such as "
            "documents=['src/*.py'], or None for all"
        )
    if path is None:
        raise ConfigError(
            "documents chooses among those of a folder, and this memory has none; give its path"
        )


def _check_folder(
    path: object, found: FolderDescription, attachment: Attachment, mine: Fingerprint
) -> None:
    """Refuse a folder whose entries this model did not write.

    Raises:
        MemoryFolderError: with what differs.
    """
    layers = attachment.kept_layers
    if found.layers != layers and attachment.settings.keep == "entries":
        raise MemoryFolderError(
            f"{path} has entries of layers {list(found.layers)}, and passages that are kept "
            f"as entries need those of all, {list(layers)}; make such a memory with `memorizing "
            "read MODEL FILES --memory NEW --set keep=entries`, or read "
            "passages again from texts (keep='text')"
        )
    if found.layers != layers:
        raise MemoryFolderError(
            f"{path} has entries of layers {list(found.layers)}, and this model's memory "
            f"layers are {list(layers)}; call add_memory with these layers, or read the text again"
        )
    stored = found.settings.get("fingerprint")
    is_old = not isinstance(stored, dict)
    reason = explain_difference(
        found.fingerprint if is_old else stored, mine, attachment.decoder, attachment.settings
    )
    if reason is not None:
        raise MemoryFolderError(
            f"{path} was read {reason} (it was {found.settings.get('model')}); use the "
            "model that wrote it, or read the text again"
        )
    chosen, mine_open = (
        list_open_heads(heads) for heads in (found.settings.get("heads"), attachment.dump_heads())
    )
    if attachment.settings.finds_passages and chosen != mine_open:
        warnings.warn(
            f"{path} is for passages that {describe_heads(chosen)} find, and here it is "
            f"{describe_heads(mine_open)}; what the folder says is taken over where open_memory "
            "is called without add_memory",
            stacklevel=5,
        )
    if is_old:
        warnings.warn(
            f"{path} was made by an older release, which did not note whether adapters were "
            "in force; all else was compared, and the next read into it notes it",
            stacklevel=5,
        )


def _read_settings(path: object, description: FolderDescription) -> MemorySettings:
    """How a memory says that a model reads it; another may have written that."""
    if not isinstance(description.settings.get("memory"), dict):
        raise MemoryFolderError(
            "this memory does not say how a model reads it; call add_memory(model, ...) first"
        )
    settings = MemorySettings.from_dict(description.settings["memory"])
    searched = replace(description, dtype=settings.dtype, layers=settings.layers)
    per_entry = searched.bytes_per_entry
    needed, available = settings.capacity * per_entry, psutil.virtual_memory().available
    if needed > available:
        raise MemoryFolderError(
            f"{path} gives a text a memory of capacity {settings.capacity:,}, which takes "
            f"{needed / 2**30:,.1f} GiB, and {available / 2**30:,.1f} GiB are free; call "
            "add_memory(model, capacity=...) first, with one that fits"
        )
    return settings


def _describe(
    attachment: Attachment, fingerprint: Fingerprint, dtype: str | None
) -> FolderDescription:
    settings, model = attachment.settings, attachment.model()
    return FolderDescription(
        shorten(fingerprint),
        attachment.kept_layers,
        *attachment.entry_shape,
        dtype or settings.dtype,
        {
            "memory": settings.to_dict(),
            "heads": attachment.dump_heads(),
            "model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
            "fingerprint": fingerprint,
        },
    )
