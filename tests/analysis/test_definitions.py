"""What a text defines, by Python's parser or by declaring keywords."""

import pytest

from memorizing.analysis.definitions import find_definitions


def list_lines(text: str) -> list[tuple[str, str]]:
    return [(one.name, text[one.start : one.end]) for one in find_definitions(text)]


def test_python_defines_functions_classes_and_first_assignments():
    text = (
        "import os\n\nclass Tree:\n    def grow(self):\n        self.age = age = 1\n"
        "        self.age = 2\n\nasync def grow():\n    text = 'def not_this(): pass'\n"
    )
    assert list_lines(text) == [
        ("Tree", "class Tree:"),
        ("grow", "    def grow(self):"),
        ("age", "        self.age = age = 1"),
        ("grow", "async def grow():"),
        ("text", "    text = 'def not_this(): pass'"),
    ]


def test_elsewhere_a_declaring_keyword_does():
    text = (
        'lemma (in ring) add_zero [simp]: "x + 0 = x"\n  by auto\nTheorem mul_comm : forall.\n'
        "let rec ADD_SYM = prove\r\npub fn main() {}\nexport default class Page {}\n"
        "the function of a lemma is this\n"
    )
    found = find_definitions(text)
    assert [one.name for one in found] == ["add_zero", "mul_comm", "ADD_SYM", "main", "Page"]
    assert [one.is_lemma for one in found] == [True, True, False, False, False]
    assert text[found[2].start : found[2].end] == "let rec ADD_SYM = prove"


@pytest.mark.parametrize(
    "text",
    ["def a(:\n  pass\nclass b:\n", "import x\n" + "(" * 9000, "def a():\n \0\n", "", "\n\n"],
)
def test_what_python_cannot_parse_is_read_by_keywords(text):
    assert {one.name for one in find_definitions(text)} <= {"a", "b"}


def test_lines_may_end_in_any_way():
    assert list_lines("def a(): pass\rdef b(): pass\r\ndef c(): pass") == [
        (name, f"def {name}(): pass") for name in "abc"
    ]
