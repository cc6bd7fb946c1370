"""What is kept of a run: per token its nats, and what its neighbors gave the token that came.

A run is read once with each memory. The validation documents come first: neighbors are weighed by
every temperature, and which gives them the fewest nats is written down (`choice.json`). Only then
are test documents read, and weighed by that one. Every
document is a file of its own under `ARRAYS/<run>/<capacity>/<use>`, whole or not there, so that the
same command goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from fitting import fit_weights, mix
from knn_lm import (
    STATE_BYTES,
    TEMPERATURES,
    TOKEN_BYTES,
    expect_square,
    predict,
    record_states,
)
from numpy.typing import NDArray

from memorizing.config import Config, ModelConfig
from memorizing.data import TokenizedDocument, load_splits, take_beginnings, tokenize_documents
from memorizing.errors import ConfigError
from memorizing.evaluation import evaluate_documents
from memorizing.storage.files import write_bytes, write_json
from memorizing.training import LoadedModel, load_model, read_run_config
from memorizing.training.run_folder import read_trained_dtype

Use = Literal["validation", "test"]
CHOICE_FILE = "choice.json"
_ENTRY_TENSORS = 2
"""A key and a value."""


@dataclass(frozen=True)
class Unit:
    """One run, read with one memory."""

    run_dir: Path
    folder: Path
    """Of its arrays."""
    capacity: int
    """Entries of the memory; 0 is none."""
    sizes: tuple[int, ...]
    """Memories, in entries, in whose bytes hidden states are kept."""
    max_tokens: int = 0
    """Read of each document; 0 is as many as the recipe says."""

    @cached_property
    def config(self) -> Config:
        """Of the run."""
        return read_run_config(self.run_dir)


def count_entry_bytes(config: ModelConfig) -> int:
    """Bytes that a token takes in all memories of a model: keys and values of every head."""
    component_bytes = 4 if config.memory_dtype == "float32" else 2
    width = config.num_heads * config.head_dim
    return _ENTRY_TENSORS * width * component_bytes * len(config.memory_layers)


def count_state_bytes(config: ModelConfig) -> int:
    """Bytes that kNN-LM keeps of a token: a hidden state, and the token that followed."""
    return STATE_BYTES * config.model_dim + TOKEN_BYTES


def count_states(config: ModelConfig, size: int) -> int:
    """How many hidden states fit into the bytes of a memory of `size` entries."""
    return size * count_entry_bytes(config) // count_state_bytes(config)


def check_trained(run_dir: Path) -> dict[str, Any]:
    """What the queue says of a training that is done.

    Raises:
        ConfigError: it is not done; the message has the command.
    """
    path = run_dir / "trained.json"
    if not path.is_file():
        job = "/".join(run_dir.parts[-2:])
        raise ConfigError(
            f"{run_dir} holds no training that is done; run: python experiments/queue --run {job} "
            f"--runs {run_dir.parent.parent} (and --results FOLDER, where the job has a result but "
            "its weights are gone)"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def measure(unit: Unit, device: torch.device | str = "cpu") -> None:
    """Read and search what is not there yet: validation, the choice, test."""
    loaded = load_model(unit.run_dir, device=device)
    loaded.model.compute_dtype = read_trained_dtype(unit.run_dir)
    splits = load_splits(unit.config.data)
    about = {"weights": _hash_weights(loaded), "sizes": list(unit.sizes)}
    made_from = _measure_documents(unit, loaded, "validation", splits.validation, about, None)
    path = unit.folder / CHOICE_FILE
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("made_from") != made_from:
        kept = {"made_from": made_from, "choices": choose(unit)}
        write_json(path, kept)
    _measure_documents(unit, loaded, "test", splits.test, about, kept["choices"])


def read_choices(unit: Unit) -> dict[str, Any]:
    """By size: what `choose` found."""
    return json.loads((unit.folder / CHOICE_FILE).read_text(encoding="utf-8"))["choices"]


def _hash_weights(loaded: LoadedModel) -> str:
    digest = hashlib.sha256()
    for tensor in loaded.model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _measure_documents(
    unit: Unit,
    loaded: LoadedModel,
    use: Use,
    documents: Sequence[Any],
    about: dict[str, Any],
    choices: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """A file for each document that has none of these weights and this choice; what they are of."""
    length = unit.max_tokens or unit.config.evaluation.max_tokens_per_document
    tokenized = tokenize_documents(documents, loaded.tokenizer)
    made_from = []
    for number, document in enumerate(take_beginnings(tokenized, loaded.tokenizer, length)):
        path = unit.folder / use / f"{number}.npz"
        wanted = about | {"name": document.name, "tokens": len(document.tokens)}
        wanted |= {"choices": choices, "temperatures": list(TEMPERATURES)}
        made_from.append(wanted)
        if path.is_file() and json.loads(str(_read_arrays(path, "about")["about"])) == wanted:
            continue
        start_s = time.monotonic()
        arrays = _measure_document(unit, loaded, document, choices)
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, about=np.array(json.dumps(wanted)), **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
        nats = float(arrays["nats"].mean())
        seconds = time.monotonic() - start_s
        print(f"{path}: {document.name}, {nats:.4f} nats a token, {seconds:.0f} s", flush=True)
    return made_from


def _read_arrays(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """Arrays of a file, by name; all of them where none is named."""
    with np.load(path) as file:
        return {name: file[name] for name in names or file.files}


def _measure_document(
    unit: Unit, loaded: LoadedModel, document: TokenizedDocument, choices: dict[str, Any] | None
) -> dict[str, NDArray[Any]]:
    model, config = loaded.model, loaded.config
    with record_states(model) as states:
        result = evaluate_documents(
            model, [document], loaded.tokenizer.start_token, capacity=unit.capacity, rows=1
        )
    arrays = {"tokens": document.tokens, "nats": result.documents[0].token_nats}
    read, unit_square = torch.cat(states, 1)[0], expect_square(model)
    for size in unit.sizes:
        temperatures = TEMPERATURES
        if choices is not None:
            temperatures = (choices[str(size)]["temperature"],)
        scaled = [temperature * unit_square for temperature in temperatures]
        found = predict(read, document.tokens, count_states(config, size), scaled)
        # Many columns are kept to choose one of them.
        arrays[str(size)] = found.astype(np.float16 if choices is None else np.float32)
    return arrays


@dataclass(frozen=True)
class DocumentArrays:
    """What is kept of a document, for a memory of one size. T tokens."""

    name: str
    size: int
    tokens: NDArray[np.int32]
    model: NDArray[np.float64]
    """(T,) p of the token that came, by the model."""
    neighbors: NDArray[np.float64]
    """(T,) p_knn of it, by as many states as the memory has bytes for."""


def load_arrays(unit: Unit, use: Use, size: int, choice: dict[str, Any]) -> list[DocumentArrays]:
    """Every measured document, with the chosen column of its neighbors."""
    documents = []
    for path in _list_files(unit, use):
        arrays = _read_arrays(path)
        column = TEMPERATURES.index(choice["temperature"]) if use == "validation" else 0
        neighbors = arrays[str(size)][:, column].astype(np.float64)
        name = json.loads(str(arrays["about"]))["name"]
        model = np.exp(-arrays["nats"].astype(np.float64))
        documents.append(DocumentArrays(name, size, arrays["tokens"], model, neighbors))
    return documents


def _list_files(unit: Unit, use: Use) -> list[Path]:
    return sorted((unit.folder / use).glob("*.npz"), key=lambda path: int(path.stem))


def choose(unit: Unit) -> dict[str, Any]:
    """By size: the temperature with which kNN-LM gives validation documents the fewest nats.

    One weight for all tokens, as in the paper, is fitted for each of them.
    """
    files = [_read_arrays(path) for path in _list_files(unit, "validation")]
    model = np.concatenate([np.exp(-arrays["nats"].astype(np.float64)) for arrays in files])
    buckets = np.zeros(len(model), np.int64)
    choices = {}
    for size in unit.sizes:
        grid = np.concatenate([arrays[str(size)] for arrays in files])
        found = []
        for column, temperature in enumerate(TEMPERATURES):
            shares = np.stack([model, grid[:, column]], 1)
            weights = fit_weights(shares, buckets, 1)
            nats = float(mix(shares, buckets, weights).mean())
            found.append((nats, temperature, float(weights[0, 1])))
        nats, temperature, weight = min(found)
        choices[str(size)] = {
            "temperature": temperature,
            "weight": weight,
            "validation_nats_per_token": nats,
        }
    return choices
