"""A run measured on documents: with each memory, with the controls, against another run."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from memorizing.config import Config, DataConfig, ModelConfig, Use, check_capacity
from memorizing.data import (
    Document,
    TokenizedDocument,
    Tokenizer,
    load_splits,
    take_beginnings,
    tokenize_documents,
)
from memorizing.data.loader import hash_documents
from memorizing.errors import CheckpointError, CorpusError, ResourceError, TokenizerError
from memorizing.evaluation import (
    Control,
    EvaluationResult,
    Progress,
    check_capacities,
    compare_results,
    evaluate_capacities,
    evaluate_documents,
)
from memorizing.index_settings import parse_index
from memorizing.knn import make_index
from memorizing.memory import memory_bytes
from memorizing.metrics import Difference
from memorizing.ranks import ALONE, Ranks
from memorizing.training import (
    LoadedModel,
    choose_precision,
    load_model,
    measure_share,
    read_run_config,
)
from memorizing.training.run_folder import CONFIG_FILE

_PLAIN = ("run", "use", "precision", "index", "evaluate_s", "against")


@dataclass(frozen=True)
class RunReport:
    """What `report_run` measured. `to_dict` is the JSON of `memorizing evaluate`."""

    run: str
    corpus: tuple[str, ...]
    """Lines that say what was read."""
    use: Use
    results: dict[str, EvaluationResult]
    """By capacity as text, rising, then by control."""
    against: str | None
    baseline: EvaluationResult | None
    """The other run with the memory it was trained with."""
    differences: dict[str, Difference]
    """Of each result from the baseline; empty without one."""
    precision: str
    index: str
    """What searched the memories."""
    evaluate_s: float
    texts: str
    """SHA-256 of the documents' names and texts, before they were cut."""
    max_tokens: int
    """Of each document; 0 is all."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "corpus": list(self.corpus),
            "perplexity": {name: result.perplexity for name, result in self.results.items()},
            "bits_per_byte": {name: result.bits_per_byte for name, result in self.results.items()},
            "results": {name: result.to_dict() for name, result in self.results.items()},
            "baseline": self.baseline.to_dict() if self.baseline else None,
            "differences": {name: found.to_dict() for name, found in self.differences.items()},
        }


def report_run(
    run: Path,
    *,
    corpus: str | None = None,
    text_column: str = "text",
    use: Use | None = None,
    capacities: Sequence[int] | None = None,
    controls: Sequence[Control] | bool | None = None,
    against: Path | None = None,
    num_documents: int = 0,
    max_tokens: int | None = None,
    rows: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "fp32",
    index: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    spread: bool | None = None,
) -> RunReport:
    """Evaluate the last checkpoint of a run, and of another one on the same tokens.

    Args:
        run: a run folder; with `corpus` also a checkpoint or model folder.
        corpus: as `DataConfig.corpus`; None is the run's own.
        text_column: of `corpus`, as `DataConfig.text_column`.
        use: None is `validation` for the run's own corpus and `all` for another one.
        capacities: of the memory; None takes those of the run's configuration.
        controls: diagnostics at the largest capacity; None takes those of the run's configuration,
            as far as these documents and capacities have them. True takes them too, or all where
            the configuration names none; False none.
        against: another run with the same tokenizer. It reads with the memory it was trained with.
        num_documents: only the first documents of the corpus; 0 is all.
        max_tokens: only the first tokens of each document; 0 reads them whole, None as the run's
            configuration says.
        rows: documents side by side; None takes the run's setting. Results do not depend on it.
        precision: of products and activations, see `TrainingConfig.precision`.
        index: what searches the memories of `run`, as `parse_index` reads it; None takes its own.
        seed: of the shuffled values and of the bootstrap.
        device: where to evaluate; None is CUDA where there is a GPU, else the CPU.
        progress: called with the tokens read so far and in all, first of the other run.
        ranks: processes that read the documents together; each has the whole report.
        spread: all of them read every document, and each holds a part of every memory; None takes
            the run's setting.

    Raises:
        RunFolderError, CheckpointError: a folder is not a run, or its checkpoint cannot be used.
        CorpusError: an unknown corpus, or no document is held out for this use.
        TokenizerError: the other run has another tokenizer.
        ConfigError: a capacity that the model cannot have, or an index that is not known.
        IndexUnavailableError: the index needs a package that is not installed.
        ResourceError: memories of this capacity do not fit into the machine.
    """
    start_s = time.monotonic()
    device = ranks.find_device(device)
    loaded, tokenizer = _load(run, precision, device)
    if index is not None:
        loaded.model.config = dataclasses.replace(loaded.config, index=index)
    make_index(parse_index(loaded.model.config.index))  # a missing package is said before the work
    # A checkpoint or model folder, which only another corpus can be read with, has no recipe.
    is_run = corpus is None or (run / CONFIG_FILE).is_file()
    config = read_run_config(run) if is_run else Config(model=loaded.config)
    if capacities is None:
        capacities = config.evaluation.capacities if loaded.config.has_memory else (0,)
    for capacity in capacities:
        check_capacity(capacity, loaded.config.num_neighbors)
    other = None
    if against is not None:
        other, other_tokenizer = _load(against, precision, device)
        if tokenizer.fingerprint != other_tokenizer.fingerprint:
            raise TokenizerError(
                f"{run} and {against} have different tokenizers, so their tokens cannot be "
                "compared; evaluate each alone and compare bits per byte"
            )
    data = config.data if corpus is None else DataConfig(corpus=corpus, text_column=text_column)
    use = use or ("validation" if corpus is None else "all")
    rows = rows or config.evaluation.rows
    spread = config.evaluation.spread_memory if spread is None else spread
    if max_tokens is None:
        max_tokens = config.evaluation.max_tokens_per_document
    description, documents, texts = _read_documents(data, use, tokenizer, num_documents, max_tokens)
    controls, left_out = _choose_controls(controls, config, capacities, len(documents))
    longest = max(len(document.tokens) for document in documents)
    num_parts = ranks.size if spread else 1
    _check_memory(loaded.config, capacities, rows, longest, device, ranks, num_parts)
    read = [str(loaded.model.compute_dtype), loaded.model.config.index, hash_documents(documents)]
    ranks.check_equal("precision, index or list of documents", read)
    check_capacities(loaded.model, documents, capacities, controls, rows)
    settings: dict[str, Any] = {
        "rows": rows,
        "seed": seed,
        "progress": progress,
        "ranks": ranks,
        "spread": spread,
    }
    baseline = None
    if other is not None:
        baseline = evaluate_documents(
            other.model,
            documents,
            tokenizer.start_token,
            capacity=other.config.capacity if other.config.has_memory else 0,
            **settings,
        )
    results = evaluate_capacities(
        loaded.model,
        documents,
        tokenizer.start_token,
        capacities=capacities,
        controls=controls,
        **settings,
    )
    differences = {
        name: compare_results(result, baseline, seed=seed)
        for name, result in results.items()
        if baseline
    }
    return RunReport(
        run=str(run),
        corpus=(*description, *left_out),
        use=use,
        results=results,
        against=None if against is None else str(against),
        baseline=baseline,
        differences=differences,
        precision=str(loaded.model.compute_dtype).removeprefix("torch."),
        index=loaded.model.config.index,
        evaluate_s=time.monotonic() - start_s,
        texts=texts,
        max_tokens=max_tokens,
    )


def _load(
    run: Path, precision: Literal["auto", "fp32", "bf16"], device: torch.device
) -> tuple[LoadedModel, Tokenizer]:
    loaded = load_model(run, device=device)
    if loaded.tokenizer is None:
        raise CheckpointError(f"{run} has no tokenizer: it was trained on token ids, not on text")
    shape = loaded.config
    choice = choose_precision(precision, shape.model_dim, shape.ffn_dim, device)
    loaded.model.compute_dtype = choice.dtype
    return loaded, loaded.tokenizer


def _choose_controls(
    controls: Sequence[Control] | bool | None,
    config: Config,
    capacities: Sequence[int],
    num_documents: int,
) -> tuple[Sequence[Control], list[str]]:
    """The controls that are measured, and lines on those of a configuration that cannot be."""
    if controls is True:
        controls = config.evaluation.controls or get_args(Control)
    if controls is None and any(capacities):
        named = config.evaluation.controls
        chosen: list[Control] = [
            name for name in named if name != "other_document" or num_documents > 1
        ]
        line = "left out: the control other_document, which needs two documents"
        return chosen, [line] if len(chosen) < len(named) else []
    return controls or (), []


def _check_memory(
    model: ModelConfig,
    capacities: Sequence[int],
    rows: int,
    longest: int,
    device: torch.device,
    ranks: Ranks,
    num_parts: int,
) -> None:
    """Say what the largest memory takes before anything is read; none grows beyond a document."""
    capacity = min(max(capacities, default=0), longest)
    needed = memory_bytes(model, rows, capacity) // num_parts
    available = measure_share(device, ranks)
    if needed > available:
        raise ResourceError(
            f"memories of {capacity:,} entries in {rows:,} rows need {needed / 2**30:,.1f} GiB and "
            f"{available / 2**30:,.1f} GiB are free; lower the rows or the capacity"
        )


def _read_documents(
    data: DataConfig, use: Use, tokenizer: Tokenizer, num_documents: int, max_tokens: int
) -> tuple[tuple[str, ...], list[TokenizedDocument], str]:
    splits = load_splits(data)
    chosen: list[Document] = (
        [*splits.train, *splits.validation, *splits.test] if use == "all" else getattr(splits, use)
    )
    if not chosen:
        raise CorpusError(
            f"no document of {data.corpus!r} is held out for {use}: set data.{use} or "
            "data.held_out_share in the recipe, or read another corpus"
        )
    chosen = chosen[: num_documents or None]
    documents = tokenize_documents(chosen, tokenizer, max_tokens=data.max_document_tokens)
    documents = take_beginnings(documents, tokenizer, max_tokens)
    num_tokens = sum(len(document.tokens) for document in documents)
    read = f"evaluated on {use}: {len(documents)} documents of {num_tokens:,} tokens"
    if max_tokens:
        read += f", the first {max_tokens:,} of each"
    return (*splits.describe(), read), documents, _hash_texts(chosen)


def _hash_texts(documents: Sequence[Document]) -> str:
    """Whatever tokenizer reads them."""
    texts = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            content = part.encode("utf-8", errors="surrogatepass")
            texts.update(len(content).to_bytes(8, "little") + content)
    return texts.hexdigest()
