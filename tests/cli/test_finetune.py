import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from memorizing.cli import main
from memorizing.huggingface.learning import calibration
from memorizing.huggingface.learning.adapter import load_adapter
from memorizing.huggingface.learning.calibration import EntryCalibration
from tests.training.finetuning.tools import make_base, make_texts, make_tokenizer


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model, texts, and options for a run of a second."""
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "cache"))
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for document in make_texts(101, 67, 83):
        (tmp_path / "texts" / f"{document.name}.txt").write_text(document.text)
    return [
        "finetune", str(tmp_path / "base"), "--corpus", f"files:{tmp_path / 'texts'}",
        "--out", str(tmp_path / "run"), "--layers", "1", "--window", "11", "--capacity", "23",
        "--steps", "5", "--lora-rank", "3", "--precision", "fp32", "--device", "cpu",
        "--set", "memory.num_neighbors=5", "--set", "memory.segment_len=7",
        "--set", "memory.combine=gate",
    ]  # fmt: skip


def test_the_verb_trains_evaluates_and_saves_an_adapter(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    result = tmp_path / "result.json"
    held_out = ["--held-out", "t1.txt", "--evaluate-every", "2", "--json", str(result)]
    assert main([*words, *held_out]) == 0
    out = capsys.readouterr().out
    assert "finetuned after 5 steps" in out
    assert "validation perplexity" in out
    assert json.loads(result.read_text())["steps"] == 5
    about = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert about["memory"]["combine"] == "gate"
    assert about["about"]["model"] == words[1]
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(words[1]), tmp_path / "run/adapter")
    gates = {p for n, p in loaded.named_parameters() if ".memory.bias" in n}
    assert all(bool(gate.any()) for gate in gates)
    assert gates


def test_a_memory_of_passages_is_trained_for_read_and_used(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*words, "--read", "passages", "--held-out", "t1.txt", "--evaluate-every", "2"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "validation perplexity" in shown.out
    told = [line for line in shown.err.splitlines() if "nats a token" in line]
    assert [line.split(":")[0] for line in told] == ["step 2", "step 4", "step 5"]
    assert all(re.search(r"[0-9.]+ quoted, [0-9.]+ other, [0-9.]+ alone", one) for one in told)
    about = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert (about["memory"]["read"], about["finetune"]["rows"]) == ("passages", 1)
    assert main([*words, "--steps", "7", "--resume"]) == 0
    assert "finetuned after 7 steps" in capsys.readouterr().out
    model, texts, memory = words[1], str(tmp_path / "texts"), str(tmp_path / "memory")
    adapter = ["--adapter", str(tmp_path / "run" / "adapter"), "--precision", "fp32"]
    assert main(["read", model, texts, "--memory", memory, *adapter]) == 0
    prompt = ["--prompt", "a memory read", "--max-new-tokens", "3", "--sources"]
    assert main(["generate", model, "--memory", memory, *prompt, *adapter]) == 0
    assert "passages in sight from the start" in capsys.readouterr().err
    assert main(["generate", model, "--memory", memory, *prompt]) == 2  # of other weights
    capsys.readouterr()
    assert main([*words, "--train", "gates", "--resume"]) == 2
    assert "train 'lora' or 'all', or read entries" in capsys.readouterr().err


def test_a_model_all_weights_of_which_were_trained_is_used_by_its_folder(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "--train", "all", "--set", "finetune.learning_rate=0.1"]) == 0
    folder, prompt = str(tmp_path / "run" / "adapter"), ["--prompt", "a memory", "--max-new-tokens"]
    assert main(["generate", words[1], "--adapter", folder, *prompt, "3"]) == 2
    error = capsys.readouterr().err
    assert f"`memorizing generate {folder} --adapter {folder}`" in error
    texts = []
    for adapter in (["--adapter", folder], []):
        capsys.readouterr()
        assert main(["generate", folder, *adapter, *prompt, "7"]) == 0
        texts.append(capsys.readouterr().out)
    assert main(["generate", words[1], *prompt, "7"]) == 0
    assert capsys.readouterr().out not in texts


def test_a_finished_run_goes_on_with_more_steps(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(words) == 0
    assert main([*words, "--steps", "7"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*words, "--steps", "7", "--resume"]) == 0
    assert "finetuned after 7 steps" in capsys.readouterr().out
    assert main([*words, "--capacity", "29", "--resume"]) == 2
    assert "memory.capacity was 23 and is 29" in capsys.readouterr().err


def test_layers_can_be_found_before_training(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    asked: list[dict[str, Any]] = []

    def find(model: Any, tokens: list[int], progress: Any, **settings: Any) -> EntryCalibration:
        progress(3, 7)
        asked.append({"tokens": len(tokens), **settings})
        kept = {**settings, "bias": 1.0}
        return EntryCalibration({2: (0, 2)}, (1, 2), kept, torch.zeros(2, 3), 5.0, 4.0)

    # A random model gains nothing by a memory.
    monkeypatch.setattr(calibration, "calibrate", find)
    place = words.index("--layers")
    words = [*words[:place], *words[place + 2 :], "--calibrate"]
    assert main(words) == 0
    assert "calibrated: layer 2, heads 0, 2; bias 1" in capsys.readouterr().err
    assert asked == [
        {
            "tokens": 89,
            "window": 11,
            "read": "entries",
            "num_neighbors": 5,
            "segment_len": 7,
            "combine": "gate",
        }
    ]
    description = (tmp_path / "run" / "finetune.json").read_text()
    about = json.loads(description)
    assert about["memory"]["layers"] == [2]
    assert about["heads"]["2"]["bias"] == [1, -30, 1]
    assert main([*words, "--steps", "7", "--resume"]) == 0
    assert "another setting: finetune.steps was 5 and is 7" in capsys.readouterr().err
    assert len(asked) == 1
    again = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert again["heads"] == about["heads"]
    assert main([*words, "--layers", "1"]) == 2
    assert "leave out --layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--capacity", "3"], "at least num_neighbors"),
        (["--train", "gates", "--capacity", "0"], "gates of no memory"),
        (["--set", "memory.combin=gate"], "combin"),
        (["--set", "finetune.stepss=3"], "did you mean 'finetune.steps'"),
        (["--set", "combine=gate"], "TABLE.KEY=VALUE"),
        (["--layers", "7"], "from 0 to 2"),
        (["--rate", "-1"], "learning_rate is -1"),
        (["--held-out", "nothing"], "data.validation"),
        (["--evaluate-every", "5"], "no document is held out"),
    ],
)
def test_what_cannot_work_is_said_on_one_line(
    words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*words, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
