"""The LaTeX files of a paper in reading order."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

TEX_SUFFIXES = (".tex", ".ltx", ".latex")

_COMMENT = re.compile(r"(?<!\\)%.*")
_INPUT = re.compile(
    r"\\(?:input|include|subfile|subfileinclude)\s*(?:\{\s*(?P<braced>[^{}]+?)\s*\}"
    r"|\s(?P<bare>[\w./-]+))"
    r"|\\(?:sub)?(?:import|inputfrom|includefrom)\*?\s*\{(?P<folder>[^{}]*)\}"
    r"\s*\{\s*(?P<file>[^{}]+?)\s*\}"
)
_CLASS = re.compile(r"\\document(?:class|style)\b")
_BODY = re.compile(r"\\begin\s*\{document\}")
_MAIN_NAMES = ("main", "ms", "paper", "article", "root")


def order_sources(files: Mapping[str, str]) -> list[str]:
    r"""The main file, the files it brings in by `\input` or `\include`, then all others.

    Each file comes once and whole, where it is first brought in (so what stands after an `\input`
    in the main file precedes the file that is brought in). Commented lines do not count.

    Args:
        files: path in the paper's folder -> text.

    Returns:
        Paths. The main file is the one with a document class and body that no other brings in;
        among several, one named as main files are, then the longest; plain TeX has the longest.
    """
    texts = {path: _COMMENT.sub("", text) for path, text in files.items()}
    inputs = {path: _find_inputs(path, text, files) for path, text in texts.items()}
    brought = {needed for found in inputs.values() for needed in found}

    def rank(path: str) -> tuple[bool, bool, bool, bool, int, str]:
        stem = posixpath.splitext(posixpath.basename(path))[0].lower()
        return (
            not _CLASS.search(texts[path]),
            not _BODY.search(texts[path]),
            path in brought,
            stem not in _MAIN_NAMES,
            -len(texts[path]),
            path,
        )

    ordered: dict[str, None] = {}
    roots = sorted(files, key=rank)[:1] + sorted(files)
    for root in roots:
        waiting = [root]
        while waiting:
            path = waiting.pop()
            if path not in ordered:
                ordered[path] = None
                waiting.extend(reversed(inputs[path]))
    return list(ordered)


def _find_inputs(path: str, text: str, files: Mapping[str, str]) -> list[str]:
    """Files that one brings in, in its order; those that are not there are passed over."""
    folder = posixpath.dirname(path)
    found = []
    for match in _INPUT.finditer(text):
        written = match["braced"] or match["bare"] or posixpath.join(match["folder"], match["file"])
        # Paths are relative to the folder that LaTeX runs in: the paper's, or the main file's.
        for base in dict.fromkeys(("", folder)):
            plain = posixpath.normpath(posixpath.join(base, written.strip('"')))
            name = next(
                (n for n in (plain, *(plain + s for s in TEX_SUFFIXES)) if n in files), None
            )
            if name is not None:
                found.append(name)
                break
    return found
