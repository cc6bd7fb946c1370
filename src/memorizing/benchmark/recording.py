"""Real queries and keys: those of one memory layer of a trained model while it reads.

Random vectors are the worst case of approximate search and say little about a model: its keys lie
in clusters, and its queries are distributed otherwise than its keys. So indexes are compared on
what a model asks for, kept in one safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from memorizing.benchmark.indexes import RecordingIndex
from memorizing.config import DataConfig, ModelConfig, Use, check_capacity
from memorizing.data import Document, Tokenizer, load_splits
from memorizing.devices import find_device
from memorizing.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    ResourceError,
)
from memorizing.memory import memory_bytes
from memorizing.model import MemorizingTransformer
from memorizing.storage.files import write_output
from memorizing.storage.tensors import read_header, read_tensors
from memorizing.training import choose_precision, load_model, measure_available, read_run_config

FORMAT = "memorizing recording 1"


@dataclass(frozen=True)
class Recording:
    """What one memory layer stored and searched for. H heads, N entries, T queries, D head_dim."""

    keys: Tensor
    """(H, N, D) in the dtype of the memory, oldest first."""
    queries: Tensor
    """(H, T, D) in the dtype of the keys: those of the tokens that follow the newest entry."""
    source: dict[str, Any]
    """Run, step, layer and documents, as plain values for JSON."""

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all; devices and pipes are written through.

        Raises:
            ResourceError: the file cannot be written.
        """
        tensors = {"keys": self.keys.contiguous(), "queries": self.queries.contiguous()}
        metadata = {"format": FORMAT, "source": json.dumps(self.source)}
        write_output(path, safetensors.torch.save(tensors, metadata))


def load_recording(path: Path) -> Recording:
    """Read what `Recording.save` wrote.

    Raises:
        ConfigError: there is no such file, or it is no recording.
    """
    remedy = "make one with `memorizing benchmark record RUN --entries N --out FILE`"
    header = read_header(path, ConfigError, remedy)
    try:
        is_recording = header.metadata["format"] == FORMAT
        source = json.loads(header.metadata["source"]) if is_recording else None
    except (KeyError, ValueError, RecursionError):
        source = None
    dims = {name: place.dim() for name, place in header.places.items()}
    if not isinstance(source, dict) or dims != {"keys": 3, "queries": 3}:
        raise ConfigError(
            f"{str(path)!r} is of the format {repr(header.metadata.get('format'))[:40]}, or "
            f"damaged; expected {FORMAT!r}; {remedy}"
        )
    tensors = read_tensors(path, ConfigError, remedy)
    kinds = {(one.dtype, one.shape[0], one.shape[2]) for one in tensors.values()}
    are_finite = all(one.is_floating_point() and one.isfinite().all() for one in tensors.values())
    if len(kinds) > 1 or not are_finite:
        raise ConfigError(
            f"{str(path)!r} is damaged: keys and queries must be of the same heads and dimensions, "
            f"and finite; {remedy}"
        )
    return Recording(tensors["keys"], tensors["queries"], source)


