"""Training with passages in sight is measured on packages that are held out, and by quotes."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.faults.tiny import save_llama
from memorizing.errors import ConfigError

PRETRAINED = Path(__file__).parents[2] / "experiments" / "pretrained"
TESTED = ("tornado", "scrapy", "rich", "pylint")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(PRETRAINED))
    yield importlib.import_module("finetuned_passages")
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(PRETRAINED)):
            del sys.modules[name]


def test_what_is_trained_once_is_tested_in_every_kind(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "cache"))
    rng = random.Random(0)
    words = [f"word_{number}" for number in range(701)]
    for name in (*importlib.import_module("documents").NAMES["code"]["train"], *TESTED):
        (tmp_path / "corpora" / "code" / name).mkdir(parents=True)
        text = " ".join(rng.choices(words, k=4201))
        (tmp_path / "corpora" / "code" / name / "module.py").write_text(text)
    options = SimpleNamespace(
        model=save_llama(tmp_path / "llama", max_positions=2048),
        corpora=tmp_path / "corpora",
        runs=tmp_path / "runs",
        json=tmp_path / "result.json",
        device="cpu",
        precision="fp32",
        steps=2,
        seed=0,
        tests=2,
    )
    script.measure(options)
    adapter = tmp_path / "runs" / "fp32" / "adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    shown = [line for line in capsys.readouterr().out.splitlines() if "change" in line]
    script.measure(options)
    assert adapter.stat().st_mtime_ns == written
    assert shown == [line for line in capsys.readouterr().out.splitlines() if "change" in line]
    assert [line.split(":")[0] for line in shown] == list(script.KINDS)
    kinds = json.loads(options.json.read_text())["kinds"]
    assert all(one["change"]["value"] != 0 for one in kinds.values())
    assert len({one["untrained"]["value"] for one in kinds.values()}) == 3


def test_quotes_are_compared_prompt_by_prompt(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture
):
    def write(name: str, num_right: int, prompt: str = "a") -> Path:
        arm = {"num_right": num_right, "num_tokens": 16, "nats": 8.0}
        place = {"prompt": prompt, "answer": "b", "document": "d", "arms": {"passages": arm}}
        path = tmp_path / name
        path.write_text(json.dumps({"places": [place] * 3}))
        return path

    before, after = write("before", 13), write("after", 16)
    script.compare_recall(SimpleNamespace(recall=[before, after]))
    right, whole, nats = capsys.readouterr().out.splitlines()
    assert right.startswith("passages, right: 13.000")
    assert "change 3.000" in right
    assert "change 1.000" in whole
    assert "change 0.000" in nats
    with pytest.raises(ConfigError, match="not of the same prompts"):
        script.compare_recall(SimpleNamespace(recall=[before, write("other", 16, "c")]))
