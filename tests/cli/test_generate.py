"""`memorizing generate`, with the tiny model of conftest.py."""

import json
import random
import shutil
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memorizing.cli.generate import print_passages
from memorizing.huggingface.attaching.attachment import list_open_heads
from memorizing.huggingface.loading import load_pretrained
from memorizing.huggingface.sessions.sources import Source
from memorizing.memory.disk import MemoryFolder
from tests.cli.test_read import FP32, MEMORY_WORDS, Interrupt, list_names
from tests.cli.test_reading_plan import give_stdin

PROMPT = "alpha 3 ahpla; a prompt that is a good deal longer than the window of 17"


def generate_by_library(llama: Path, memory: Path | None, num_tokens: int) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memorizing import add_memory, open_memory

    model = AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    words = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    if memory is None:
        add_memory(model, [1], window=17, read="entries")
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
    places = [place for place in values["places"] if place["document"] == best["name"]]
    assert places
    for place in places:
        token = place["text"][slice(*place["focus"])]
        assert place["text"] in text
        assert 0 < place["weight"] <= best["share"]
        assert token in text.splitlines(keepends=True)[place["first_line"] - 1]
        assert f"{place['first_line']}: " in outcome.err
        assert f"«{token}»" in outcome.err
    assert values["passages"] == []


@pytest.mark.parametrize("keep", ["text", "entries"])
def test_passages_are_read_where_a_memory_was_made_for_them(run, llama, notes, tmp_path, keep):
    path, made = tmp_path / "text.json", tmp_path / "passages"
    settings = ("read=passages", "num_passages=2", "passage_len=11", f"keep={keep}")
    words = [word for setting in settings for word in ("--set", setting)]
    layers = ("--layers", "1", "--window", "17", "--keep-text", *words)
    read = run("read", llama, notes, "--memory", made, *layers, *FP32)
    assert read.status == 0
    # What the text itself has behind its window may take a passage's place.
    prompt = "alpha 3 ahpla;"
    asked = ("--prompt", prompt, "--max-new-tokens", "5", "--sources", "--json", path)
    outcome = run("generate", llama, "--memory", made, *asked, *FP32)
    assert outcome.status == 0
    values = json.loads(path.read_text())
    shares = [document["share"] for document in values["sources"]["documents"]]
    assert sum(shares) == pytest.approx(1)
    passages = values["sources"]["passages"]
    assert passages
    assert values["sources"]["places"] == []
    for one in passages:
        text = MemoryFolder.open(made).contents.read_text(one["document"])
        assert one["text"] in text
        lines = f"{one['document']}, lines {one['first_line']}-{one['last_line']}\n"
        assert f"{one['weight']:6.1%}  {lines}" in outcome.err
    assert "passages in sight from the start, best one first" in outcome.err
    assert run("memory", "info", made, "--json", path).status == 0
    info = json.loads(path.read_text())
    is_all = keep == "entries"
    assert info["layers"] == ([0, 1, 2] if is_all else [1])
    assert info["settings"].get("layers") == ([1] if is_all else None)
    refused = run("read", llama, notes, "--memory", made, "--set", "read=entries", *FP32)
    assert refused.status == 2
    assert "read = passages, and entries is asked for" in refused.err


def test_heads_that_find_are_kept_with_the_folder(run, llama, notes, tmp_path):
    made = tmp_path / "passages"
    words = ("read", llama, notes, "--memory", made, "--set", "read=passages", *FP32)
    words += ("--window", "17", "--set", "num_passages=2", "--set", "passage_len=11")
    for heads, said in (("1:2", "heads[1] is [2]"), ("3:0", "layers is [3]")):
        outcome = run(*words, "--heads", heads)
        assert outcome.status == 2
        assert said in outcome.err
        assert not made.exists()
    assert run(*words, "--heads", "1:1").status == 0
    kept = MemoryFolder.open(made).description.settings["heads"]
    assert list_open_heads(kept) == {"1": [1]}
    asked = ("--prompt", "alpha 3 ahpla;", "--max-new-tokens", "2", "--sources", *FP32)
    assert run("generate", llama, "--memory", made, *asked).status == 0
    assert run(*words, "--heads", "1:1").status == 0
    refused = run(*words, "--heads", "1:0")
    assert refused.status == 2
    assert "was made with heads = {1: [1]}, and {1: [0]} is asked for" in refused.err
    refused = run(*words, "--heads", "1:0", "--calibrate")
    assert refused.status == 2
    assert "--layers, --heads or --adapter has them" in refused.err


