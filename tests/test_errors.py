import re

import pytest

from memorizing import errors
from memorizing.errors import MemorizingError

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and value is not MemorizingError
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_can_be_caught_as_a_memorizing_error(cls):
    with pytest.raises(MemorizingError, match="seen 3"):
        raise cls("seen 3")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("CorpusError", ValueError),
        ("TokenizerError", ValueError),
        ("StateError", RuntimeError),
        ("IndexUnavailableError", ImportError),
        ("ResourceError", OSError),
        ("NonFiniteLossError", ArithmeticError),
        ("RankError", RuntimeError),
    ],
)
def test_an_error_is_also_the_builtin_a_caller_expects(name, builtin):
    assert issubclass(getattr(errors, name), builtin)


def test_the_tree_drawn_in_the_docstring_is_the_tree_of_classes():
    drawn = dict(re.findall(r"[├└]── (\w+)\s+(?:\(also (\w+)\))?", errors.__doc__ or ""))
    actual = {
        cls.__name__: next(
            (base.__name__ for base in cls.__bases__ if not issubclass(base, MemorizingError)), ""
        )
        for cls in CLASSES
    }
    assert drawn == actual


def test_a_message_is_printed_as_it_was_written():
    assert str(errors.ResourceError("needs 3 GiB")) == "needs 3 GiB"
