"""Isabelle theories: the Archive of Formal Proofs, or Isabelle's own libraries."""

from __future__ import annotations

import itertools
import logging
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from memorizing.config import DataConfig
from memorizing.data.corpora.spill import SpillStore
from memorizing.data.corpus import Corpus
from memorizing.data.reading.archives import READ_ERRORS, read_members
from memorizing.data.reading.files import explain_missing, find_files, locate, read_bytes
from memorizing.data.text import Document, ReadLog, concatenate_texts, drop_binary, summarize_error
from memorizing.errors import CorpusError

ISABELLE_SOURCE = (
    "download a release of the Archive of Formal Proofs from isa-afp.org/download (afp-*.tar.gz, "
    "about 100 MB) and give it or its folder, or the src folder of an Isabelle distribution"
)
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")

_ARCHIVE_FOLDERS = re.compile(r"\A((afp-|Isabelle)[^/]*/)?(thys/)?")

ReadFile = Callable[[str], bytes | None]


@dataclass
class _Folder:
    """A folder of sessions: what becomes a document."""

    sessions: set[str] = field(default_factory=set)
    theories: list[str] = field(default_factory=list)
    """Paths without `.thy`: first what ROOT lists, in its order, then all others by name."""


def open_isabelle(where: str, config: DataConfig) -> Corpus:
    """`isabelle:PATH`: a document per directory of a session, its theories in import order.

    PATH is a release tarball or a checkout: any folder below which there are theories. A directory
    of a session is what its ROOT file says; sessions that share one are one document, and theories
    of a session's further `directories` are in it. Where there is no ROOT file above a theory, its
    outermost folder is the document. All theories of the directory are read, also those that ROOT
    does not list. A document is named by its path, without `thys/` and the archive's own folder.

    Raises:
        CorpusError: the path does not exist, or holds no theories; while reading: the tarball
            is damaged, or has members that leave their folder, links, or expands without end.
    """
    path = locate(where)
    if not path.exists():
        raise CorpusError(f"{explain_missing(path, where)}; {ISABELLE_SOURCE}")
    if path.is_file() and not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise CorpusError(f"{where!r} is neither a folder nor a tar archive; {ISABELLE_SOURCE}")

    def read(log: ReadLog) -> Iterator[Document | None]:
        if path.is_dir():
            names = [str(name) for name in find_files(path, log, _is_kept)]
            yield from _read_documents(names, lambda name: read_bytes(path / name, name, log), log)
            return
        with SpillStore() as store:
            _unpack(path, store)
            # As where it is unpacked: of members of one name the last is there.
            places = store.list_texts("", last=True)
            yield from _read_documents(
                sorted(places), lambda name: drop_binary(name, store.read(places[name]), log), log
            )

    return Corpus(f"isabelle:{where}, a document per session directory", read)


def _is_kept(name: str) -> bool:
    return name == "ROOT" or name.endswith(".thy")


def _unpack(path: Path, store: SpillStore) -> None:
    """Gather theories and ROOT files; nothing is used before the whole archive has been checked."""
    try:
        for name, raw in read_members(path, lambda name: _is_kept(PurePosixPath(name).name)):
            if not any(part.startswith(".") for part in name.parts):
                store.add("", name.as_posix(), raw)
    except READ_ERRORS as error:
        raise CorpusError(
            f"cannot read archive {path.name!r} to its end ({summarize_error(error)}); download it "
            "again"
        ) from error


def _read_documents(
    names: Sequence[str], read_file: ReadFile, log: ReadLog
) -> Iterator[Document | None]:
    theories = [name.removesuffix(".thy") for name in names if name.endswith(".thy")]
    roots = [name for name in names if PurePosixPath(name).name == "ROOT"]
    for place, folder in sorted(_find_folders(theories, roots, read_file).items()):
        texts = {name: read_file(f"{name}.thy") for name in folder.theories}
        imports = {
            name: resolve_imports(
                name, read_imports((raw or b"").decode("utf-8", "replace")), texts, folder.sessions
            )
            for name, raw in texts.items()
        }
        ordered = sort_by_imports(folder.theories, imports)
        contents = ((f"{posixpath.relpath(name, place)}.thy", texts[name]) for name in ordered)
        yield concatenate_texts(_name_document(place), contents, log, header="(* {} *)\n")


