"""Wikipedia's markup as text: sections and lists stay, links become their words."""

from __future__ import annotations

import html
import re

_MAX_NESTING = 6
"""Templates deeper than this stay; so many passes over an article end in any case."""

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CITED_AGAIN = re.compile(r"<ref[^>]*/>")
_FOOTNOTE = re.compile(r"<ref[^>]*>.*?</ref>", re.DOTALL)
_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|.*?\|\}", re.DOTALL)
_MEDIA = re.compile(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]")
_LINK = re.compile(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]")
_OUTSIDE_LINK = re.compile(r"\[https?://[^ \]]* ?([^\]]*)\]")
_EMPHASIS = re.compile(r"'{2,}")
_TAG = re.compile(r"<[^>]+>")


def strip_markup(source: str) -> str:
    """An article's text: without templates, tables, footnotes, pictures and tags."""
    text = html.unescape(source)
    for pattern in (_COMMENT, _CITED_AGAIN, _FOOTNOTE):
        text = pattern.sub("", text)
    for _ in range(_MAX_NESTING):
        text = _INNERMOST_TEMPLATE.sub("", text)
    text = _TABLE.sub("", text)
    for _ in range(_MAX_NESTING):
        text = _MEDIA.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _OUTSIDE_LINK.sub(r"\1", text)
    text = _TAG.sub("", _EMPHASIS.sub("", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
