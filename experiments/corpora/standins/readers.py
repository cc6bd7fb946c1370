"""What makes documents of a package: the readers that packages.toml names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from standins.books import read_austen, read_gutenberg, read_psalms, read_shakespeare
from standins.proofs import read_coq, read_hol_light
from standins.texts import Documents, read_python, read_tex, read_vignettes
from standins.web import read_factbook, read_faq, read_wikipedia


@dataclass(frozen=True)
class Reader:
    """Takes a package's name and file; gives paths in the family's folder and contents."""

    read: Callable[[str, Path], Documents]
    one_document: bool = False
    """Whether the files are one document together, a folder."""


READERS = {
    "austen": Reader(read_austen),
    "coq": Reader(read_coq),
    "factbook": Reader(read_factbook),
    "faq": Reader(read_faq),
    "gutenberg": Reader(read_gutenberg),
    "hol_light": Reader(read_hol_light),
    "psalms": Reader(read_psalms),
    "python": Reader(read_python, one_document=True),
    "shakespeare": Reader(read_shakespeare),
    "tex": Reader(read_tex),
    "vignettes": Reader(read_vignettes),
    "wikipedia": Reader(read_wikipedia),
}
