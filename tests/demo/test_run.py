"""The demo, whole, on a corpus and a model that take seconds."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console

from memorizing.config import load_config
from memorizing.demo import run_demo
from memorizing.errors import ConfigError, RunFolderError

STEPS = 5


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    words = [f"{a}{b}" for a in ("red", "blue", "old", "new") for b in ("house", "tree", "road")]
    for number in range(6):
        chosen = random.Random(number).choices(words, k=311)
        (texts / f"{number}.txt").write_text(" ".join(chosen), encoding="utf-8")
    settings = [
        f"data.corpus=files:{texts}",
        "data.validation=[]",
        'data.test=["4.txt", "5.txt"]',
        "tokenizer.vocab_size=300",
        "model.model_dim=22",
        "model.head_dim=6",
        "model.ffn_dim=34",
        "model.segment_len=32",
        "model.window=32",
        "model.capacity=64",
        f"training.steps={STEPS}",
        "training.rows=2",
        "training.precision=fp32",
        "evaluation.capacities=[32, 128]",
    ]
    path = tmp_path / "recipe.toml"
    path.write_text(load_config("demo").replace(settings).to_toml(), encoding="utf-8")
    return path


def tell(recipe: Path, run_dir: Path, minutes: float = 10.0) -> tuple[dict, str]:
    page = io.StringIO()
    console = Console(file=page, width=200)  # the folder's name is not cut
    result = run_demo(recipe=recipe, run_dir=run_dir, minutes=minutes, console=console)
    return result, page.getvalue()


def test_the_demo_trains_both_arms_alike_and_reports_every_memory_and_control(
    recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    result, page = tell(recipe, folder)
    names = {"cache_only", "32", "128", "off", "other_document", "shuffled"}
    assert result["perplexity"].keys() == result["bits_per_byte"].keys() == names
    assert all(math.isfinite(value) for value in result["perplexity"].values())
    assert result["intervals"].keys() == names - {"cache_only"}
    assert result["interval"] == result["intervals"]["128"]
    tokens = {arm["tokens"] for arm in result["by_model"].values()}
    assert len(tokens) == 1
    written = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result))
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(value) for value in result["bits_per_byte"].values())
    assert result["total_s"] > result["train_s"] + result["evaluate_s"]
    assert result["expected"].keys() == {"train_s", "evaluate_s"}
    assert result["config"]["training"]["steps"] == STEPS
    assert result["speed"]["precision"] == "fp32"
    for said in (
        "cache only",
        "32 entries",
        "another document's",
        "in fp32 (as set). To end within 10 minutes, each model reads 320 of",
        f"all {STEPS} steps of the recipe",
        "That will take about",
        "This took",
        str(folder),
    ):
        assert said in page
    configs = [(folder / arm / "config.toml").read_text() for arm in ("cache_only", "memory")]
    differing = [
        pair for pair in zip(*(c.splitlines() for c in configs), strict=True) if len(set(pair)) > 1
    ]
    assert sorted(pair[1].partition(" ")[0] for pair in differing) == ["capacity", "name"]


def test_repeated_by_its_configuration_the_demo_replaces_its_own_folder_and_no_other(
    recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    first, page = tell(recipe, folder, minutes=1e-6)
    assert "To end within 10 seconds" in page
    assert "it takes longer than the 10 seconds that were asked for" in page
    (folder / "left_over.txt").touch()
    second, page = tell(folder / "memory" / "config.toml", folder, minutes=0)
    assert "As the recipe says, each model reads" in page
    assert not (folder / "left_over.txt").exists()
    assert second["perplexity"] == first["perplexity"]
    assert second["config"]["evaluation"] == first["config"]["evaluation"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not made by a demo"):
        tell(recipe, mine)
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("setting", ["model.capacity=0", 'data.test=["4.txt"]'])
def test_a_recipe_that_cannot_be_compared_is_refused(
    recipe: Path, tmp_path: Path, setting: str
) -> None:
    path = tmp_path / "other.toml"
    path.write_text(load_config(recipe).replace([setting]).to_toml(), encoding="utf-8")
    with pytest.raises(ConfigError, match="two or more test documents"):
        tell(path, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
