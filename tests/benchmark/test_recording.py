"""A recording is what the model's memory holds, and what it is searched for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from memorizing.benchmark import Recording, load_recording, record_search
from memorizing.config import ModelConfig, TokenizerConfig
from memorizing.data import Document, Tokenizer, train_tokenizer
from memorizing.errors import ConfigError, CorpusError, RunFolderError
from memorizing.model import MemorizingTransformer
from memorizing.training import load_model, save_model
from tests.knn.ring import search_exact

SEGMENT_LEN, K, LAYER = 11, 5, 1
TEXTS = {
    "short.txt": "".join(f"short {n * 7 % 31};\n" for n in range(3)),
    "long.txt": "".join(f"long {n * 5 % 89} gnol;\n" for n in range(101)),
    "middle.txt": "".join(f"middle {n * 3 % 61};\n" for n in range(53)),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    documents = [Document(name, text) for name, text in TEXTS.items()]
    return train_tokenizer(documents, TokenizerConfig(vocab_size=307))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=3,
        model_dim=17,
        num_heads=2,
        head_dim=7,
        ffn_dim=37,
        segment_len=SEGMENT_LEN,
        window=13,
        memory_layers=(LAYER,),
        capacity=23,
        num_neighbors=K,
        smear_keys=True,
        memory_dtype="float32",
    )
    path = tmp_path_factory.mktemp("models") / "model"
    save_model(path, MemorizingTransformer(config), tokenizer)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (path / name).write_text(text, encoding="utf-8")
    return f"files:{path}"


def record(folder: Path, corpus: str, num_entries: int, num_queries: int, **settings: Any) -> Any:
    return record_search(
        folder,
        num_entries,
        num_queries=num_queries,
        corpus=corpus,
        precision="fp32",
        device="cpu",
        **settings,
    )


# Both sides of a boundary of segments, which the number of entries need not be a multiple of.
@pytest.mark.parametrize("num_entries", [10, 11, 12, 41, 44])
def test_keys_and_queries_are_those_of_the_memory_that_the_model_reads(
    folder: Path, corpus: str, tokenizer: Tokenizer, num_entries: int
) -> None:
    recording = record(folder, corpus, num_entries, 17)
    model = load_model(folder).model
    tokens = [tokenizer.start_token, *tokenizer.encode(TEXTS["long.txt"]).tolist()]
    num_before = -(-num_entries // SEGMENT_LEN)
    state = model.init_state(1, capacity=num_entries)
    keys = []
    with torch.no_grad():
        for number, segment in enumerate(torch.tensor([tokens]).split(SEGMENT_LEN, dim=1)):
            is_open = number >= num_before
            output = model(segment, state, memory_open=is_open, return_retrievals=True)
            if is_open:
                break
            keys.append(output.state.staged[LAYER].keys[0])
            state = output.state.commit()
    assert torch.equal(recording.keys, torch.cat(keys, 1)[:, -num_entries:])
    # The searches of the first segment after the keys find what the model retrieved.
    stored = state.memories[LAYER].stored_keys
    first = recording.queries[:, :SEGMENT_LEN].unsqueeze(0)
    found = search_exact(first, stored.keys, stored.num_appended, K)
    assert output.retrievals is not None
    assert torch.equal(found.slots, output.retrievals[LAYER].slots)
    assert recording.queries.shape == (2, 17, 7)
    assert recording.source["documents"] == ["long.txt"]


def test_documents_that_are_too_short_are_joined_longest_first(
    folder: Path, corpus: str, tokenizer: Tokenizer
) -> None:
    longest = len(tokenizer.encode(TEXTS["long.txt"]))
    num_entries = (longest // SEGMENT_LEN + 1) * SEGMENT_LEN
    calls: list[tuple[int, int]] = []
    recording = record(
        folder, corpus, num_entries, 2, on_progress=lambda done, total: calls.append((done, total))
    )
    assert recording.source["documents"] == ["long.txt", "middle.txt"]
    assert recording.source["num_tokens"] == num_entries + SEGMENT_LEN
    assert calls[-1] == (num_entries + SEGMENT_LEN,) * 2


def test_too_little_text_says_how_much_there_is(folder: Path, corpus: str) -> None:
    with pytest.raises(CorpusError, match=r"needs 100,001 tokens and the 3 documents have \d,\d+;"):
        record(folder, corpus, 9091 * SEGMENT_LEN - SEGMENT_LEN, 2)


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    keys, queries = torch.randn(2, 19, 7).bfloat16(), torch.randn(2, 5, 7).bfloat16()
    # Not contiguous, as a part of a larger one is.
    recording = Recording(keys[:, 2:], queries, {"run": "runs/ä", "documents": ["a", "b"]})
    path = tmp_path / "folder" / "a.recorded"
    recording.save(path)
    loaded = load_recording(path)
    assert torch.equal(loaded.keys, keys[:, 2:])
    assert torch.equal(loaded.queries, queries)
    assert loaded.source == recording.source


@pytest.mark.parametrize(
    ("keys", "queries", "source"),
    [
        (torch.full((2, 19, 7), float("nan")), torch.zeros(2, 5, 7), "{}"),
        (torch.zeros(2, 19, 7), torch.full((2, 5, 7), -float("inf")), "{}"),
        (torch.zeros(2, 19, 7), torch.zeros(3, 5, 7), "{}"),
        (torch.zeros(2, 19, 7), torch.zeros(2, 5, 11), "{}"),
        (torch.zeros(2, 19, 7), torch.zeros(2, 5, 7).half(), "{}"),
        (torch.zeros(2, 19, 7).int(), torch.zeros(2, 5, 7).int(), "{}"),
        (torch.zeros(2, 19, 7), torch.zeros(2, 5, 7), "[]"),
        (torch.zeros(2, 19, 7), torch.zeros(2, 5, 7), "[" * 100_000),
    ],
)
def test_a_recording_that_somebody_altered_is_refused(
    tmp_path: Path, keys: torch.Tensor, queries: torch.Tensor, source: str
) -> None:
    metadata = {"format": "memorizing recording 1", "source": source}
    path = tmp_path / "a.recorded"
    path.write_bytes(safetensors.torch.save({"keys": keys, "queries": queries}, metadata))
    with pytest.raises(ConfigError, match="damaged"):
        load_recording(path)


def test_a_file_that_is_no_recording_is_refused_with_the_command_that_makes_one(
    tmp_path: Path,
) -> None:
    remedy = "memorizing benchmark record RUN --entries N --out FILE"
    with pytest.raises(ConfigError, match=f"is missing; .*{remedy}"):
        load_recording(tmp_path / "none")
    text = tmp_path / "text"
    text.write_text("keys and queries")
    with pytest.raises(ConfigError, match=f"cannot be read, or is truncated.*{remedy}"):
        load_recording(text)
    other = tmp_path / "model.safetensors"
    other.write_bytes(safetensors.torch.save({"keys": torch.zeros(3)}))
    with pytest.raises(ConfigError, match=f"format None.*{remedy}"):
        load_recording(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, r"layer 0 has no memory; the memory layers are \[1\]"),
        ({"num_entries": 4}, "at least num_neighbors = 5"),
        ({"num_entries": 0}, "at least one of each"),
        ({"num_queries": 0}, "at least one of each"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    folder: Path, corpus: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        record_search(folder, **{"num_entries": 11, "corpus": corpus, **settings})


def test_a_model_that_is_no_run_needs_a_corpus(folder: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run"):
        record_search(folder, 11)
