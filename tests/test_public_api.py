import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import memorizing
from experiments.faults.tiny import save_llama
from memorizing.cli import app
from memorizing.memory import MemoryFolder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def find_blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for found, text in blocks if found == language]


EXAMPLES: dict[str, str] = {}
"""Of the verbs that show some."""


def list_options() -> dict[str, set[str]]:
    """Every verb with its options, as `train` or `benchmark step`."""
    import typer.main

    verbs: dict[str, set[str]] = {}

    def visit(command, path: tuple[str, ...]) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            visit(inner, (*path, name))
        if path and command.epilog:
            EXAMPLES[" ".join(path)] = command.epilog
        if not hasattr(command, "commands"):
            options = {option for parameter in command.params for option in parameter.opts}
            verbs[" ".join(path)] = options | {"--help"}

    visit(typer.main.get_command(app), ())
    return verbs


VERBS = list_options()


def split_command(line: str) -> tuple[str, set[str]]:
    words = line.split()[1:]
    verb = next(
        name
        for name in sorted(VERBS, key=len, reverse=True)
        if line.split(" ", 1)[1].startswith(name)
    )
    return verb, {word for word in words if word.startswith("--")}


@pytest.mark.parametrize("name", memorizing.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(memorizing, name) is not None


def test_public_names_are_sorted_listed_once_and_shown_by_dir():
    assert memorizing.__all__ == sorted(set(memorizing.__all__))
    assert set(memorizing.__all__) <= set(dir(memorizing))


def test_names_that_load_late_are_those_that_type_checkers_see():
    source = Path(memorizing.__file__).read_text(encoding="utf-8")
    typed = source.partition("if TYPE_CHECKING:")[2].partition("_MODULE_OF_NAME")[0]
    seen = {
        (name, module)
        for module, names in re.findall(
            r"from memorizing\.(\w+) import ([^()\n]+|\([^)]*\))", typed
        )
        for name in re.findall(r"\w+", names)
    }
    assert seen == set(memorizing._MODULE_OF_NAME.items())
    assert set(memorizing.__all__) == {*memorizing._MODULE_OF_NAME, "__version__"}


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        memorizing.nothing  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, memorizing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_is_that_of_the_installed_package_and_of_the_changelog():
    assert metadata.version("memorizing") == memorizing.__version__
    assert f"## [{memorizing.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (resources.files("memorizing") / "py.typed").is_file()


def test_the_readmes_example_runs_as_printed(capsys):
    example = find_blocks("python")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    exec(compile(example, "README.md", "exec"), {})
    assert "torch.Size([1, 32, 512])" in capsys.readouterr().out


def test_the_readmes_memory_for_an_existing_model_runs_as_printed(tmp_path, monkeypatch):
    example = find_blocks("python")[1]
    monkeypatch.chdir(tmp_path)
    given = {
        "path": save_llama(tmp_path / "llama", max_positions=1031),
        "documents": [("alpha.py", "def alpha(): return 7\n" * 5), ("beta.py", "beta = 3\n" * 7)],
        "prompt": "def alpha(",
    }
    exec(compile(example, "README.md", "exec"), given)
    folder = MemoryFolder.open(tmp_path / "repo.memory")
    assert [document.name for document in folder.documents] == ["alpha.py", "beta.py"]
    assert given["tokens"].shape[1] > len(given["prompt"])


COMMANDS = [
    line
    for block in find_blocks("sh")
    for line in block.splitlines()
    if line.startswith("memorizing ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_readmes_commands_exist(line):
    verb, options = split_command(line)
    assert options <= VERBS[verb], f"{verb} has no {options - VERBS[verb]}"


def test_the_readme_shows_every_verb_but_the_demo_which_make_runs():
    shown = {split_command(line)[0] for line in COMMANDS}
    assert shown | {"demo"} == set(VERBS)


def test_the_readmes_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = {
        line.split()[1]
        for block in find_blocks("sh")
        for line in block.splitlines()
        if line.startswith("make ")
    }
    assert {"demo", "test"} <= named <= targets


def test_every_path_of_the_readmes_tree_exists():
    (tree,) = (block for block in find_blocks("") if block.startswith("src/memorizing/"))
    for line in tree.splitlines():
        match = re.match(r"^(├── |└── )?([\w./]+(?:, [\w./]+)*)  +\S", line)
        for name in match[2].split(", ") if match else ():
            parent = ROOT / "src/memorizing" if match and match[1] else ROOT
            assert (parent / name).exists(), name


def test_the_examples_in_help_use_options_that_exist():
    for name, examples in EXAMPLES.items():
        lines = [line.strip() for line in examples.splitlines() if " memorizing " in line]
        assert lines, name
        for line in lines:
            verb, options = split_command(line[line.index("memorizing ") :])
            assert options <= VERBS[verb], line


def test_the_source_archive_holds_all_folders_that_the_tests_read():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    held = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name.removeprefix("/")).exists() for name in held)
    here = ROOT / "tests"
    read = {
        name
        for path in here.rglob("*.py")
        for name in re.findall(
            r"(?:ROOT|parents?\[\d\]|parent) / \"(\w[\w.-]*)\"", path.read_text(encoding="utf-8")
        )
        if (ROOT / name).exists() and not (path.parent / name).exists()
    }
    assert {"README.md", "docs", "examples", "experiments"} <= read
    assert {f"/{name}" for name in read} - {"/LICENSE", "/pyproject.toml"} <= {*held}


def test_the_tested_torch_is_pinned_without_a_local_version():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