def record_search(
    run: Path | str,
    num_entries: int,
    *,
    num_queries: int = 512,
    layer: int | None = None,
    corpus: str | None = None,
    text_column: str = "text",
    use: Use | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """Let a trained model read text, and keep the entries and the searches of a memory layer.

    One row reads one stream of tokens, segment by segment, with closed memories (they are written,
    not searched, for speed) until `num_entries` are stored, then with open ones, searched exactly,
    until `num_queries` queries per head were asked. Keys of layers above another memory layer are
    thus those of a model that does not read its memory.

    The stream is the longest document of the corpus (in bytes), and where that is too short the
    next longest ones after it, in the same memory; `source` names them.

    Args:
        run: folder of a run, checkpoint or model.
        num_entries: keys per head.
        num_queries: queries per head.
        layer: a memory layer; None is the first.
        corpus: what to read, as `kind:where`; None is the run's own.
        text_column: where tables have the text.
        use: documents of the run's corpus; None is `validation`, and `all` of another corpus.
        precision: of the model's products and activations; see `TrainingConfig.precision`.
        device: where the model reads; None is CUDA where there is a GPU, else the CPU. The
            recording is on the CPU.
        on_progress: called with tokens read and in all.

    Raises:
        RunFolderError, CheckpointError: the folder is not a run, or its checkpoint cannot be used.
        ConfigError: a layer without memory, or fewer entries than the model's neighbors.
        CorpusError: the corpus cannot be read, or has too few tokens.
        ResourceError: the memories do not fit into the machine.
    """
    device = find_device(device)
    loaded = load_model(run, device=device)
    model, config, tokenizer = loaded.model, loaded.config, loaded.tokenizer
    layer = _choose_layer(config, layer)
    if num_entries < 1 or num_queries < 1:
        raise ConfigError(
            f"{num_entries} entries and {num_queries} queries are to be recorded; allowed: at "
            "least one of each"
        )
    check_capacity(num_entries, config.num_neighbors)
    if tokenizer is None:
        raise CheckpointError(f"{run} has no tokenizer: it was trained on token ids, not on text")
    needed, available = memory_bytes(config, 1, num_entries), measure_available(device)
    if needed > available:
        raise ResourceError(
            f"memories of {num_entries:,} entries need {needed / 2**30:,.1f} GiB and "
            f"{available / 2**30:,.1f} GiB are free; record fewer entries"
        )
    if corpus is None:
        data, use = read_run_config(Path(run)).data, use or "validation"
    else:
        data, use = DataConfig(corpus=corpus, text_column=text_column), use or "all"
    segment_len = config.segment_len
    num_before, num_after = -(-num_entries // segment_len), -(-num_queries // segment_len)
    stream, names = _gather_stream(
        _choose_documents(data, use), tokenizer, (num_before + num_after) * segment_len
    )
    choice = choose_precision(precision, config.model_dim, config.ffn_dim, device)
    model.compute_dtype = choice.dtype
    keys, queries = _read(model, stream, num_before, num_entries, layer, on_progress)
    source = {
        "run": str(run),
        "layer": layer,
        "corpus": data.corpus,
        "documents": names,
        "num_tokens": len(stream),
    }
    return Recording(keys, queries[:, :num_queries], source)


def _choose_layer(config: ModelConfig, layer: int | None) -> int:
    if not config.has_memory:
        raise ConfigError("the model has no memory layer to record; give a run of one that has")
    if layer is not None and layer not in config.memory_layers:
        raise ConfigError(
            f"layer {layer} has no memory; the memory layers are {list(config.memory_layers)}, "
            "counted from 0"
        )
    return config.memory_layers[0] if layer is None else layer


def _choose_documents(data: DataConfig, use: Use) -> list[Document]:
    splits = load_splits(data)
    documents: list[Document] = (
        [*splits.train, *splits.validation, *splits.test] if use == "all" else getattr(splits, use)
    )
    if not documents:
        raise CorpusError(
            f"no document of {data.corpus!r} is held out for {use}; read another use or corpus"
        )
    return sorted(documents, key=lambda document: -document.num_bytes)


def _gather_stream(
    documents: Sequence[Document], tokenizer: Tokenizer, num_tokens: int
) -> tuple[Tensor, list[str]]:
    """The first tokens (n,) of the documents joined, each after a start token; and their names."""
    parts: list[np.ndarray] = []
    names: list[str] = []
    found = 0
    for document in documents:
        parts.append(np.append(np.int32(tokenizer.start_token), tokenizer.encode(document.text)))
        names.append(document.name)
        found += len(parts[-1])
        if found >= num_tokens:
            return torch.from_numpy(np.concatenate(parts)[:num_tokens].astype(np.int64)), names
    raise CorpusError(
        f"the recording needs {num_tokens:,} tokens and the {len(documents):,} documents have "
        f"{found:,}; record fewer entries, read all documents (use 'all') or another corpus"
    )


def _read(
    model: MemorizingTransformer,
    stream: Tensor,
    num_before: int,
    num_entries: int,
    layer: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Keys (H, N, D) after the first `num_before` segments, and all queries after them."""
    device = model.embedding.weight.device
    keys = torch.empty(0)
    with torch.no_grad():
        state = model.init_state(1, num_entries, device, index="exact")
        memory = state.memories[layer]
        memory.index = recorder = RecordingIndex(memory.index)
        for number, segment in enumerate(stream.to(device).split(model.config.segment_len)):
            if number == num_before:
                stored = memory.stored_keys
                oldest = (stored.newest_slots[0] + 1) % num_entries
                keys = torch.cat([stored.keys[0, :, oldest:], stored.keys[0, :, :oldest]], 1).cpu()
            is_open = number >= num_before
            state = model(segment.unsqueeze(0), state, memory_open=is_open).state.commit()
            if on_progress is not None:
                on_progress((number + 1) * model.config.segment_len, len(stream))
    queries = torch.cat(recorder.queries, 2)[0]
    return keys, queries.to(keys.dtype).cpu()
