"""`memorizing read` and `memorizing generate`, with the tiny model of conftest.py."""

import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from memorizing.memory.disk import MemoryFolder

MEMORY_WORDS = ("--layers", "1", "--window", "17", "--precision", "fp32")
FP32 = ("--precision", "fp32")
NUM_SINKS = 4


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

    model = add_memory(AutoModelForCausalLM.from_pretrained(llama), [1], window=17)
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


def test_files_are_named_as_given_and_read_once(run, llama, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree)
    memory = tmp_path / "tree.memory"
    given = ("./b.py", "a/first.md", "*.py", "**/*.md", tree / "b.py", "node_modules")
    assert run("read", llama, *given, "--memory", memory, *MEMORY_WORDS).status == 0
    assert list_names(memory) == ["b.py", "a/first.md", "x.js"]


def test_a_prefix_tells_two_folders_apart(run, llama, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"what {name} is about")
    memory = tmp_path / "both.memory"
    words = ("--memory", memory, *MEMORY_WORDS)
    outcome = run("read", llama, tmp_path / "one", tmp_path / "two", *words)
    assert outcome.status == 2
    assert "'README.md'" in outcome.err
    assert not memory.exists()
    for name in ("one", "two"):
        given = (tmp_path / name, "--prefix", f"{name}/", *words)
        assert run("read", llama, *given).status == 0
    assert list_names(memory) == ["one/README.md", "two/README.md"]


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_a_document_with_a_name(run, llama, tree, tmp_path, monkeypatch):
    memory = tmp_path / "in.memory"
    words = ("--memory", memory, *MEMORY_WORDS)
    give_stdin(monkeypatch, b"what a pipe says")
    outcome = run("read", llama, "-", *words)
    assert outcome.status == 2
    assert "--name" in outcome.err
    outcome = run("read", llama, tree / "b.py", "--name", "pipe", *words)
    assert outcome.status == 2
    assert "which is not read" in outcome.err
    assert run("read", llama, "-", "--name", "pipe", "--keep-text", *words).status == 0
    assert MemoryFolder.open(memory).contents.read_text("pipe") == "what a pipe says"
    give_stdin(monkeypatch, b"\xff")
    outcome = run("read", llama, "-", "--name", "other", *words)
    assert outcome.status == 2
    assert "not UTF-8" in outcome.err


def test_what_cannot_be_read_is_left_out(run, llama, tree, tmp_path):
    (tree / "gone.txt").symlink_to(tree / "nowhere.txt")
    os.mkfifo(tree / "pipe.txt")
    outcome = run("read", llama, tree, "--memory", tmp_path / "m", *MEMORY_WORDS)
    assert outcome.status == 0
    assert "1 no plain file" in outcome.err
    assert "1 cannot be read (No such file or directory)" in outcome.err


def test_a_file_without_permission_is_left_out(run, llama, tree, tmp_path, monkeypatch):
    system_open = os.open

    def refuse(path, *words, **named):
        if str(path).endswith("b.py"):
            raise PermissionError(13, "Permission denied", str(path))
        return system_open(path, *words, **named)

    monkeypatch.setattr("os.open", refuse)
    outcome = run("read", llama, tree, "--memory", tmp_path / "m", *MEMORY_WORDS)
    assert outcome.status == 0
    assert "1 cannot be read (Permission denied)" in outcome.err
    assert "b.py" not in list_names(tmp_path / "m")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a/picture.png", "a/nothing.txt"], "left out were 1 binary, 1 empty"),
        (["none.txt"], "does not exist"),
        (["*.rs"], "matches no file"),
        ([".git/hooks"], "does not exist"),
    ],
)
def test_nothing_to_read_is_one_line_and_makes_no_memory(
    run, llama, tree, tmp_path, monkeypatch, given, said
):
    monkeypatch.chdir(tree)
    outcome = run("read", llama, *given, "--memory", tmp_path / "m", *MEMORY_WORDS)
    assert outcome.status == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "m").exists()


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


