"""Models of PyPI that come in parts, and what is asked of a model that has read a folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from memorizing.huggingface.sessions.sources import Source

PRETRAINED = Path(__file__).parents[2] / "experiments" / "pretrained"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(PRETRAINED))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield SimpleNamespace(
        **{name: importlib.import_module(name) for name in ("convert", "published", "quotes")}
    )
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(PRETRAINED)):
            del sys.modules[name]


SOURCE = '''
def first(a: int) -> int:
    """Say one | `thing`.

    And another.
    """
    def inner():
        """Inner."""


class A:
    def first(self): "no triple quotes"

    def same(self):
        """Twice."""

    def method(
        self,
    ):
        """On more lines."""

    def bare(self):
        pass
'''


def test_questions_are_functions_whose_line_stands_there_once(scripts):
    texts = {"a.py": SOURCE, "b.py": 'class B:\n    def same(self):\n        """Again."""\n'}
    drawn = scripts.quotes.draw_questions(texts, 9, 0)
    assert {(one.document, one.line, one.prompt, one.answer) for one in drawn} == {
        ("a.py", 2, 'def first(a: int) -> int:\n    """', "Say one | `thing`."),
        ("a.py", 7, '    def inner():\n        """', "Inner."),
    }
    assert scripts.quotes.draw_questions(texts, 1, 0) == drawn[:1]


def test_the_page_shows_every_question_as_it_is(scripts):
    question = scripts.quotes.Question("a.py", 2, 'def f():\n    """', "Say one | `thing`.")
    far = Source("a.py", 40, 60, 0.5, "x", (0, 1), 0)
    near = replace(far, first_line=1, last_line=3, weight=0.25)
    quote = scripts.quotes.Quote(question, question.answer, [far, near], "")
    assert quote.has_place
    assert not quote.is_first
    options = SimpleNamespace(seed=3)
    lines = scripts.quotes.make_page([quote], "2 files", options).splitlines()
    assert "## 1. a.py, line 2" in lines
    assert "| with passages | `` Say one \\| `thing`. `` |" in lines
    assert "| without | (nothing) |" in lines
    assert "| in sight | a.py:40-60 (50%); a.py:1-3 (25%) |" in lines
