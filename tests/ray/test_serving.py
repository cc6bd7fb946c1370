"""A memory that is served is that of its folder: what it finds, reads and makes a model say."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memorizing
from memorizing.errors import ConfigError, MemoryFolderError
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.attaching.passage_room import Passage
from memorizing.huggingface.attaching.window_cache import find_text
from memorizing.memory import MemoryFolder
from memorizing.ray import serve_memory
from memorizing.ray.opening import Address, parse_address
from memorizing.ray.serving import divide
from tests.huggingface.sessions.tools import TOKENIZER
from tests.huggingface.tools import LAYER, call, find_model, give_memory, make_tokens

DOCUMENTS = {
    f"document {number}": " ".join(f"w{token}" for token in make_tokens(1, length, seed=length)[0])
    for number, length in enumerate((167, 30, 238, 5, 101, 13, 253, 71))
}
PROMPT = make_tokens(1, 11, seed=5)
SETTINGS: dict[str, Any] = {
    "read": "both",
    "temperature": 0.2,
    "num_passages": 3,
    "passage_len": 23,
    "passage_margin": 20.0,
}
SHARDS, LIMIT_S = 2, 4.0


def read_memory(path: Path, **settings: Any) -> Path:
    model = find_model()
    give_memory(model, **SETTINGS, **settings)
    memory = memorizing.open_memory(model, path, tokenizer=TOKENIZER)
    memory.read(TOKENIZER, DOCUMENTS, progress=False)
    return path


@pytest.fixture(scope="module")
def texts(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A memory whose texts are kept, and the address where two of each shard serve it."""
    path = read_memory(tmp_path_factory.mktemp("texts") / "texts.memory")
    with serve_memory(path, num_shards=SHARDS, num_replicas=2) as served:
        assert served.address.endswith("/texts")
        yield path, f"{served.address}?limit_s={LIMIT_S}"


