"""The direction of imports, read from the source: calls run down, values come back."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import memorizing

PACKAGE = Path(memorizing.__file__).parent

EVERYWHERE = {"config", "errors", "index_settings", "lazy", "settings", "storage"}
"""Settings, exceptions and storage, which every place may import."""

DATA_TYPES = "data types"
"""From `data`, only what carries text, and names that only a type checker sees."""

CARRIERS = {"Document", "SegmentBatch", "TokenizedDocument", "Tokenizer"}

CORE = {"data", "devices", "knn", "memory", "model", "loss", "metrics", "ranks", "terminal"}
ALL = {*CORE, "evaluation", "generation", "huggingface", "training", "analysis"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "lazy": set(),
    "settings": {"errors"},
    "index_settings": {"errors", "settings"},
    "config": {"errors", "settings", "index_settings"},
    "storage": {"errors"},
    "terminal": set(),
    "devices": set(),
    "ranks": {"devices"},
    "recipes": set(),
    "data": set(),
    "knn": {"devices"},
    "memory": {"knn", "devices", "ranks"},
    "model": {"memory", "devices", "ranks"},
    "loss": {"devices"},
    "metrics": set(),
    "evaluation": {"model", "huggingface", "devices", DATA_TYPES, "loss", "metrics", "ranks"},
    "generation": {"model", DATA_TYPES, "loss", "metrics"},
    "huggingface": {"memory", "knn", "model", "loss", "ranks", "terminal", DATA_TYPES},
    "training": ALL - {"training", "analysis"},
    "analysis": {"model", "evaluation", "huggingface", DATA_TYPES, "knn", "metrics"},
    "run_report": ALL,
    "benchmark": ALL,
    "planning": {"huggingface", "memory", "training", "benchmark"},
    "demo": {*ALL, "run_report", "benchmark"},
    "serving": {"huggingface", "memory"},
    "ray": {"huggingface", "memory", "knn", DATA_TYPES},
    "opening": {"huggingface", "ray"},
    "cli": {*ALL, "run_report", "benchmark", "demo", "opening", "planning", "ray", "serving"},
    "__main__": {"cli"},
}
"""Place -> places it may import, besides itself and EVERYWHERE."""

NO_TORCH = (
    "errors",
    "lazy",
    "settings",
    "index_settings",
    "config",
    "storage.files",
    "terminal",
    "recipes",
    "cli",
    "__main__",
)
"""Places and modules that `memorizing --help` passes through: nothing heavy at module level."""

HEAVY = {"torch", "transformers", "datasets", "accelerate", "numpy", "matplotlib", "tokenizers"}


def read_place(module: str) -> str:
    """`memorizing.memory.store` -> `memory`; the package itself is ''."""
    return module.partition(".")[2].partition(".")[0]


def list_modules() -> list[tuple[str, Path]]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules.append((".".join(parts).removesuffix(".__init__"), path))
    return modules


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def find_imports(
    module: str, is_package: bool, node: ast.AST, *, typing_only: bool = False, late: bool = False
) -> Iterator[tuple[str, bool, bool]]:
    """Imports below a node: dotted name, whether only types see it, whether it is in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, typing_only, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = child.module or ""
            if child.level:
                parent = module.split(".")[: None if is_package else -1]
                parent = parent[: len(parent) - child.level + 1]
                source = ".".join([*parent, *([source] if source else [])])
            yield from ((f"{source}.{alias.name}", typing_only, late) for alias in child.names)
        else:
            yield from find_imports(
                module,
                is_package,
                child,
                typing_only=typing_only or is_type_checking(child),
                late=late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
            )


