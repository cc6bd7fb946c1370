"""The demo of a model that reads source code, with a tiny model and a folder of small files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import memorizing
from experiments.faults.tiny import save_llama
from memorizing.benchmark.memory_use import asking
from memorizing.demo import pretrained_story, run_pretrained_demo
from memorizing.demo.pretrained import draw_files
from memorizing.errors import ConfigError, RunFolderError
from memorizing.huggingface.attaching.attachment import find_attachment
from memorizing.huggingface.loading import load_pretrained
from memorizing.memory.disk import MemoryFolder
from memorizing.terminal import make_console
from tests.benchmark.memory_use.tools import interrupt_at
from tests.huggingface.tools import make_model

SETTINGS = {
    "window": 61,
    "segment_len": 61,
    "num_passages": 2,
    "passage_len": 16,
    "dtype": "float32",
}
"""Tokens that stand next to others at every place."""
SEED = 0
"""By which `long.py` is drawn last."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SimpleNamespace:
    folder = save_llama(tmp_path_factory.mktemp("models") / "llama", max_positions=1721)
    loaded, tokenizer = load_pretrained(str(folder))
    # The second head of the first layer asks for the tokens that it sees, wherever they are.
    attention = loaded.model.layers[0].self_attn
    with torch.no_grad():
        loaded.model.rotary_emb.inv_freq.zero_()
        attention.q_proj.weight[10:] = 3 * attention.k_proj.weight
    return SimpleNamespace(model=loaded, tokenizer=tokenizer, name=str(folder))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Three files, two of which call what the third defines."""
    root = tmp_path_factory.mktemp("source")
    (root / "home.py").write_text("def area(width, height):\n    return width * height\n" * 7)
    for number, name in enumerate(("one", "two")):
        calls = "".join(f"    total_{n} = area({n}, {n + number})\n" for n in range(11))
        (root / f"{name}.py").write_text(f"from .home import area\n\ndef {name}():\n{calls}")
    (root / "notes.md").write_text("no Python\n")
    return root


@pytest.fixture(scope="module", autouse=True)
def _time_little():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "_TIMED_TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def shown(model, source, tmp_path_factory) -> SimpleNamespace:
    """A demo, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    result, page = tell(model, source, folder)
    return SimpleNamespace(result=result, page=page, folder=folder)


def tell(given: SimpleNamespace, source: Path, run_dir: Path, **changes: Any) -> tuple[Any, str]:
    page = io.StringIO()
    words = {"settings": SETTINGS, "num_quotes": 4, "num_calls": 1, "num_shown": 2}
    words |= changes
    result = run_pretrained_demo(
        given.model,
        given.tokenizer,
        given.name,
        source=source,
        run_dir=run_dir,
        console=make_console(file=page, width=80),
        **words,
    )
    return result, page.getvalue()


def test_the_demo_asks_all_arms_the_same_and_keeps_what_was_read(shown, model, source):
    result, folder = shown.result, shown.folder
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    read = MemoryFolder.open(folder / "source.memory").documents
    assert sorted(one.name for one in read) == ["home.py", "one.py", "two.py"]
    assert result["source"] | {"folder": ""} == {
        "folder": "",
        "documents": 3,
        "of_documents": 3,
        "tokens": sum(len(path.read_bytes()) for path in source.glob("*.py")),
        "tokens_left": 0,
    }
    for part, count in (("quotes", 4), ("calls", 1)):
        places = result[part]["places"]
        assert [row["name"] for row in result[part]["arms"]] == ["nothing", "passages", "bm25"]
        assert len(places) == count
        assert all(len(place["arms"]) == 3 for place in places)
        for place in places:
            assert place["prompt"] + place["answer"] in (source / place["document"]).read_text()
    # All but the first ones are counted and not written.
    written = [place["arms"]["passages"]["written"] for place in result["quotes"]["places"]]
    assert [text is None for text in written] == [False, False, True, True]
    (call,) = result["calls"]["places"]
    assert call["document"] not in {one["document"] for one in call["arms"]["passages"]["found"]}
    assert find_attachment(model.model) is None


def test_what_is_shown_says_where_it_is_from_and_fits_a_terminal(shown, model, source):
    result, page = shown.result, shown.page
    lines = page.splitlines()
    first, *_ = result["quotes"]["places"]
    start = (source / first["document"]).read_text().index(first["prompt"] + first["answer"])
    before = (source / first["document"]).read_text()[: start + len(first["prompt"])]
    number = before.count("\n") + 1
    assert f"1. {first['document']}, line {number}" in page
    for line in first["prompt"].split("\n"):
        assert f"     \N{BOX DRAWINGS LIGHT VERTICAL} {line}".rstrip() in map(str.rstrip, lines)
    said = " ".join(page.split())
    best = first["arms"]["passages"]["found"][0]
    assert f"from {best['document']} " in said
    assert f"({best['score']:.0%})" in said
    right = first["arms"]["nothing"]["num_right"]
    assert f"without it: {right} of 16 right" in said
    for words in (
        "right of 16",
        "Of 1 calls it completes",
        "all 4, with 95%",
        "all 1, with 95%",
        "similarity",
        "reading on it took",
    ):
        assert words in said
    assert "\N{HORIZONTAL ELLIPSIS}" not in page
    assert "      --prompt 'def one('\n" in page
    # Commands are not broken, so that they can be copied.
    memory = shown.folder / "source.memory"
    assert f"\n  memorizing serve {model.name} \\\n      --memory {memory}\n" in page
    paths = (model.name, str(memory), str(source))
    # What a random model writes is longer where it is escaped.
    assert not [
        one for one in lines if len(one) > 80 and not any(part in one for part in (*paths, "\\x"))
    ]


def test_the_three_lines_do_it(model, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {path.name: path.read_text() for path in source.glob("*.py")}
    given = {
        "memorizing": memorizing,
        "model": model.model,
        "tokenizer": model.tokenizer,
        "documents": texts,
    }
    assert pretrained_story.THREE_LINES.count("\n") == 3
    try:
        exec(compile(pretrained_story.THREE_LINES, "THREE_LINES", "exec"), given)
        assert len(MemoryFolder.open(tmp_path / "mine").documents) == 3
    finally:
        memorizing.remove_memory(model.model)


def test_files_are_drawn_by_the_seed_until_there_are_enough(model, source):
    package, rest = draw_files(model.tokenizer, source, 10**9, 0)
    assert len(package.documents) == 3
    assert not rest
    names = [one.name for one in package.documents]
    package, rest = draw_files(model.tokenizer, source, 1, 0)
    assert [one.name for one in (*package.documents, *rest)] == names
    assert len(rest) == 2


def test_a_model_that_has_no_room_for_passages_is_refused_before_anything_is_written(
    model, source, tmp_path
):
    given = SimpleNamespace(model=make_model("gpt2"), tokenizer=model.tokenizer, name="gpt2")
    for settings in (SETTINGS, {}):
        with pytest.raises(
            ConfigError, match="the model reads 211|the positions that this model has"
        ):
            tell(given, source, tmp_path / "demo", settings=settings)
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_another_origin_is_left_as_it_is(model, source, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="not made by a demo"):
        tell(model, source, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupt_shows_what_is_there_and_ends(model, source, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 6)
    result, page = tell(model, source, tmp_path / "demo")
    assert result["interrupted"]
    assert "calls" not in result
    assert "Does it use it?" not in page
    assert find_attachment(model.model) is None
