"""`memorizing memory`, on memories that the tiny model of conftest.py read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from memorizing.memory.disk import MemoryFolder
from tests.memory.disk.examples import make_folder

MEMORY_WORDS = ("--layers", "1", "--window", "17", "--precision", "fp32", "--set", "read=entries")
NAMES = ["alpha.txt", "beta.txt", "delta.txt", "epsilon.txt", "gamma.txt"]


@pytest.fixture
def copy(memory, tmp_path) -> Path:
    """A memory that may be changed."""
    return Path(shutil.copytree(memory, tmp_path / "copy.memory"))


@pytest.fixture
def read_one(run, llama, tmp_path):
    """Let the tiny model read one document into a memory of its own."""

    def read(memory: str, name: str, text: str, *words: object) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        folder = tmp_path / memory
        given = (tmp_path / name, "--memory", folder, "--prefix", "", *MEMORY_WORDS, *words)
        assert run("read", llama, *given).status == 0
        return folder

    return read


def damage(folder: Path) -> Path:
    """Change a byte in the middle of a memory's first segment."""
    path = sorted(folder.glob("segment-*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_info_says_whose_memory_it_is_and_how_large(run, memory, llama, notes, tmp_path):
    outcome = run("memory", "info", memory, "--json", tmp_path / "info.json")
    assert outcome.status == 0
    values = json.loads((tmp_path / "info.json").read_text())
    num_tokens = sum(len(path.read_bytes()) for path in notes.iterdir())
    assert values["model"] == str(llama)
    assert (values["layers"], values["dtype"], values["settings"]["window"]) == (
        [1],
        "bfloat16",
        17,
    )
    assert (values["documents"], values["texts_kept"], values["tokens"]) == (5, 5, num_tokens)
    assert values["entries"] == num_tokens - 5 * values["settings"]["num_sinks"]
    # Keys and values of one head of 10 numbers, 2 bytes each.
    assert values["bytes_per_entry"] == 2 * 10 * 2
    assert values["bytes"] == sum(path.stat().st_size for path in memory.iterdir())
    assert f"{num_tokens:,}" in outcome.out


def test_list_names_documents_in_the_order_they_were_read(run, memory, notes, tmp_path):
    outcome = run("memory", "list", memory, "--json", tmp_path / "list.json")
    assert outcome.status == 0
    listed = json.loads((tmp_path / "list.json").read_text())["documents"]
    assert [document["name"] for document in listed] == NAMES
    for document, line in zip(listed, outcome.out.splitlines(), strict=False):
        assert document["tokens"] == len((notes / document["name"]).read_bytes())
        assert line.split() == [
            f"{document['tokens']:,}",
            "tokens",
            document["name"],
            *line.split()[3:],
        ]
    assert outcome.out.splitlines()[-1].startswith("5 documents, ")


def test_a_name_that_would_steer_the_terminal_is_escaped(run, read_one):
    folder = read_one("one.memory", "bell\a\nline.txt", "some text, and a little more of it")
    listed = run("memory", "list", folder).out
    assert "bell\\x07\\nline.txt" in listed
    assert "\a" not in listed


def test_forgetting_leaves_the_others(run, copy, memory):
    outcome = run("memory", "forget", copy, "beta.txt", "gamma.txt", "beta.txt")
    assert outcome.status == 0
    assert "forgot 2 documents, " in outcome.out
    assert [one.name for one in MemoryFolder.open(copy).documents] == [
        "alpha.txt", "delta.txt", "epsilon.txt",
    ]  # fmt: skip
    before, after = MemoryFolder.open(memory), MemoryFolder.open(copy)
    assert after.contents.read_text("delta.txt") == before.contents.read_text("delta.txt")
    assert run("memory", "verify", copy).status == 0


def test_a_document_whose_file_name_is_not_utf8_is_forgotten_by_either_of_its_names(
    run, tmp_path, llama
):
    for name in ("caf\udce9.txt", "b\udcff.txt", "plain.txt"):
        (tmp_path / "notes" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "notes" / name).write_text(f"{ascii(name)} and some more of it")
    folder = tmp_path / "notes.memory"
    assert run("read", llama, tmp_path / "notes", "--memory", folder, *MEMORY_WORDS).status == 0
    assert run("memory", "forget", folder, "caf\udce9.txt", "b\\udcff.txt").status == 0
    assert [one.name for one in MemoryFolder.open(folder).documents] == ["plain.txt"]


def test_forgetting_a_name_that_is_not_there_forgets_nothing(run, copy):
    outcome = run("memory", "forget", copy, "alpha.txt", "betta.txt")
    assert outcome.status == 2
    assert "did you mean 'beta.txt'" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert len(MemoryFolder.open(copy).documents) == 5


def test_forgetting_everything_leaves_an_empty_memory(run, copy):
    assert run("memory", "forget", copy, *NAMES).status == 0
    outcome = run("memory", "list", copy)
    assert outcome.status == 0
    assert outcome.out.startswith("0 documents, 0 tokens, 0 entries")


def test_merging_keeps_every_document_once_and_the_sources(run, read_one, tmp_path):
    first = read_one("first.memory", "one.txt", "the first text, which both hold")
    shared = read_one("second.memory", "one.txt", "the first text, which both hold")
    second = read_one("second.memory", "two.txt", "the second text, of the second alone")
    assert shared == second
    out, path = tmp_path / "both.memory", tmp_path / "both.json"
    outcome = run("memory", "merge", first, second, "--out", out, "--json", path)
    assert outcome.status == 0
    assert "2 documents, " in outcome.out
    assert json.loads(path.read_text())["documents"] == 2
    assert len(MemoryFolder.open(first).documents) == 1
    assert run("memory", "verify", out).status == 0


def test_merging_memories_that_are_read_differently_asks_whose_settings(run, read_one, tmp_path):
    first = read_one("first.memory", "one.txt", "the first text")
    words = ("--set", "num_neighbors=7")
    second = read_one("second.memory", "two.txt", "the second text", *words)
    merge = ("memory", "merge", first, second, "--out", tmp_path / "both.memory")
    outcome = run(*merge)
    assert outcome.status == 2
    assert "num_neighbors 32 and 7" in outcome.err
    assert "--settings-of" in outcome.err
    assert not (tmp_path / "both.memory").exists()
    assert run(*merge, "--settings-of", second).status == 0
    settings = MemoryFolder.open(tmp_path / "both.memory").description.settings
    assert settings["memory"]["num_neighbors"] == 7
    assert settings["tokenizer"]


def test_merging_memories_of_two_models_is_refused(run, read_one, other_llama, tmp_path):
    first = read_one("first.memory", "one.txt", "the first text")
    second = tmp_path / "second.memory"
    given = (tmp_path / "one.txt", "--memory", second, *MEMORY_WORDS)
    assert run("read", other_llama, *given).status == 0
    outcome = run("memory", "merge", first, second, "--out", tmp_path / "both.memory")
    assert outcome.status == 2
    assert "fingerprint" in outcome.err
    assert not (tmp_path / "both.memory").exists()


def test_merging_into_a_folder_that_holds_something_is_refused(run, copy, memory):
    outcome = run("memory", "merge", memory, "--out", copy)
    assert outcome.status == 2
    assert "holds a memory already" in outcome.err


def test_merging_by_settings_of_another_memory_is_refused(run, copy, memory, tmp_path):
    words = ("--out", tmp_path / "out", "--settings-of", copy)
    outcome = run("memory", "merge", memory, *words)
    assert outcome.status == 2
    assert "not among the memories" in outcome.err


def test_verifying_names_what_was_altered(run, copy):
    assert "is whole: 2 files" in run("memory", "verify", copy).out
    path = damage(copy)
    outcome = run("memory", "verify", copy)
    assert outcome.status == 2
    assert path.name in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("verb", ["info", "list", "verify"])
def test_a_truncated_memory_is_refused_by_every_verb(run, copy, verb):
    path = sorted(copy.glob("segment-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    outcome = run("memory", verb, copy)
    assert outcome.status == 2
    assert "cut off or altered" in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("verb", ["info", "list", "verify", "forget", "merge"])
def test_a_folder_without_a_memory_is_refused_by_every_verb(run, tmp_path, verb):
    more = {"forget": ["name"], "merge": ["--out", tmp_path / "out"]}.get(verb, [])
    outcome = run("memory", verb, tmp_path / "none", *more)
    assert outcome.status == 2
    assert "holds no memory" in outcome.err
    assert not (tmp_path / "none").exists()


def test_a_memory_that_is_being_written_is_not_forgotten_from(run, copy):
    with MemoryFolder.open(copy).lock():
        outcome = run("memory", "forget", copy, "alpha.txt")
        assert run("memory", "list", copy).status == 0
    assert outcome.status == 2
    assert "is being written by process" in outcome.err


def test_no_verb_of_memories_loads_a_model(run, copy, monkeypatch):
    from transformers import PreTrainedModel

    def refuse(*words, **named):
        raise AssertionError("a model was made")

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
    assert run("memory", "info", copy).status == 0
    assert run("memory", "forget", copy, "alpha.txt").status == 0
    assert run("memory", "merge", copy, "--out", copy.with_name("packed.memory")).status == 0


def test_a_mistyped_verb_is_one_line(run):
    outcome = run("memory", "lost", "x")
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("settings", ["x", [1], 7])
def test_settings_that_nobody_writes_are_one_line_of_a_merge(run, settings, tmp_path):
    # With a checksum that is right, as its author can make it.
    folder = make_folder(tmp_path / "one", ["a"])
    description = replace(folder.description, settings={"memory": settings})
    other = MemoryFolder.create(tmp_path / "other", description)
    outcome = run("memory", "merge", folder.path, other.path, "--out", tmp_path / "both")
    assert outcome.status == 2
    assert "none that memorizing writes" in outcome.err
    assert not (tmp_path / "both").exists()
