"""Calls of what another file defines, found by the parser."""

from __future__ import annotations

import pytest

from memorizing.benchmark.memory_use.call_sites import cut_at_close, find_calls

HOME = '''
"""Größe."""
def area(width, height=2): ...
class Shape:
    def resize(self, factor): ...
    def append(self, one): ...
    def __call__(self, x): ...
'''


def list_calls(text: str, **others: str) -> list[str]:
    """Arguments of the calls of use.py, with their closing parenthesis."""
    files = {"home.py": HOME, "use.py": text} | {f"{k}.py": v for k, v in others.items()}
    sites = find_calls(files, "shapes")
    for site in sites:
        assert files[site.file][site.start - 1] == "("
    return [files[s.file][s.start : s.end] for s in sites if s.file == "use.py"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from shapes.home import area\narea(1, height=3)", ["1, height=3)"]),
        ("from .home import area as size\nsize(1)", ["1)"]),
        ("from . import home\nhome.area(5)", ["5)"]),
        ("import home\nhome.area(5)", ["5)"]),
        ("from .home import Shape\nx = Shape(4)\nx.resize(2)", ["4)", "2)"]),
        ("def f(shape):\n    shape.resize( 2 ,\n  3)", [" 2 ,\n  3)"]),
        ("from .home import area\narea(area(1))", ["1)", "area(1))"]),
        ("from .home import area\n'ö', area ('ü', ')')", ["'ü', ')')"]),
        ("from .home import area\n@area(1)\ndef f(): ...", ["1)"]),
        ("from .home import area\r\nx = 1\r\narea(2)\r\n", ["2)"]),
        ("def f(shape):\n    shape.inner.resize(2)", ["2)"]),
    ],
)
def test_what_another_file_defines_is_found_where_it_is_called(text, expected):
    assert list_calls(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "area(1)",  # no import says whose it is
        "from other.home import area\narea(1)",
        "from .home import area\narea()\narea( )",  # nothing to complete
        "def area(x): ...\narea(1)",
        "import numpy as np\nnp.resize(2)",
        "import numpy as np\nnp.x.y().resize(2)",
        "[].append(1)\nx.append(2)",  # a list has it
        "x.__call__(1)",
        "from .home import area\narea",
        "class Mine:\n    def resize(self, f): ...\nx.resize(2)",
        "def broken(:",
        "x = '\0'",
        "(" * 5000,
        "",
    ],
)
def test_what_may_be_something_else_is_left_out(text):
    assert list_calls(text) == []


def test_a_call_knows_where_what_it_calls_is_defined():
    files = {"home.py": HOME, "use.py": "from .home import area\narea(1)"}
    (site,) = find_calls(files, "shapes")
    (definition,) = site.definitions
    assert definition.file == "home.py"
    assert HOME[definition.character :].startswith("def area")


def test_a_name_that_two_files_define_has_both():
    files = {"a.py": HOME, "b.py": HOME, "use.py": "x.resize(1)"}
    (site,) = find_calls(files, "shapes")
    assert [one.file for one in site.definitions] == ["a.py", "b.py"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (")", ")"),
        ("1, 2) + 3", "1, 2)"),
        ("f(x)[0], {1: (2)}) )", "f(x)[0], {1: (2)})"),
        ("')', \")\") x", "')', \")\")"),
        ("'''a)'b''')", "'''a)'b''')"),
        (r"'\')')", r"'\')')"),
        ("1, # a )\n 2)", "1, # a )\n 2)"),
        ("", None),
        ("1, (2)", None),
        ("'open)", None),
        ("'''open)'", None),
        ("# only )", None),
        ("'\\", None),
    ],
)
def test_a_call_ends_where_its_own_parenthesis_closes(text, expected):
    assert cut_at_close(text) == expected
