from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.faults.tiny import save_llama
from memorizing.cli import main


class Outcome(NamedTuple):
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("train", "tiny", ...)` in this process."""

    def run_main(*words: object) -> Outcome:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Outcome(status, *capsys.readouterr())

    return run_main


@pytest.fixture
def refuse(run):
    """Run a command that must fail, and return its one line."""

    def run_refused(*words):
        outcome = run(*words)
        assert outcome.status == 2
        *before, line = outcome.err.splitlines()
        assert line.startswith("error: ")
        assert not any(text.startswith(("error", "Traceback")) for text in before)
        return line

    return run_refused


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five documents; each repeats words of its own."""
    folder = tmp_path_factory.mktemp("texts")
    for index, word in enumerate(("alpha", "beta", "gamma", "delta", "epsilon")):
        lines = (f"{word} {number * (index + 3) % 89} {word[::-1]};\n" for number in range(61))
        (folder / f"{word}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


SETTINGS = (
    "training.steps=3",
    "training.rows=2",
    "training.checkpoint_every=2",
    "tokenizer.vocab_size=307",
    "data.validation=delta.txt,epsilon.txt",
    "data.test=",
)


@pytest.fixture(scope="session")
def settings(texts: Path) -> list[str]:
    """`--set` words for a run of a second on these texts."""
    values = (*SETTINGS, f"data.corpus=files:{texts}")
    return [word for value in values for word in ("--set", value)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    """A run that is not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMORIZING_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert main(["train", "tiny", "--run", str(folder), *settings]) == 0
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model that is not to be changed."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one of the same shape."""
    return save_llama(tmp_path_factory.mktemp("models") / "other", seed=1)


MEMORY_WORDS = ("--layers", "1", "--window", "17", "--precision", "fp32", "--set", "read=entries")
"""How the tests' memories are made."""


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five short documents."""
    folder = tmp_path_factory.mktemp("notes")
    for index, word in enumerate(("alpha", "beta", "gamma", "delta", "epsilon")):
        lines = (f"{word} {number * (index + 3) % 89}\n" for number in range(7 + index))
        (folder / f"{word}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory, llama: Path, notes: Path) -> Path:
    """What the tiny model read of the notes, texts kept; it is not to be changed."""
    folder = tmp_path_factory.mktemp("memories") / "notes.memory"
    words = ["read", str(llama), str(notes), "--memory", str(folder), "--keep-text", *MEMORY_WORDS]
    assert main(words) == 0
    return folder


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder as a repository is: text, and what is none."""
    root = tmp_path / "tree"
    for name, content in {
        "b.py": b"def second(x):\n    return 2 * x\n",
        "a/first.md": "A first text \N{EM DASH} not ASCII alone.\n".encode(),
        "a/nothing.txt": b" \n\n",
        "a/picture.png": b"\x89PNG\0\0",
        "a/latin.txt": b"caf\xe9",
        "a/long.csv": b"1,2,3\n" * 60,
        ".git/config": b"[core]",
        ".hidden": b"hidden",
        "__pycache__/b.pyc": b"\0",
        "node_modules/x.js": b"x()",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
