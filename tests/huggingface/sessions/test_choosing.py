"""Some documents of a folder, searched as if there were no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.huggingface import open_memory
from tests.huggingface.sessions.tools import DOCUMENTS, TOKENIZER, ask, read_all
from tests.huggingface.tools import call, find_model, give_memory, make_tokens

WAYS: list[dict[str, Any]] = [
    {},
    {
        "read": "passages",
        "num_passages": 2,
        "passage_len": 23,
        "passage_margin": 20.0,
        "temperature": 0.2,
    },
]


@pytest.mark.parametrize("settings", WAYS, ids=["entries", "passages"])
def test_chosen_documents_are_read_as_a_folder_of_these_alone(tmp_path: Path, settings):
    model = find_model()
    give_memory(model, **settings)
    names = ["second", "third"]
    with open_memory(model, tmp_path / "all") as memory:
        read_all(memory)
    with open_memory(model, tmp_path / "some") as memory:
        read_all(memory, {name: DOCUMENTS[name] for name in names})
    with open_memory(model, tmp_path / "all", tokenizer=TOKENIZER):
        whole = ask(model)
    with open_memory(model, tmp_path / "some", tokenizer=TOKENIZER) as memory:
        with memory.record() as expected:
            wanted = ask(model)
        num_entries = memory.num_entries
    chosen = open_memory(
        model, tmp_path / "all", tokenizer=TOKENIZER, documents=["*ir[ab-d]", "second"]
    )
    with chosen as memory:
        with memory.record() as sources:
            found = ask(model)
        assert [document.name for document in memory.documents] == names
        assert memory.num_entries == num_entries
    assert torch.equal(found, wanted)
    assert not torch.equal(found, whole)
    assert sources.mass == expected.mass
    assert sources.passages == expected.passages
    assert sources.mass.keys() <= set(names)


def test_what_is_left_out_is_not_found_by_what_asks_for_it(tmp_path: Path):
    model = find_model()
    give_memory(model, **WAYS[1])
    with open_memory(model, tmp_path) as memory:
        read_all(memory)
    with open_memory(model, tmp_path, tokenizer=TOKENIZER, documents=("second",)) as memory:
        for seed in range(5):
            with memory.record() as sources, torch.no_grad():
                call(model, make_tokens(1, 11, seed=seed))
            assert {one.document for one in sources.passages} == {"second"}


NAMES = {"src/a.py": "w5 w6 w7 w8 w9", "src/b/c.PY": "w9 w8 w7 w6", "[x].md": "w4 w5 w6 w7"}


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["src/*"], ["src/a.py", "src/b/c.PY"]),
        (["*.py"], ["src/a.py"]),
        (["src/?.py", "*/c.*"], ["src/a.py", "src/b/c.PY"]),
        (("[[]x].md", "src/a.py"), ["src/a.py", "[x].md"]),
        (["[x].md"], ["[x].md"]),
        (["*"], list(NAMES)),
    ],
)
def test_patterns_are_those_of_fnmatch_and_names(tmp_path: Path, patterns, found):
    model = find_model()
    give_memory(model)
    with open_memory(model, tmp_path) as memory:
        read_all(memory, NAMES)
    chosen = open_memory(model, tmp_path, documents=patterns).documents
    assert [document.name for document in chosen] == found


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["src/*", "*.rs"], r"'\*\.rs' matches none of the 3 documents of .*; known: src/a.py"),
        (["src/A.py"], r"did you mean 'src/a\.py' or"),
        (["src/b/"], r"'src/b/' matches none .*; write 'src/b/\*' for all of a folder"),
        (["SRC/*"], "did you mean|known"),
        (["é*"], "matches none"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_near(tmp_path: Path, patterns, said):
    model = find_model()
    give_memory(model)
    with open_memory(model, tmp_path) as memory:
        read_all(memory, NAMES)
    with pytest.raises(MemoryFolderError, match=said):
        open_memory(model, tmp_path, documents=patterns)


@pytest.mark.parametrize("patterns", ["src/*.py", [], [""], [3], 7, {"a"}, b"x"])
def test_what_is_no_list_of_patterns_is_refused(tmp_path: Path, patterns):
    model = find_model()
    give_memory(model)
    with pytest.raises(ConfigError, match=r"give one pattern of names or more"):
        open_memory(model, tmp_path, documents=patterns)


def test_there_is_nothing_to_choose_from_without_documents(tmp_path: Path):
    model = find_model()
    give_memory(model)
    with pytest.raises(ConfigError, match="this memory has none; give its path"):
        open_memory(model, documents=["*"])
    with pytest.raises(MemoryFolderError, match="none of the 0 documents"):
        open_memory(model, tmp_path / "none", documents=["*"])
    assert not (tmp_path / "none").exists()


def test_a_memory_that_is_open_in_part_is_only_searched(tmp_path: Path):
    model = find_model()
    give_memory(model)
    with open_memory(model, tmp_path / "all") as memory:
        read_all(memory)
    with open_memory(model, tmp_path / "all", documents=["first"]) as memory:
        for change in (
            lambda: read_all(memory, {"new": "w5"}),
            lambda: memory.forget("first"),
            lambda: memory.save(tmp_path / "copy"),
        ):
            with pytest.raises(MemoryFolderError, match="1 of its 3 documents, and not to be"):
                change()
    with open_memory(model, tmp_path / "all") as memory:
        assert len(memory.documents) == 3
    assert not (tmp_path / "copy").exists()