def test_calibration_finds_heads_that_find_passages(run, llama, notes, tmp_path):
    folder, made = tmp_path / "finder", tmp_path / "passages"
    model, tokenizer = load_pretrained(str(llama))
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        # The second head asks for the tokens that it sees.
        attention.q_proj.weight[10:] = attention.k_proj.weight
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    letters = random.Random(0).choices(string.printable[:94], k=2100)
    (tmp_path / "long.txt").write_text("".join(letters))
    settings = ("read=passages", "num_passages=2", "passage_len=11", "distance=0")
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--window", "31", "--calibrate", *FP32]
    outcome = run("read", folder, tmp_path / "long.txt", "--memory", made, *words)
    assert outcome.status == 0, outcome.err
    assert "calibrated: layer 0, heads 1; of 64 places of this text, " in outcome.err
    kept = MemoryFolder.open(made).description.settings["heads"]
    assert list_open_heads(kept) == {"0": [1]}
    few = run("read", folder, notes, "--memory", tmp_path / "none", *words)
    assert few.status == 2
    assert "2,052 or more, to find places among" in few.err
    assert not (tmp_path / "none").exists()


def test_only_documents_that_match_are_searched(run, refuse, memory, llama, tmp_path):
    path = tmp_path / "text.json"
    words = ("--memory", memory, "--prompt", PROMPT, "--max-new-tokens", "5", *FP32)
    chosen = ("--documents", "alpha.*", "--documents", "*a.txt")
    outcome = run("generate", llama, *words, "--sources", *chosen, "--json", path)
    assert outcome.status == 0
    assert ", 4 of 5 documents, " in outcome.err
    values = json.loads(path.read_text())
    assert values["documents"] == ["alpha.*", "*a.txt"]
    named = {document["name"] for document in values["sources"]["documents"]}
    assert named <= {"alpha.txt", "beta.txt", "gamma.txt", "delta.txt"}
    line = refuse("generate", llama, *words, "--documents", "alfa.txt")
    assert "'alfa.txt' matches none of the 5 documents" in line
    assert "did you mean 'alpha.txt'" in line


def test_passages_that_are_exchanged_say_when(capsys):
    def make(name, since, text, focus):
        return Source(name, 7, 9, 0.25, text, (focus, len(text)), since)

    long = "z" * 101
    passages = [
        make("old.txt", 0, "zero\rone\rtwo", 6),
        make("a.py", 0, "zero\none\n\ntwo\nthree\nfour\nfive\n", 6),
        replace(make(None, 0, "own", 0), first_line=None, last_line=None),
        make("b.py", 48, f"new {long}\x1b[2J", 0),
    ]
    print_passages(passages, 17)
    err = capsys.readouterr().err.splitlines()
    assert err[1:] == [
        "   25.0%  old.txt, lines 7-9",
        *(f"          {word}" for word in ("one", "two")),
        "   25.0%  a.py, lines 7-9",
        *(f"          {word}" for word in ("one", "two", "three", "four")),
        "   25.0%  this text itself, before its window",
        "          own",
        "passages in sight after 32 new tokens, best one first, with their share of attention:",
        "   25.0%  b.py, lines 7-9",
        f"          new {'z' * 96}…",
    ]


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


def test_sampling_is_by_the_seed(run, refuse, llama):
    words = ("--prompt", PROMPT, "--max-new-tokens", "17", "--temperature", "1.5", *FP32)
    first, again, other = (
        run("generate", llama, *words, "--top-p", "0.9", "--seed", seed).out for seed in (3, 3, 5)
    )
    assert first == again
    assert first != other
    assert "--seed" in refuse("generate", llama, *words, "--seed", 2**63)


def test_a_models_own_settings_of_sampling_do_not_count(run, llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "hot"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "top_k": 3, "max_length": 7}
    settings |= {"repetition_penalty": 1.7}
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
        (("--prompt", "x", "--documents", "*"), "those of a memory; give --memory"),
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

    model = add_memory(AutoModelForCausalLM.from_pretrained(llama), [1], window=17, read="entries")
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
    words = (*words, "--set", "read=entries")
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


def find_block(language: str, number: int = 1) -> str:
    return DOCS.read_text(encoding="utf-8").split(f"```{language}\n")[number].partition("```")[0]


def test_the_documented_commands_run(run, llama, notes, tmp_path, monkeypatch):
    import shlex

    monkeypatch.chdir(tmp_path)
    names = {"HuggingFaceTB/SmolLM2-135M": str(llama), "my_repository": str(notes)}
    lines = find_block("sh", 2).splitlines()
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
