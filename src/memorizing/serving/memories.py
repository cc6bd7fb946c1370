"""What requests may read: shared memories in folders, and private ones that end."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memorizing.errors import ConfigError, MemorizingError, MemoryFolderError
from memorizing.huggingface import add_memory, open_memory
from memorizing.huggingface.attaching.attachment import find_attachment, get_attachment
from memorizing.huggingface.sessions.session import MemorySession
from memorizing.memory.disk import MemoryFolder
from memorizing.serving.line import Job, OutOfTime
from memorizing.serving.requests import RequestError, Text

_SUFFIX = ".memory"
_MANIFEST = "manifest.json"
SEPARATOR = "+"
"""Between the names of a model and of a memory."""


def name_memories(paths: list[Path]) -> dict[str, Path]:
    """Names of folders, as requests say them: `repo` of `there/repo.memory`.

    Raises:
        ConfigError: two of one name, or one that could be no name.
    """
    named: dict[str, Path] = {}
    for path in paths:
        # Answers are UTF-8, which names of files need not be.
        raw = path.absolute().name.removesuffix(_SUFFIX).encode("utf-8", "backslashreplace")
        name = raw.decode()
        if not name or SEPARATOR in name:
            raise ConfigError(
                f"--memory is {str(path)!r}, whose name would be {name!r}; a name has letters and "
                f"no {SEPARATOR}: rename the folder, or give a link to it"
            )
        if name in named:
            raise ConfigError(
                f"--memory {path} and {named[name]} have one name, {name!r}; rename a folder, or "
                "give a link to it"
            )
        named[name] = path
    return named


@dataclass
class _Shared:
    path: Path
    seen: tuple[int, ...] | None = None
    session: MemorySession | None = None


@dataclass
class _Private:
    session: MemorySession
    used_s: float
    num_characters: int


@dataclass(frozen=True)
class PrivateLimits:
    """Of memories that requests make."""

    most: int = 8
    """At the same time."""
    characters: int = 2**20
    """Of all texts of one, and their names."""
    age_s: float = 3600.0
    """It ends when it was not used for so long."""


class Memories:
    """Memories of one model, opened when they are asked for.

    Folders are read, never written. All but `expire`, `forget` and what lists is for the one thread
    that runs the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folders: Mapping[str, Path],
        limits: PrivateLimits,
        *,
        window: int,
    ) -> None:
        """Open all folders, so that what cannot be read is known at once.

        A model that has no memory gets one like that of the first folder.

        Args:
            model: changed in place.
            tokenizer: of the model.
            folders: by name.
            limits: of private memories.
            window: of a model without a memory, where there is no folder.

        Raises:
            MemoryFolderError: a folder that is no memory, or is not of this model or not like the
                first.
        """
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self._shared = {name: _Shared(path) for name, path in folders.items()}
        self._private: dict[str, _Private] = {}
        self._lock = threading.Lock()
        self._fingerprint: Any = None
        self._follows_folder = find_attachment(model) is None
        for one in self._shared.values():
            self._open(one)
        if find_attachment(model) is None:
            add_memory(model, window=window)

    @property
    def names(self) -> tuple[str, ...]:
        """Of shared memories."""
        return tuple(self._shared)

    @property
    def num_private(self) -> int:
        """Memories that requests made."""
        return len(self._private)

    def knows(self, name: str) -> bool:
        """Whether there is such a memory now."""
        return name in self._shared or name in self._private

    def find(self, name: str) -> MemorySession:
        """A memory as it is now: a folder that was replaced or added to is opened anew.

        Raises:
            RequestError: there is none, or it cannot be read any more.
        """
        with self._lock:
            private = self._private.get(name)
            if private is not None:
                private.used_s = time.monotonic()
                return private.session
        if name not in self._shared:
            raise unknown_memory(name, self.names)
        try:
            return self._open(self._shared[name])
        except MemorizingError as error:
            raise RequestError(
                503, f"the memory {name!r} cannot be read now: {error}", param="memory"
            ) from error

    def _open(self, one: _Shared) -> MemorySession:
        # Before it is read: what is written meanwhile is then seen the next time.
        seen = _look_at(one.path)
        if one.session is None or seen != one.seen:
            one.session, one.seen = None, seen
            folder = MemoryFolder.open(one.path)
            if self._follows_folder and find_attachment(self.model) is not None:
                self._check(folder)
            one.session = open_memory(
                self.model, one.path, tokenizer=self.tokenizer, fingerprint=self._fingerprint
            )
            if self._fingerprint is None:
                self._fingerprint = get_attachment(self.model).fingerprint()
        return one.session

    def _check(self, folder: MemoryFolder) -> None:
        """Refuse a folder that the model would not read as it was made to be read."""
        attachment, held = get_attachment(self.model), folder.description.settings
        mine = {"memory": attachment.settings.to_dict(), "heads": attachment.dump_heads()}
        for name, value in mine.items():
            if json.dumps(held.get(name), sort_keys=True) != json.dumps(value, sort_keys=True):
                raise MemoryFolderError(
                    f"{folder.path} was made with other settings of the {name} than the memory "
                    "that was opened first, and one model reads all memories alike; read the text "
                    "again with the same options, or serve it by itself"
                )

    def check_room(self, text: Text) -> None:
        """Refuse a text that a private memory has no room for.

        Raises:
            RequestError: too long, too many memories, or one that is not there.
        """
        held = 0
        with self._lock:
            if text.memory is not None:
                private = self._private.get(text.memory)
                if private is None:
                    raise unknown_memory(text.memory)
                held = private.num_characters
            elif len(self._private) >= self.limits.most:
                raise RequestError(
                    429,
                    f"there are {len(self._private)} private memories, as many as may be; delete "
                    "one, or try again later",
                    code="rate_limit_exceeded",
                )
        if held + text.num_characters > self.limits.characters:
            raise RequestError(
                413,
                f"text and its name have {text.num_characters:,} characters, and a private memory "
                f"holds {self.limits.characters - held:,} more; send less, or read it into a "
                "folder with `memorizing read`",
                param="text",
            )

    def read(self, job: Job, text: Text) -> dict[str, Any]:
        """Read a text into a private memory, a new one where none is named.

        Returns:
            What is answered.

        Raises:
            RequestError: there is no room, no time, or it is no text for this memory.
        """
        self.check_room(text)
        session = (
            open_memory(self.model, fingerprint=self._fingerprint, keep_text=True)
            if text.memory is None
            else self.find(text.memory)
        )
        try:
            report = session.read(
                self.tokenizer, [(text.name, text.text)], progress=lambda *_: job.check()
            )
        except OutOfTime:
            raise RequestError(
                400,
                f"text was not read in {job.limit_s:g} s, which a request may take; send less",
                param="text",
                code="time_limit_exceeded",
            ) from None
        except MemorizingError as error:
            raise RequestError(400, str(error)) from error
        name = text.memory or f"private-{secrets.token_urlsafe(16)}"
        with self._lock:
            if text.memory is None:
                self._private[name] = _Private(session, 0.0, 0)
            elif name not in self._private:
                # It was ended meanwhile.
                raise unknown_memory(name)
            held = self._private[name]
            held.used_s = time.monotonic()
            held.num_characters += text.num_characters * report.num_documents
        return {
            "id": name,
            "object": "memory",
            "documents": [document.name for document in session.documents],
            "tokens": report.num_tokens,
            "entries": session.num_entries,
            "expires_in": self.limits.age_s,
        }

    def forget(self, name: str) -> None:
        """End a private memory.

        Raises:
            RequestError: there is no such memory, or it is shared.
        """
        with self._lock:
            if self._private.pop(name, None) is None:
                raise unknown_memory(name)

    def expire(self) -> None:
        """End private memories that were not used for long."""
        oldest = time.monotonic() - self.limits.age_s
        with self._lock:
            for name in [name for name, one in self._private.items() if one.used_s < oldest]:
                del self._private[name]


def unknown_memory(name: str, names: tuple[str, ...] = ()) -> RequestError:
    """What is answered about a memory that is not there; private ones are named to nobody."""
    known = f"; there are {', '.join(names)}" if names else ""
    return RequestError(
        404, f"there is no memory {name!r}{known}", param="memory", code="memory_not_found"
    )


def _look_at(folder: Path) -> tuple[int, ...] | None:
    """What changes when a memory is replaced or written: its manifest is always a new file."""
    try:
        found = (folder / _MANIFEST).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
