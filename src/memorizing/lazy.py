"""Public names of a package that load when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load_name(package: str, name: str, module_of_name: Mapping[str, str]) -> Any:
    """Load a public name from its module at first use: what `__getattr__` gives (PEP 562).

    Mutates the package, which has the name from then on.

    Args:
        package: `__name__` of the package.
        name: that is asked for.
        module_of_name: per public name, the module of the package that it is in.

    Raises:
        AttributeError: no public name.
    """
    if name not in module_of_name:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(import_module(f"{package}.{module_of_name[name]}"), name)
    setattr(sys.modules[package], name, value)
    return value
