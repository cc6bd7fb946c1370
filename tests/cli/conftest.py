from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

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
