"""The examples run as they stand."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.finetuning.tools import make_base, make_texts, make_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Folders of a tiny model of `transformers` and of texts."""
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for document in make_texts(211, 307, 401):
        (tmp_path / "texts" / f"{document.name}.txt").write_text(document.text)
    return [str(tmp_path / "base"), str(tmp_path / "texts")]


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run an example in this process, which has imported what it needs, and give what it prints."""

    def run(name: str, *words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_training_loop_of_ones_own_lowers_the_loss(
    run_example: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        text = f"a memory that was read {number} times is a memory. " * 61
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    said = run_example("own_training_loop.py", str(folder), "21")
    losses = [float(line.split()[2]) for line in said.splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_finetuning_with_lora_saves_an_adapter_that_is_measured(
    words: list[str], run_example: Callable[..., str], tmp_path: Path
) -> None:
    said = run_example("finetune_with_lora.py", *words, "7", "1")
    found = dict(re.findall(r"memory (\w+): ([\d.]+) bits per byte", said))
    assert set(found) == {"on", "off", "shuffled"}
    assert (tmp_path / "runs/finetuned_with_lora/adapter/adapter_model.safetensors").exists()


def test_training_inside_of_the_trainer_lowers_the_loss(
    words: list[str], run_example: Callable[..., str]
) -> None:
    said = run_example("inside_trainer.py", *words, "23")
    losses = [float(loss) for loss in re.findall(r"step \d+: ([\d.]+) nats", said)]
    assert len(losses) == 23
    assert sum(losses[-5:]) < sum(losses[:5])