def find_imports_of(module: str, path: Path) -> list[tuple[str, bool, bool]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(find_imports(module, path.name == "__init__.py", tree))


def is_allowed(place: str, imported: str, typing_only: bool) -> bool:
    target = read_place(imported)
    if target not in MAY_IMPORT:
        # A public name of the package itself would hide where it comes from, but for the version.
        return imported == "memorizing.__version__"
    if target == place or target in EVERYWHERE & MAY_IMPORT[place] or target in MAY_IMPORT[place]:
        return True
    if target in EVERYWHERE and place not in EVERYWHERE:
        return True
    is_type = typing_only or imported.rpartition(".")[2] in CARRIERS
    return target == "data" and DATA_TYPES in MAY_IMPORT[place] and is_type


MODULES = [(name, path) for name, path in list_modules() if name != "memorizing"]


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_a_module_imports_only_what_its_place_may(module: str, path: Path):
    place = read_place(module)
    assert place in MAY_IMPORT, f"{place} has no line in the table of imports: add one"
    wrong = [
        imported
        for imported, typing_only, _ in find_imports_of(module, path)
        if imported.partition(".")[0] == "memorizing"
        and not is_allowed(place, imported, typing_only)
    ]
    assert not wrong, f"{module} may import {sorted(MAY_IMPORT[place] | EVERYWHERE)}, not {wrong}"


@pytest.mark.parametrize("place", NO_TORCH)
def test_what_help_passes_through_imports_nothing_heavy_at_module_level(place: str):
    heavy = [
        (module, imported)
        for module, path in MODULES
        if f"{module}.".startswith(f"memorizing.{place}.")
        for imported, typing_only, late in find_imports_of(module, path)
        if not (typing_only or late)
        and (imported.partition(".")[0] in HEAVY or read_place(imported) in ALL - {*NO_TORCH})
    ]
    assert not heavy


def test_every_package_that_is_imported_is_declared():
    imported = {
        name.partition(".")[0]
        for module, path in MODULES
        for name, *_ in find_imports_of(module, path)
    }
    third_party = imported - set(sys.stdlib_module_names) - {"memorizing"}
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.match(r"[\w-]+", line)[0] for line in requirements}  # type: ignore[index]
    assert third_party <= declared


def test_the_table_has_no_circle():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [
            place
            for place, below in MAY_IMPORT.items()
            if place not in order and below - {DATA_TYPES} <= set(order)
        ]
        assert free, f"a circle among {set(MAY_IMPORT) - set(order)}"
        order += free


def find_circle(imports: dict[str, set[str]]) -> set[str]:
    """The modules that are in a circle or above one: what is left when free ones are taken out."""
    left = dict(imports)
    while free := [module for module, below in left.items() if not below & left.keys()]:
        for module in free:
            del left[module]
    return set(left)


def test_no_modules_import_each_other_be_it_for_types_or_inside_a_function():
    # A package's __init__ only passes names on.
    paths = {module: path for module, path in MODULES if path.name != "__init__.py"}
    imports = {
        module: {
            target
            for imported, *_ in find_imports_of(module, path)
            for target in (imported, imported.rpartition(".")[0])
            if target in paths and target != module
        }
        for module, path in paths.items()
    }
    assert sum(map(len, imports.values())) > len(paths)
    assert not find_circle(imports)


def test_a_circle_of_any_length_is_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}
    assert not find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize(
    ("place", "imported", "typing_only", "expected"),
    [
        ("knn", "memorizing.model.MemorizingTransformer", False, False),
        ("model", "memorizing.memory.Memory", False, True),
        ("config", "memorizing.data.Corpus", True, False),
        ("data", "memorizing.config.DataConfig", False, True),
        ("config", "memorizing.settings.require", False, True),
        ("config", "memorizing.storage.files.write_json", False, False),
        ("analysis", "memorizing.storage.files.write_json", False, True),
        ("settings", "memorizing.config.Config", False, False),
        ("evaluation", "memorizing.data.SegmentLoader", False, False),
        ("evaluation", "memorizing.data.TokenizedDocument", True, True),
        ("evaluation", "memorizing.data.loader.SegmentBatch", False, True),
        ("training", "memorizing.train", False, False),
        ("training", "memorizing.__version__", False, True),
    ],
)
def test_the_rule_tells_right_from_wrong(place, imported, typing_only, expected):
    assert is_allowed(place, imported, typing_only) is expected


def test_relative_and_late_imports_are_seen():
    source = "from . import store\nfrom ..knn import index\ndef f():\n    import torch\n"
    found = list(find_imports("memorizing.memory.ring", False, ast.parse(source)))
    assert found == [
        ("memorizing.memory.store", False, False),
        ("memorizing.knn.index", False, False),
        ("torch", False, True),
    ]
