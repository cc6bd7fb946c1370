"""`memorizing read`, with the tiny model of conftest.py."""

import json
from pathlib import Path

import pytest

from memorizing.memory.disk import MemoryFolder
from tests.memory.disk.examples import edit_manifest

MEMORY_WORDS = ("--layers", "1", "--window", "17", "--precision", "fp32", "--set", "read=entries")
FP32 = ("--precision", "fp32")
NUM_SINKS = 4


def list_names(folder: Path) -> list[str]:
    return [document.name for document in MemoryFolder.open(folder).documents]


def dump_entries(folder: Path) -> dict[str, list]:
    """Keys of every document, to compare memories whatever their segments are."""
    memory = MemoryFolder.open(folder)
    (block,) = memory.open_layer(1).blocks
    keys = block.load().keys[0]
    return {
        document.name: keys[:, document.first_entry : document.entries.stop].tolist()
        for document in memory.documents
    }


class Interrupt:
    """Presses Ctrl-C at a call of the tiny model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
        from transformers import LlamaModel

        forward = LlamaModel.forward
        self.num_calls = 0

        def count(model, *words, **named):
            self.num_calls += 1
            if self.num_calls == at_call:
                raise KeyboardInterrupt
            return forward(model, *words, **named)

        monkeypatch.setattr(LlamaModel, "forward", count)


def test_the_layer_that_is_taken_by_default_is_not_said_to_be_chosen_by_the_model(
    run, llama, notes, tmp_path
):
    for verb in ("read", "finetune"):
        text = " ".join(run(verb, "--help").out.split())
        assert "Default: one, at 3/5 of the depth." in text
        assert "chosen" not in text
    memory = tmp_path / "default.memory"
    said = [run("read", llama, notes, "--memory", memory, "--window", "17", *FP32)]
    said.append(run("memory", "info", memory))
    words = ("--memory", memory, "--prompt", "alpha", "--max-new-tokens", "1", "--sources", *FP32)
    said.append(run("generate", llama, *words))
    assert [outcome.status for outcome in said] == [0, 0, 0]
    # 3/5 of three layers, counted from 0.
    assert f"memory: {memory} of layers 1; " in said[0].err
    assert not any("chosen" in outcome.out + outcome.err for outcome in said)


def test_a_folder_is_read_by_path_and_what_is_no_text_is_counted(run, llama, tree, tmp_path):
    memory, path = tmp_path / "tree.memory", tmp_path / "read.json"
    words = ("--exclude", "node_modules", "--max-file-mib", "0.0003", "--json", path)
    outcome = run("read", llama, tree, "--memory", memory, *MEMORY_WORDS, *words)
    assert outcome.status == 0
    assert list_names(memory) == ["a/first.md", "b.py"]
    values = json.loads(path.read_text())
    assert sorted((item["name"], item["reason"]) for item in values["left_out"]) == [
        (".git", "hidden"),
        (".hidden", "hidden"),
        ("__pycache__", "byte code"),
        ("a/latin.txt", "not UTF-8"),
        ("a/long.csv", "larger than 0.0003 MiB"),
        ("a/nothing.txt", "empty"),
        ("a/picture.png", "binary"),
        ("node_modules", "excluded"),
    ]
    assert "left out: 2 hidden, " in outcome.err
    num_tokens = sum(len((tree / name).read_bytes()) for name in list_names(memory))
    assert values["read"]["documents"] == values["total"]["documents"] == 2
    assert values["read"]["tokens"] == num_tokens
    assert values["read"]["entries"] == num_tokens - 2 * NUM_SINKS
    assert values["total"]["bytes"] == sum(one.stat().st_size for one in memory.iterdir())
    assert f"read 2 documents, {num_tokens} tokens, {num_tokens - 8} entries, " in outcome.out
    assert "KiB on disk" in outcome.out


def test_the_memory_is_what_the_library_reads(run, memory, llama, notes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memorizing import add_memory, open_memory

    model = add_memory(AutoModelForCausalLM.from_pretrained(llama), [1], window=17, read="entries")
    documents = [(path.name, path.read_text()) for path in sorted(notes.iterdir())]
    copy = memory.with_name("library.memory")
    with open_memory(model, copy) as session:
        session.read(AutoTokenizer.from_pretrained(llama), documents, progress=False)
    assert dump_entries(copy) == dump_entries(memory)


def test_the_same_command_again_reads_nothing(run, memory, llama, notes):
    before = (memory / "manifest.json").read_bytes()
    outcome = run("read", llama, notes, "--memory", memory, *FP32)
    assert outcome.status == 0
    assert "read 0 documents, 0 tokens, 0 entries" in outcome.out
    assert "5 were there already" in outcome.out
    assert (memory / "manifest.json").read_bytes() == before


def test_ctrl_c_keeps_what_was_read_whole_and_the_same_command_goes_on(
    run, llama, notes, memory, tmp_path, monkeypatch
):
    folder, path = tmp_path / "some.memory", tmp_path / "read.json"
    words = ("read", llama, notes, "--memory", folder, "--keep-text", *MEMORY_WORDS)
    num_calls = [-(-len(one.read_bytes()) // 17) for one in sorted(notes.iterdir())]
    with monkeypatch.context() as patch:
        Interrupt(patch, sum(num_calls[:2]) + 3)
        outcome = run(*words, "--json", path)
    assert outcome.status == 130
    assert "the same command goes on" in outcome.err
    assert "read 2 documents, " in outcome.out
    assert list_names(folder) == ["alpha.txt", "beta.txt"]
    assert json.loads(path.read_text())["interrupted"] is True
    assert run("memory", "verify", folder).status == 0
    outcome = run(*words)
    assert outcome.status == 0
    assert "read 3 documents, " in outcome.out
    assert "2 were there already" in outcome.out
    assert dump_entries(folder) == dump_entries(memory)


def test_ctrl_c_in_the_first_document_leaves_a_memory_to_go_on_with(
    run, llama, notes, tmp_path, monkeypatch
):
    words = ("read", llama, notes, "--memory", tmp_path / "none.memory", *MEMORY_WORDS)
    # As a writer leaves it that was killed when it made the folder.
    (tmp_path / "none.memory").mkdir()
    (tmp_path / "none.memory" / "lock").touch()
    with monkeypatch.context() as patch:
        Interrupt(patch, 1)
        assert run(*words).status == 130
    assert run(*words).status == 0
    assert len(list_names(tmp_path / "none.memory")) == 5


def test_a_document_that_changed_is_read_again_only_when_asked(
    run, llama, tree, tmp_path, monkeypatch
):
    memory, fresh = tmp_path / "tree.memory", tmp_path / "fresh.memory"
    words = ("read", llama, tree, "--exclude", "node_modules", *MEMORY_WORDS, "--memory")
    assert run(*words, memory).status == 0
    before = dump_entries(memory)
    (tree / "b.py").write_text("def second(x):\n    return 3 * x  # three\n")
    outcome = run(*words, memory)
    assert outcome.status == 2
    assert "b.py" in outcome.err
    assert "--update" in outcome.err
    assert dump_entries(memory) == before
    # A document is not forgotten before its new text was read.
    with monkeypatch.context() as patch:
        Interrupt(patch, 1)
        assert run(*words, memory, "--update").status == 130
    assert dump_entries(memory) == before
    outcome = run(*words, memory, "--update")
    assert outcome.status == 0
    assert "1 of them again" in outcome.err
    assert "read 1 documents, " in outcome.out
    assert run(*words, fresh).status == 0
    assert dump_entries(memory) == dump_entries(fresh)
    assert dump_entries(memory) != before


def test_what_a_memory_itself_consists_of_is_not_read(run, llama, tree):
    words = ("read", llama, tree, "--memory", tree / "own.memory", *MEMORY_WORDS)
    assert run(*words).status == 0
    outcome = run(*words)
    assert outcome.status == 0
    assert "own.memory: memory" in outcome.err
    assert "read 0 documents" in outcome.out


def test_settings_are_those_of_the_memory_that_is_there(run, memory, llama, notes):
    for words, said in (
        (("--layers", "2"), "layers = [1], and [2]"),
        (("--window", "19"), "window = 17, and 19"),
        (("--dtype", "int8"), "dtype = bfloat16, and int8"),
        (("--set", "num_neighbors=3"), "num_neighbors = 32, and 3"),
    ):
        outcome = run("read", llama, notes, "--memory", memory, *words)
        assert outcome.status == 2
        assert said in outcome.err
    words = ("--layers", "1", "--window", "17", "--set", "num_neighbors=32")
    assert run("read", llama, notes, "--memory", memory, *words, *FP32).status == 0


@pytest.mark.parametrize("is_older", [False, True])
def test_the_settings_that_a_memory_was_made_with_may_be_given_again(
    run, llama, notes, tmp_path, is_older
):
    memory = tmp_path / "notes.memory"
    words = ("read", llama, notes, "--memory", memory, *MEMORY_WORDS)
    assert run(*words).status == 0
    if is_older:  # than passages: it does not say what is read
        edit_manifest(memory, lambda values: values["settings"]["memory"].pop("read"))
    assert run(*words, "--set", "keep=text", "--set", "num_neighbors=32").status == 0
    refused = run(*words[:-1], "read=passages")
    assert refused.status == 2
    assert "was made with read = entries, and passages is asked for" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "num_neighbours=3"), "did you mean 'num_neighbors'"),
        (("--set", "window=3"), "write --window 3"),
        (("--set", "num_neighbors"), "setting of a memory"),
        (("--set", "temperature=0"), "temperature is 0"),
        (("--layers", "3"), "layers is [3]"),
        (("--layers", "one"), "whole numbers"),
        (("--window", "4096"), "window is 4096"),
        (("--device", "cuda:77"), "--device is 'cuda:77'"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(run, llama, tree, tmp_path, words, said):
    outcome = run("read", llama, tree, "--memory", tmp_path / "m", *FP32, *words)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "m").exists()


def test_entries_in_eight_bits_are_smaller_and_readable(run, memory, llama, notes, tmp_path):
    small = tmp_path / "small.memory"
    words = ("--memory", small, "--dtype", "int8", *MEMORY_WORDS)
    assert run("read", llama, notes, *words).status == 0
    # Keys and values of 10 numbers: a byte each, and a factor of 4 bytes for each vector.
    assert MemoryFolder.open(small).description.bytes_per_entry == 2 * (10 + 4)
    words = ("--memory", small, "--prompt", "alpha", "--max-new-tokens", "3", *FP32)
    assert run("generate", llama, *words).status == 0