def _find_folders(
    theories: Iterable[str], roots: Iterable[str], read_file: ReadFile
) -> dict[str, _Folder]:
    """The documents by the path of their folder; each theory is in exactly one."""
    places: dict[str, str] = {}  # folder of theories -> folder of the document
    folders: dict[str, _Folder] = {}
    listed: dict[str, None] = {}
    for root in roots:
        text = (read_file(root) or b"").decode("utf-8", "replace")
        for session in read_root(text):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(root), session.directory))
            places[place] = place
            folders.setdefault(place, _Folder()).sessions.add(session.name)
            for further in session.directories:
                places.setdefault(posixpath.normpath(posixpath.join(place, further)), place)
            for theory in session.theories:
                listed[posixpath.normpath(posixpath.join(place, theory))] = None
    known = dict.fromkeys(theories)
    ordered = [name for name in listed if name in known]
    for name in dict.fromkeys([*ordered, *known]):
        above = [str(folder) for folder in PurePosixPath(name).parents]
        place = next((places[folder] for folder in above if folder in places), None)
        if place is None:
            place = _find_outermost(above)
        folders.setdefault(place, _Folder()).theories.append(name)
    return {place: folder for place, folder in folders.items() if folder.theories}


def _find_outermost(above: Sequence[str]) -> str:
    """The outermost folder of a theory, below the archive's own and `thys`."""
    inner = [folder for folder in above if _name_document(folder) != "."]
    return inner[-1] if inner else above[0]


def _name_document(place: str) -> str:
    return _ARCHIVE_FOLDERS.sub("", f"{place}/", count=1).rstrip("/") or "."


def resolve_imports(
    name: str, imports: Iterable[str], known: Mapping[str, object], sessions: Iterable[str]
) -> list[str]:
    """Theories of a document that one of them imports, by their paths.

    `A` is the theory in the same folder, or else anywhere in the session; `"../B/C"` goes from the
    importing file; `"Session.A"` is a theory of that session. What is not in `known` is elsewhere.

    Args:
        name: path of the importing theory, without `.thy`.
        imports: as they are written there.
        known: paths of the document's theories, without `.thy`.
        sessions: names of the document's sessions.
    """
    by_base = {posixpath.basename(path): path for path in sorted(known, reverse=True)}
    own = set(sessions)
    found = []
    for written in imports:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), written))
        session, dot, base = written.rpartition(".")
        if path in known:
            found.append(path)
        elif "/" not in written and (not dot or session in own):
            found.extend(filter(None, [by_base.get(base)]))
    return found


_TOKEN = re.compile(
    r"(?P<open>\(\*|\{\*|\\<open>|‹)"
    # What is not closed ends with the text: to look for another reading would take squared time.
    r'|"(?P<string>(?:[^"\\]|\\.)*)(?:"|\\?\Z)'
    r"|`(?:[^`\\]|\\.)*(?:`|\\?\Z)"
    r"|(?P<word>(?:[\w.'/~$]|\\<\^?\w+>|-(?!\s))+)"
    r"|(?P<mark>\S)",
    re.DOTALL,
)
# Comments and cartouches nest; verbatim text does not.
_NESTING = {
    "(*": re.compile(r"(?P<open>\(\*)|\*\)"),
    "{*": re.compile(r"(?P<open>(?!))|\*\}"),
    "\\<open>": re.compile(r"(?P<open>\\<open>|‹)|\\<close>|›"),
    "‹": re.compile(r"(?P<open>\\<open>|‹)|\\<close>|›"),
}
_HEADER_ENDS = frozenset({"keywords", "abbrevs", "uses", "begin"})
_SESSION_PART = re.compile(
    "description|options|sessions|directories|(document_)?theories|document_files"
    "|export_files|export_classpath"
)
_CHAPTERS = frozenset({"session", "chapter", "chapter_definition"})


@dataclass(frozen=True)
class Session:
    """An entry of a ROOT file."""

    name: str
    directory: str
    """Relative to the ROOT file's folder."""
    directories: tuple[str, ...]
    """Further folders of its theories, relative to `directory`."""
    theories: tuple[str, ...]
    """In the order given; relative to `directory`, without `.thy`."""