@pytest.fixture(scope="module")
def entries(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """One whose entries of all layers are kept."""
    path = read_memory(tmp_path_factory.mktemp("entries") / "some.memory", keep="entries")
    with serve_memory(path, name="kept", num_shards=SHARDS) as served:
        yield path, f"{served.address}?limit_s={LIMIT_S}"


def run(
    path: Path | str, documents: list[str] | None = None
) -> tuple[Tensor, list[Passage], list[tuple[int, float]], Any]:
    """Logits, passages, and entries of the best scores, of a model that reads a memory."""
    model = find_model()
    memory = memorizing.open_memory(model, path, tokenizer=TOKENIZER, documents=documents)
    with memory, torch.no_grad():
        found = ask(model)
    return *found, memory


def ask(model: Any) -> tuple[Tensor, list[Passage], list[tuple[int, float]]]:
    attachment = get_attachment(model)
    assert attachment.opened is not None
    base, cache = attachment.opened.base[LAYER], attachment.make_cache()
    logits = call(model, PROMPT, cache).logits
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(1, 4, 1, 10, generator=generator)
    best = []
    for part, first in zip(base.retrieve(queries, 7), base.first_entries, strict=True):
        kept = part.neighbors.valid
        best += zip(
            (part.neighbors.slots[kept] + first).tolist(),
            part.neighbors.scores[kept].tolist(),
            part.fetch_values()[kept].sum(-1).tolist(),
            strict=True,
        )
    room = find_text(cache).room
    return logits, [] if room is None else list(room.passages[0]), sorted(best)


def check_same(found: Any, expected: Any) -> None:
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert replace(mine, score=0.0) == replace(theirs, score=0.0)
        assert mine.score == pytest.approx(theirs.score, rel=1e-4)
        assert (mine.entries, mine.ids.tolist()) == (theirs.entries, theirs.ids.tolist())
        for one, other in zip(
            mine.kept() if mine.kept else (), theirs.kept() if theirs.kept else (), strict=True
        ):
            assert one[0] == other[0]
            assert all(map(torch.equal, one[1], other[1]))
    assert [entry for entry, *_ in found[2]] == [entry for entry, *_ in expected[2]]
    for mine, theirs in zip(found[2], expected[2], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert torch.allclose(found[0], expected[0], atol=1e-5)


def list_pids(name: str, shard: int, num_replicas: int) -> list[int]:
    """Processes that have a shard, when all are there."""
    import ray

    names = [f"{name}/{shard}/{one}" for one in range(num_replicas)]
    deadline = time.monotonic() + 60
    while True:
        actors = [ray.get_actor(one, "memorizing") for one in names]
        try:
            return ray.get([one.__ray_call__.remote(lambda _: os.getpid()) for one in actors])
        except ray.exceptions.RayActorError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def ask_until_all_answer(model: Any, memory: Any) -> Any:
    """What is found when the shards that were away are back."""
    deadline = time.monotonic() + 60
    while True:
        before = dict(memory.left_out)
        found = ask(model)
        if memory.left_out == before:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.2)


def list_names(path: Path, shard: int) -> list[str]:
    documents = MemoryFolder.open(path).documents
    edges = divide([one.num_entries for one in documents], SHARDS)
    return [one.name for one in documents[edges[shard] : edges[shard + 1]]]


def test_passages_that_are_read_again_and_entries_are_those_of_the_folder(texts):
    path, address = texts
    expected, found = run(path), run(address)
    assert {one.document for one in found[1]} & set(list_names(path, 1))
    assert len(set(found[1])) == 3
    check_same(found, expected)
    assert found[3].documents == expected[3].documents
    name = "document 4"
    assert found[3].read_text(name) == DOCUMENTS[name]
    assert found[3].list_tokens(name).tolist() == expected[3].list_tokens(name).tolist()


def test_passages_of_kept_entries_are_those_of_the_folder(entries):
    path, address = entries
    expected, found = run(path), run(address)
    assert all(one.kept is not None for one in found[1])
    check_same(found, expected)


def test_documents_that_are_chosen_are_searched(entries):
    path, address = entries
    names = ["document 0", "document [4-6]"]
    check_same(run(address, names), run(path, names))


def test_sources_are_told_as_of_the_folder(texts):
    told = []
    for place in texts:
        model = find_model()
        with memorizing.open_memory(model, place, tokenizer=TOKENIZER) as memory, torch.no_grad():
            with memory.record() as sources:
                call(model, PROMPT, memory.new_cache())
            told.append([replace(one, weight=0.0) for one in sources.passages])
    assert told[0] == told[1]
    assert told[0][0].first_line == 1


def test_a_replica_that_is_gone_is_not_missed(texts):
    path, address = texts
    model, expected = find_model(), run(path)
    with memorizing.open_memory(model, address, tokenizer=TOKENIZER) as memory, torch.no_grad():
        os.kill(list_pids("texts", 1, 2)[0], signal.SIGKILL)
        for _ in range(3):
            check_same(ask(model), expected)
    assert memory.left_out == {}


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_shard_that_is_away_is_left_out_warned_of_and_comes_back(texts, is_killed):
    path, address = texts
    model, expected = find_model(), run(path)
    without = run(path, list_names(path, 0))
    with memorizing.open_memory(model, address, tokenizer=TOKENIZER) as memory, torch.no_grad():
        pids = list_pids("texts", 1, 2)
        for pid in pids:
            os.kill(pid, signal.SIGKILL if is_killed else signal.SIGSTOP)
        start_s = time.monotonic()
        with pytest.warns(UserWarning, match=r"shards \[1\] of the 2 of ray://.* did not answer"):
            found = ask(model)
        took_s = time.monotonic() - start_s
        assert [entry for entry, *_ in found[2]] == [entry for entry, *_ in without[2]]
        assert {one.document for one in found[1]} <= set(list_names(path, 0))
        # Each of them is waited for once, in one round.
        assert took_s < LIMIT_S + 2
        assert memory.left_out[1] >= 1
        if not is_killed:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_same(ask_until_all_answer(model, memory), expected)


def test_a_served_memory_is_not_changed_by_whoever_reads_it(texts):
    path, address = texts
    memory = run(address)[3]
    with pytest.raises(MemoryFolderError, match="is served, and cannot be read into here"):
        memory.read(TOKENIZER, {"new": "w5"}, progress=False)
    with pytest.raises(MemoryFolderError, match="is served, and cannot be made to forget"):
        memory.forget("document 0")
    with pytest.raises(MemoryFolderError, match="is being written by process"):
        MemoryFolder.open(path).forget("document 0")
    for options in ({"keep_text": True}, {"dtype": "int8"}):
        with pytest.raises(ConfigError, match="leave keep_text and dtype out"):
            memorizing.open_memory(find_model(), address, **options)


def test_what_is_not_served_or_twice_is_refused(texts):
    with pytest.raises(ConfigError, match="no memory named 'other' is served"):
        memorizing.open_memory(find_model(), "ray:///other")
    with (
        pytest.raises(ConfigError, match="named 'texts' is served in this cluster"),
        serve_memory(read_memory(texts[0].with_name("copy")), name="texts", num_shards=1),
    ):
        pass


@pytest.mark.parametrize(
    ("counts", "num_shards", "expected"),
    [
        ([7], 1, (0, 1)),
        ([7, 7, 7, 7], 2, (0, 2, 4)),
        ([100, 1, 1, 1], 3, (0, 1, 2, 4)),
        ([1, 1, 1, 100], 3, (0, 2, 3, 4)),
        ([0, 0, 5], 3, (0, 1, 2, 3)),
    ],
)
def test_documents_are_divided_whole_in_about_equal_parts(counts, num_shards, expected):
    assert divide(counts, num_shards) == expected


@pytest.mark.parametrize(("num_documents", "num_shards"), [(2, 3), (2, 0), (0, 1)])
def test_there_are_not_more_shards_than_documents(num_documents, num_shards):
    with pytest.raises(ConfigError, match=f"num_shards is {num_shards}; allowed: 1 to"):
        divide([3] * num_documents, num_shards)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ray://10.0.0.7:6379/repo", Address("10.0.0.7:6379", "repo", 5.0)),
        ("ray:///repo?limit_s=0.5", Address("auto", "repo", 0.5)),
    ],
)
def test_an_address_has_a_cluster_a_name_and_a_limit(address, expected):
    assert parse_address(address) == expected


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://10.0.0.7:6379", "write ray://HOST:PORT/NAME"),
        ("ray://host:1/a/b", "write ray://HOST:PORT/NAME"),
        ("ray:///a?limit=3", "write ray://HOST:PORT/NAME"),
        ("ray:///a?limit_s=x", "limit_s of .* is 'x'; give seconds"),
        ("ray:///a?limit_s=0", "limit_s of .* is '0'; give seconds"),
        ("ray:///a?limit_s=nan", "limit_s of .* is 'nan'; give seconds"),
        ("ray:///a?limit_s=", "limit_s of .* is ''; give seconds"),
    ],
)
def test_what_is_no_address_is_refused(address, said):
    with pytest.raises(ConfigError, match=said):
        parse_address(address)
