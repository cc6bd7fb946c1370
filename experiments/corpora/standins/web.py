"""Texts of the web: an FAQ in HTML, articles of Wikipedia, country profiles in JSON."""

from __future__ import annotations

import bz2
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any

from memorizing.errors import CorpusError
from standins.archives import read_members
from standins.texts import Documents, decode_lines, keep_long, name_file
from standins.wiki import strip_markup

WIKIPEDIA_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_MAX_DUMP_BYTES = 64 * 2**20
_PAGE = re.compile(r"<page>.*?<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)

_HIDDEN_TAGS = ("head", "script", "style")
_BLOCK_TAGS = (
    *("blockquote", "div", "dt", "h1", "h2", "h3", "h4"),
    *("li", "ol", "p", "table", "tr", "ul"),
)


def read_faq(package: str, path: Path) -> Documents:
    """Pages in HTML, as text: a paragraph per block, an empty line between."""
    members = read_members(path, lambda name: "/html/" in name and name.endswith(".html"))
    for name, raw in members.items():
        yield from keep_long(name_file(package, PurePosixPath(name).stem), show_html(raw))


def show_html(raw: bytes) -> str:
    """The text of a page, as a browser would break it into lines."""
    page = _Page()
    page.feed(decode_lines(raw))
    page.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(page.texts))
    return re.sub(r"\n\s*\n", "\n\n", text).strip() + "\n"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN_TAGS
        if tag == "br" or tag in _BLOCK_TAGS:
            self.texts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN_TAGS))
        if tag in _BLOCK_TAGS:
            self.texts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.texts.append(re.sub(r"\s+", " ", data))


def read_wikipedia(package: str, path: Path) -> Documents:
    """Articles of the extract of Wikipedia that gensim tests itself with.

    Raises:
        CorpusError: the package has no such extract, or it expands too far.
    """
    members = read_members(path, lambda name: name.endswith(WIKIPEDIA_DUMP))
    if len(members) != 1:
        raise CorpusError(f"package {path.name!r} has no {WIKIPEDIA_DUMP}")
    expander = bz2.BZ2Decompressor()
    raw = expander.decompress(next(iter(members.values())), _MAX_DUMP_BYTES)
    if not expander.eof:
        raise CorpusError(f"{WIKIPEDIA_DUMP} is cut off, or expands too far")
    for title, source in _PAGE.findall(decode_lines(raw)):
        text = strip_markup(html.unescape(source))
        yield from keep_long(name_file("enwiki", html.unescape(title)), text)


def read_factbook(package: str, path: Path) -> Documents:
    """Country profiles: a heading per section and field, subfields in lines."""
    for name, raw in read_members(path, lambda name: name.endswith(".json")).items():
        parts = PurePosixPath(name).parts
        if len(parts) != 3 or parts[1] == "meta":
            continue  # package/REGION/COUNTRY.json are the countries
        text = "".join(
            f"\n# {section}\n"
            + "".join(f"\n## {field}\n{_show_field(value)}\n" for field, value in fields.items())
            for section, fields in json.loads(raw).items()
        )
        document = name_file(f"factbook_{parts[1]}", PurePosixPath(name).stem)
        yield from keep_long(document, text.rstrip("\n"))


def _show_field(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if list(value) == ["text"]:
        return _show_field(value["text"])
    return "\n".join(f"{name}: {_show_field(part)}" for name, part in value.items())