def read_imports(text: str) -> list[str]:
    """What a theory imports, as it is written there; nothing where there is no theory header."""
    imports: list[str] = []
    part = ""
    for kind, value in _tokenize(text):
        if kind == "word" and value == "theory" and not part:
            part = "theory"
        elif kind == "word" and value == "imports" and part == "theory":
            part = "imports"
        elif kind == "word" and value in _HEADER_ENDS and part:
            break
        elif part == "imports" and kind in ("word", "string"):
            imports.append(value)
    return imports


def read_root(text: str) -> list[Session]:
    """The sessions of a ROOT file, in its order."""
    sessions: list[Session] = []
    tokens = list(_tokenize(text))
    starts = [i for i, (kind, value) in enumerate(tokens) if kind == "word" and value in _CHAPTERS]
    for begin, end in itertools.pairwise([*starts, len(tokens)]):
        if tokens[begin][1] == "session" and begin + 1 < end:
            sessions.append(_read_session(tokens[begin + 1 : end]))
    return sessions


def _read_session(tokens: list[tuple[str, str]]) -> Session:
    name, directory, part, depth = tokens[0][1], ".", "head", 0
    named: dict[str, list[str]] = {"directories": [], "theories": []}
    for kind, value in tokens[1:]:
        if kind == "mark" and value in "([":
            depth += 1
        elif kind == "mark" and value in ")]":
            depth -= 1
        elif depth:
            continue
        elif part in ("head", "in") and (kind, value) == ("mark", "="):
            part = "parent"
        elif part == "head" and (kind, value) == ("word", "in"):
            part = "in"
        elif part == "in" and kind in ("word", "string"):
            directory, part = value, "head"
        elif part != "head" and kind == "word" and _SESSION_PART.fullmatch(value):
            part = value
        elif part in named and kind in ("word", "string"):
            named[part].append(value)
    return Session(name, directory, tuple(named["directories"]), tuple(named["theories"]))


def _tokenize(text: str) -> Iterator[tuple[str, str]]:
    """Words, strings and single marks; comments, cartouches and verbatim text are passed over."""
    place = 0
    while match := _TOKEN.search(text, place):
        place = match.end()
        kind = match.lastgroup
        if kind == "open":
            place = _find_end(text, match.group(), place)
        elif kind is not None:
            yield kind, match.group(kind)


def _find_end(text: str, opening: str, place: int) -> int:
    depth = 1
    for match in _NESTING[opening].finditer(text, place):
        depth += 1 if match.group("open") else -1
        if not depth:
            return match.end()
    return len(text)


_log = logging.getLogger(__name__)


def sort_by_imports(names: Iterable[str], imports: Mapping[str, Iterable[str]]) -> list[str]:
    """The names, each once and after those that it imports (depth first, imports in their order).

    It guarantees:

    - each of `names` comes exactly once; imports that are not among them are passed over, so that
      what a file imports from elsewhere needs no treatment;
    - a name comes after everything it imports, directly or not, unless the two lie on one cycle;
    - of a cycle, the member that is reached first comes last; the import that closes it is passed
      over, and logged as a warning by the logger `memorizing.data.corpora.isabelle`;
    - the order depends on the order of `names` and of each entry of `imports` alone, and what a
      name needs comes directly before it where nothing earlier needed it: sort `names` first if
      their order is by chance.

    It takes time in proportion to names and imports, and has no limit of depth.

    Args:
        names: of files, theories, modules; repeated ones count once.
        imports: name -> the names it imports. A name that is not a key imports nothing.
    """
    known = dict.fromkeys(names)
    done: dict[str, None] = {}
    open_names: dict[str, Iterator[str]] = {}  # the path from a root to where the walk is
    for root in known:
        if root in done:
            continue
        open_names[root] = iter(imports.get(root, ()))
        while open_names:
            name = next(reversed(open_names))
            for needed in open_names[name]:
                if needed not in known or needed in done or needed == name:
                    continue
                if needed in open_names:
                    _log.warning("%s imports %s, which imports it: a cycle", name, needed)
                    continue
                open_names[needed] = iter(imports.get(needed, ()))
                break
            else:
                del open_names[name]
                done[name] = None
    return list(done)
