"""From plain values, as TOML and the command line hold them, to frozen dataclasses.

Nothing here knows a setting by its name: the dataclasses of `config.py` describe themselves by
type hints: `bool`, `int`, `float`, `str`, `Literal`, `tuple[item, ...]` and nested dataclasses, and
numbers within bounds, such as `Count`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from memorizing.errors import ConfigError

_NAMES_SHOWN = 12


class Bounds(NamedTuple):
    """What the numbers of a type are within; a part of the type that `check_types` checks."""

    allowed: str
    hold: Callable[[float], bool]


Count = Annotated[int, Bounds("0 or more", lambda value: value >= 0)]
Seed = Annotated[int, Bounds("from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)]
Positive = Annotated[int, Bounds("1 or more", lambda value: value >= 1)]
NotNegative = Annotated[float, Bounds("0 or more", lambda value: value >= 0)]
AboveZero = Annotated[float, Bounds("above 0", lambda value: value > 0)]
Share = Annotated[float, Bounds("from 0 to 1", lambda value: 0 <= value <= 1)]
ShareBelowOne = Annotated[
    float, Bounds("from 0 up to, not including, 1", lambda value: 0 <= value < 1)
]


def require(condition: bool, name: str, seen: object, allowed: str) -> None:
    """Raise a `ConfigError` with the value seen and what is allowed, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name} is {seen!r}; allowed: {allowed}")


def check_types(table: Any, name: str) -> None:
    """Refuse fields of a dataclass that are not of their type or its bounds, or not finite.

    Args:
        table: a dataclass instance.
        name: its name in messages, such as `model`.

    Raises:
        ConfigError: for the first field that does not fit.
    """
    for key, hint in read_hints(type(table)).items():
        value = getattr(table, key)
        if not _is_of_type(hint, value):
            raise ConfigError(f"{name}.{key} is {value!r}; allowed: {_describe_type(hint)}")
        for bounds in _read_bounds(type(table))[key]:
            require(bounds.hold(value), f"{name}.{key}", value, bounds.allowed)


@functools.cache
def read_hints(cls: type) -> dict[str, Any]:
    """Field name -> type without bounds, for a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _read_bounds(cls: type) -> dict[str, tuple[Bounds, ...]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}


def _is_of_type(hint: Any, value: Any) -> bool:
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return isinstance(value, tuple) and all(_is_of_type(item, element) for element in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _describe_type(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return "a list, each item " + _describe_type(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a text, in quotes in a TOML file",
    }.get(hint, f"a {hint.__name__}")


def build_dataclass(cls: Any, values: Any, prefix: str = "") -> Any:
    """Build a dataclass from nested dictionaries.

    Lists become tuples, and whole numbers floats, where the field is declared so.

    Args:
        cls: the dataclass; it validates itself at construction.
        values: field name -> value; what is left out has the field's default.
        prefix: name of the table with a dot, for messages; empty at the top.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value the dataclass refuses.
    """
    hints = read_hints(cls)
    if not isinstance(values, dict):
        table = prefix.removesuffix(".")
        raise ConfigError(
            f"{table} is {values!r}; it is a table: write [{table}] with settings below"
        )
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            known = [prefix + name for name in hints]
            raise ConfigError(describe_unknown("key", f"{prefix}{key}", known))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            arguments[key] = build_dataclass(hint, value, f"{prefix}{key}.")
        else:
            arguments[key] = _convert(hint, value)
    return cls(**arguments)


def _convert(hint: Any, value: Any) -> Any:
    """Convert between spellings of one value only; `check_types` refuses what then does not fit."""
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
            value = value if item is str else [parse_value(part) for part in value]
        elif not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(_convert(item, element) for element in value)
    if hint is float and type(value) is int:
        return float(value)
    return value


def parse_value(text: str) -> Any:
    """A value written as in TOML; text that is not TOML is taken as a string without quotes."""
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # also of numbers with too many digits
        return text.strip()
    return values["value"] if len(values) == 1 else text.strip()


def format_value(value: Any) -> str:
    """A boolean, number, string or list of them as TOML."""
    # JSON and TOML write these alike, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def list_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Every setting of a dataclass, nested ones as `table.key`."""
    for key, hint in read_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from list_keys(hint, f"{prefix}{key}.")
        else:
            yield prefix + key


def flatten_tables(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Nested tables as one, whose keys are joined: `model.num_layers`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = flatten_tables(value, separator)
            flat |= {f"{key}{separator}{name}": item for name, item in inner.items()}
        else:
            flat[str(key)] = value
    return flat


def describe_unknown(what: str, seen: str, known: Sequence[str]) -> str:
    """Say what was not known, and the nearest known name, or some of them where none is near."""
    return f"unknown {what} {seen!r}; {find_nearest(seen, known, count=1)}"


def find_nearest(name: str, known: Sequence[str], count: int = 3) -> str:
    """A hint for a name that is not known: the nearest known ones, or some of them."""
    folded = {candidate.lower(): candidate for candidate in known}
    near = [
        folded[match]
        for match in difflib.get_close_matches(name.lower(), list(folded), n=count, cutoff=0.5)
    ]
    if near:
        return "did you mean " + " or ".join(repr(match) for match in near) + "?"
    shown = ", ".join(known[:_NAMES_SHOWN])
    more = ", ..." if len(known) > _NAMES_SHOWN else ""
    return f"known: {shown}{more}" if known else "there is none"