def make_damaged_copy(memory: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(memory, tmp_path / "damaged.memory"))
    path = next(folder.glob("segment-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    return folder


def test_a_model_that_is_not_there_is_one_line(run, tmp_path, tree, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))

    def fail(self, name, **words):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    (tmp_path / "file.gguf").write_text("x")
    (tmp_path / "empty").mkdir()
    for model, said in (
        (tmp_path / "none", "there is no folder"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "file.gguf", "is a file"),
        ("nobody/such-a-model", "no route to the hub"),
        ("not a name", "is no name on the hub"),
    ):
        outcome = run("read", model, tree, "--memory", tmp_path / "m", *FP32)
        assert outcome.status == 2
        assert said in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert run("generate", model, "--prompt", "x", *FP32).status == 2
    assert not (tmp_path / "m").exists()


def test_a_model_in_the_cache_of_the_hub_needs_no_network(run, llama, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123abcd")
    shutil.copytree(llama, cache / "snapshots" / "0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*words, **named):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    words = ("--prompt", "alpha", "--max-new-tokens", "3", *FP32)
    outcome = run("generate", "someone/tiny", *words)
    assert outcome.status == 0, outcome.err
    assert outcome.out == run("generate", llama, *words).out


def test_weights_that_are_missing_are_not_drawn_at_random(run, llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(llama, tmp_path / "partial"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    outcome = run("generate", folder, "--prompt", "x", *FP32)
    assert outcome.status == 2
    assert "model.layers.1.mlp.up_proj.weight" in outcome.err
    (folder / "model.safetensors").write_bytes(b"cut off")
    outcome = run("generate", folder, "--prompt", "x", *FP32)
    assert outcome.status == 2
    assert "cannot be loaded" in outcome.err


def test_a_model_without_its_tokenizer_is_refused(run, llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "dumb"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    outcome = run("generate", folder, "--prompt", "x", *FP32)
    assert outcome.status == 2
    assert "the tokenizer in" in outcome.err


def test_the_memory_of_another_model_is_refused(run, memory, other_llama, notes):
    for words in (
        ("read", other_llama, notes, "--memory", memory),
        ("generate", other_llama, "--prompt", "alpha", "--memory", memory),
    ):
        outcome = run(*words, *FP32)
        assert outcome.status == 2
        assert "use the model that wrote it" in outcome.err
        assert outcome.out == ""


def test_a_damaged_memory_is_refused_before_it_is_used(run, memory, llama, notes, tmp_path):
    damaged = make_damaged_copy(memory, tmp_path)
    words = ("--prompt", "a prompt that is longer than the window", "--memory", damaged)
    outcome = run("generate", llama, *words, *FP32)
    assert outcome.status == 2
    assert "was altered" in outcome.err
    assert outcome.out.strip() == ""
    (damaged / "manifest.json").write_text("{}")
    for verb in (("generate", llama, "--prompt", "x"), ("read", llama, notes)):
        outcome = run(*verb, "--memory", damaged)
        assert outcome.status == 2
        assert "is refused" in outcome.err
        assert len(outcome.err.splitlines()) == 1


def test_a_place_that_is_no_memory_is_refused(run, llama, tree, tmp_path):
    for place, said in ((tree / "b.py", "is a file"), (tree, "holds no memory")):
        outcome = run("read", llama, tree, "--memory", place, *FP32)
        assert outcome.status == 2
        assert said in outcome.err
    outcome = run("generate", llama, "--memory", tmp_path / "none", "--prompt", "x")
    assert outcome.status == 2
    assert "holds no memory" in outcome.err


def test_a_memory_that_is_being_written_is_not_read_into(run, memory, llama, notes, tmp_path):
    folder = Path(shutil.copytree(memory, tmp_path / "busy.memory"))
    (tmp_path / "new.txt").write_text("something new to read")
    with MemoryFolder.open(folder).lock():
        outcome = run("read", llama, tmp_path / "new.txt", "--memory", folder, *FP32)
        words = ("--memory", folder, "--prompt", "alpha", "--max-new-tokens", "1")
        assert run("generate", llama, *words, *FP32).status == 0
    assert outcome.status == 2
    assert "is being written by process" in outcome.err


PROMPT = "alpha 3 ahpla; a prompt that is a good deal longer than the window of 17"


def generate_by_library(llama: Path, memory: Path | None, num_tokens: int) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memorizing import add_memory, open_memory

    model = AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    words = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    if memory is None:
        add_memory(model, [1], window=17)
        tokens = model.generate(**inputs, **words)
    else:
        with open_memory(model, memory):
            tokens = model.generate(**inputs, **words)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generating_streams_what_the_library_generates(run, memory, llama, tmp_path):
    words = ("--prompt", PROMPT, "--max-new-tokens", "23", *FP32)
    path = tmp_path / "text.json"
    with_memory = run("generate", llama, "--memory", memory, *words, "--json", path)
    assert with_memory.status == 0
    assert with_memory.out == generate_by_library(llama, memory, 23) + "\n"
    values = json.loads(path.read_text())
    assert values["text"] + "\n" == with_memory.out
    assert (values["prompt_tokens"], values["new_tokens"]) == (len(PROMPT), 23)
    closed = run("generate", llama, "--memory", memory, "--no-memory", *words)
    plain = run("generate", llama, "--window", "17", *words)
    assert closed.out == plain.out == generate_by_library(llama, None, 23) + "\n"
    assert plain.out != with_memory.out


def test_without_memory_and_within_the_window_it_is_the_model_itself(run, llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    # The window is half of the 128 positions of this model.
    prompt = PROMPT[:47]
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=13, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
    outcome = run("generate", llama, "--prompt", prompt, "--max-new-tokens", "13", *FP32)
    assert outcome.out == text + "\n"


def test_sources_are_documents_with_shares_and_the_text_around(run, memory, llama, tmp_path):
    path = tmp_path / "text.json"
    words = ("--memory", memory, "--prompt", PROMPT, "--max-new-tokens", "5", "--sources")
    outcome = run("generate", llama, *words, "--json", path, *FP32)
    assert outcome.status == 0
    assert "sources, by their share of attention" in outcome.err
    values = json.loads(path.read_text())["sources"]
    shares = [document["share"] for document in values["documents"]]
    assert sum(shares) + values["this_text"] == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    best = values["documents"][0]
    assert f"{best['share']:.1%}  {best['name']}" in outcome.err
    text = MemoryFolder.open(memory).contents.read_text(best["name"])
    for place in best["places"]:
        assert place["before"] + place["token"] + place["after"] in text
        assert 0 < place["share"] <= best["share"]
        assert f"«{place['token']}»" in outcome.err


def test_sources_without_kept_texts_are_names_alone(run, llama, notes, tmp_path):
    memory = tmp_path / "bare.memory"
    assert run("read", llama, notes, "--memory", memory, *MEMORY_WORDS).status == 0
    words = ("--memory", memory, "--prompt", PROMPT, "--max-new-tokens", "2", "--sources")
    outcome = run("generate", llama, *words, *FP32)
    assert outcome.status == 0
    assert ".txt" in outcome.err
    assert "«" not in outcome.err


def test_an_empty_memory_can_be_generated_with(run, memory, llama, tmp_path):
    folder = Path(shutil.copytree(memory, tmp_path / "empty.memory"))
    assert run("memory", "forget", folder, *list_names(folder)).status == 0
    words = ("--memory", folder, "--prompt", "alpha", "--max-new-tokens", "3", "--sources")
    outcome = run("generate", llama, *words, *FP32)
    assert outcome.status == 0
    assert "nothing was retrieved" in outcome.err


def test_sampling_is_by_the_seed(run, llama):
    words = ("--prompt", PROMPT, "--max-new-tokens", "17", "--temperature", "1.5", *FP32)
    first, again, other = (
        run("generate", llama, *words, "--top-p", "0.9", "--seed", seed).out for seed in (3, 3, 5)
    )
    assert first == again
    assert first != other


def test_a_models_own_settings_of_sampling_do_not_count(run, llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "hot"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "top_k": 3, "max_length": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    words = ("--prompt", PROMPT, "--max-new-tokens", "17", *FP32)
    hot, cold = run("generate", folder, *words), run("generate", llama, *words)
    assert hot.out == cold.out
    assert hot.err.replace(str(folder), "").count("\n") == cold.err.count("\n")


def test_a_prompt_can_come_from_a_file_or_standard_input(run, llama, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    words = ("generate", llama, "--max-new-tokens", "5", *FP32)
    expected = run(*words, "--prompt", PROMPT).out
    assert run(*words, "--prompt-file", tmp_path / "prompt.txt").out == expected
    give_stdin(monkeypatch, PROMPT.encode())
    assert run(*words, "--prompt-file", "-").out == expected


def test_a_chat_is_put_as_the_model_was_taught(run, llama, tmp_path):
    words = ("--chat", "--prompt", "Why?", "--max-new-tokens", "3", *FP32)
    outcome = run("generate", llama, *words)
    assert outcome.status == 2
    assert "no template of chats" in outcome.err
    folder = Path(shutil.copytree(llama, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    )
    outcome = run("generate", folder, *words, "--json", tmp_path / "chat.json")
    assert outcome.status == 0
    asked = len("[user] Why?\n[assistant] ")
    assert json.loads((tmp_path / "chat.json").read_text())["prompt_tokens"] == asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give a prompt"),
        (("--prompt", "x", "--prompt-file", "y"), "give a prompt"),
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt-file", "none.txt"), "No such file"),
        (("--prompt", "x", "--sources"), "no memory is read"),
        (("--prompt", "x", "--no-memory"), "without --memory"),
        (("--prompt", "x", "--top-p", "0.5"), "add --temperature"),
        (("--prompt", "x", "--temperature", "1", "--top-p", "0"), "--top-p is 0.0"),
        (("--prompt", "x", "--memory", "m", "--window", "3"), "--window is given"),
        (("--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
    ],
)
def test_options_that_say_nothing_together_are_one_line(run, llama, words, said):
    outcome = run("generate", llama, *words)
    assert outcome.status == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert outcome.out == ""


def test_ctrl_c_while_generating_keeps_the_text_so_far(run, llama, tmp_path, monkeypatch):
    path = tmp_path / "text.json"
    words = ("--prompt", "alpha", "--max-new-tokens", "29", *FP32)
    with monkeypatch.context() as patch:
        calls = Interrupt(patch, -1)
        whole = run("generate", llama, *words).out
    with monkeypatch.context() as patch:
        # The last of 29 calls writes the last token.
        Interrupt(patch, calls.num_calls - 17)
        outcome = run("generate", llama, *words, "--json", path)
    assert outcome.status == 130
    values = json.loads(path.read_text())
    assert values["new_tokens"] == 11
    assert values["interrupted"] is True
    assert whole.startswith(values["text"].rstrip("\N{REPLACEMENT CHARACTER}"))
    assert outcome.out == values["text"] + "\n"


def test_an_adapter_is_read_and_generated_with(run, llama, notes, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from memorizing import add_memory
    from memorizing.huggingface.attaching.attachment import get_attachment
    from memorizing.huggingface.learning.adapter import save_adapter

    model = add_memory(AutoModelForCausalLM.from_pretrained(llama), [1], window=17)
    with torch.no_grad():
        get_attachment(model).layers[1].bias += 1.5
    adapter, memory = tmp_path / "adapter", tmp_path / "adapted.memory"
    save_adapter(model, adapter)
    outcome = run("read", llama, notes, "--memory", memory, "--adapter", adapter, *FP32)
    assert outcome.status == 0, outcome.err
    words = ("--memory", memory, "--prompt", PROMPT, "--max-new-tokens", "13", *FP32)
    adapted = run("generate", llama, *words, "--adapter", adapter)
    assert adapted.status == 0, adapted.err
    # The memory keeps gates and scales, so that it is read as it was made.
    assert run("generate", llama, *words).out == adapted.out
    words = ("--memory", tmp_path / "m", "--adapter", adapter, "--window", "19", *FP32)
    outcome = run("read", llama, notes, *words)
    assert outcome.status == 2
    assert "window" in outcome.err


def test_calibration_chooses_layers_and_heads(run, llama, tmp_path):
    letters = random.Random(0).choices("abcdefgh ", k=300)
    (tmp_path / "long.txt").write_text("".join(letters))
    words = ("read", llama, tmp_path / "long.txt", "--calibrate", "--window", "17", *FP32)
    memory, path = tmp_path / "found.memory", tmp_path / "info.json"
    outcome = run(*words, "--memory", memory)
    assert outcome.status == 0, outcome.err
    assert "calibrated: layer " in outcome.err
    assert run("memory", "info", memory, "--json", path).status == 0
    layers = json.loads(path.read_text())["layers"]
    assert f"of layers {', '.join(map(str, layers))};" in outcome.err
    again = run(*words, "--memory", memory)
    assert again.status == 0
    assert "calibrating on" not in again.err
    assert run(*words, "--memory", memory, "--layers", "1").status == 2
    (tmp_path / "long.txt").write_text("too short")
    outcome = run(*words, "--memory", tmp_path / "none.memory")
    assert outcome.status == 2
    assert "tokens is 9" in outcome.err
    assert not (tmp_path / "none.memory").exists()


DOCS = Path(__file__).parents[2] / "docs" / "how-to-read-a-repository.md"


def find_block(language: str) -> str:
    return DOCS.read_text(encoding="utf-8").split(f"```{language}\n")[1].partition("```")[0]


def test_the_documented_commands_run(run, llama, notes, tmp_path, monkeypatch):
    import shlex

    monkeypatch.chdir(tmp_path)
    names = {"HuggingFaceTB/SmolLM2-135M": str(llama), "my_repository": str(notes)}
    lines = find_block("sh").splitlines()
    for line in lines:
        program, *words = [names.get(word, word) for word in shlex.split(line)]
        assert program == "memorizing"
        # The tiny model has fewer positions than the window that is the default.
        quick = {"read": MEMORY_WORDS, "generate": ("--max-new-tokens", "3", *FP32)}
        outcome = run(*words, *quick.get(words[0], ()))
        assert outcome.status == 0, outcome.err
    assert "alpha.txt" in outcome.out
    assert len(lines) == 3


def test_the_documented_python_runs(llama, notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = find_block("python").replace("HuggingFaceTB/SmolLM2-135M", str(llama))
    code = code.replace("my_repository", str(notes)).replace(
        "_memory(model)", "_memory(model, window=17)"
    )
    names: dict = {}
    exec(compile(code, str(DOCS), "exec"), names)
    assert names["tokens"].shape[1] > len("def load_config(")
    assert len(list_names(tmp_path / "repo.memory")) == 5


def test_the_example_reads_and_answers(llama, notes, tmp_path):
    folder = shutil.copytree(notes, tmp_path / "notes")
    example = DOCS.parents[1] / "examples" / "ask_a_repository.py"
    code = example.read_text(encoding="utf-8").replace(
        "_memory(model)", "_memory(model, window=17)"
    )
    names: dict = {"__name__": "example"}
    exec(compile(code, str(example), "exec"), names)
    names["main"](str(llama), str(folder), "what is alpha?")
    assert len(list_names(tmp_path / "notes.memory")) == 5
