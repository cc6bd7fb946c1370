"""What approximate search costs in quality: perplexity and recall of each index, one trained model.

    python experiments/queue --run main/proofs-memory-seed0
    python experiments/approximate_search.py

Every index reads the same documents with the same weights. Recall is that of the queries of every
document's last segments, asked to the index over the memory as it is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from device_option import add_device_option
from held_out import load_documents, make_inputs
from rich.console import Console
from rich.table import Table

from memorizing.benchmark.indexes import RecordingIndex
from memorizing.benchmark.preparing import describe_machine
from memorizing.data import TokenizedDocument
from memorizing.evaluation import compare_results, evaluate_documents
from memorizing.evaluation.results import DocumentResult, EvaluationResult
from memorizing.index_settings import parse_index
from memorizing.knn import make_index, multiplies_bf16, recall_at_k
from memorizing.loss import compute_token_nats
from memorizing.model import MemorizingTransformer, evaluation_mode
from memorizing.storage.files import write_json
from memorizing.training import load_model, read_run_config

INDEXES = (
    "exact",
    "buckets:num_buckets=1024,per_bucket=1",
    "buckets:num_buckets=128,per_bucket=1",
    "buckets:num_buckets=32,per_bucket=1",
    "int8",
    "faiss_ivf",
    "faiss_ivf:num_probes=4",
    "faiss_ivf:num_probes=1",
)
SEARCHED_SEGMENTS = 2


def read_document(
    model: MemorizingTransformer,
    document: TokenizedDocument,
    start_token: int,
    capacity: int,
    index: str,
) -> tuple[DocumentResult, list[float]]:
    """The nats of every token, and the recall of the searches of the last segments."""
    device = model.embedding.weight.device
    inputs, targets = (part.to(device) for part in make_inputs(document, start_token))
    state = model.init_state(1, capacity, index=index)
    segment_len = model.config.segment_len
    starts = range(0, targets.shape[1], segment_len)
    nats, recalls = [], []
    for number, start in enumerate(starts):
        part = slice(start, start + segment_len)
        recorders = {}
        if number >= len(starts) - SEARCHED_SEGMENTS:
            for layer, memory in state.memories.items():
                memory.index = recorders[layer] = RecordingIndex(memory.index)
        output = model(inputs[:, part], state)
        nats.append(compute_token_nats(output.logits, targets[:, part])[0].cpu())
        for layer, recorder in recorders.items():
            memory = state.memories[layer]
            queries = recorder.queries[-1].to(memory.keys.dtype)
            found = recorder.index.search(queries, memory.stored_keys, model.config.num_neighbors)
            recalls.append(recall_at_k(found, queries, memory.stored_keys))
            memory.index = recorder.index
        state = output.state.commit()
    result = DocumentResult(document.name, torch.cat(nats).numpy(), document.num_bytes)
    return result, recalls


def measure(
    run_dir: Path, capacity: int, max_tokens: int, indexes: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """A row per index; the first is what the others are compared with."""
    config = read_run_config(run_dir)
    model, _, tokenizer = load_model(run_dir, device=device)
    assert tokenizer is not None
    model.compute_dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    documents = load_documents(config, tokenizer, max_tokens)
    off = evaluate_documents(model, documents, tokenizer.start_token, capacity=0)
    rows: list[dict[str, Any]] = [{"index": "no memory", "perplexity": off.perplexity}]
    exact: EvaluationResult | None = None
    for index in indexes:
        parse_index(index)
        make_index(parse_index(index))  # says at once where a package is missing
        with evaluation_mode(model):
            read = [
                read_document(model, document, tokenizer.start_token, capacity, index)
                for document in documents
            ]
        result = EvaluationResult(tuple(r for r, _ in read), capacity)
        recalls = [recall for _, found in read for recall in found]
        exact = exact or result
        rows.append(
            {
                "index": index,
                "recall": sum(recalls) / len(recalls),
                "perplexity": result.perplexity,
                "against_exact": compare_results(result, exact).to_dict(),
                "against_no_memory": compare_results(result, off).to_dict(),
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run", type=Path, default=Path("runs/experiments/main/proofs-memory-seed0")
    )
    parser.add_argument("--capacity", type=int, default=65_536)
    parser.add_argument("--tokens", type=int, default=32_768, help="of each document")
    parser.add_argument("--indexes", nargs="+", default=INDEXES)
    path = Path("experiments/results/approximate_search.json")
    parser.add_argument("--json", type=Path, default=path)
    about = "where documents are read; some indexes search on a CPU only"
    add_device_option(parser, "cpu", about)
    arguments = parser.parse_args()
    rows = measure(
        arguments.run, arguments.capacity, arguments.tokens, arguments.indexes, arguments.device
    )
    table = Table("index", "recall", "perplexity", "against exact", "against no memory")
    for row in rows:
        if "recall" not in row:
            table.add_row(row["index"], "", f"{row['perplexity']:.3f}", "", "")
            continue
        changes = [row[key]["perplexity_change"] for key in ("against_exact", "against_no_memory")]
        table.add_row(
            row["index"],
            f"{row['recall']:.3f}",
            f"{row['perplexity']:.3f}",
            *(f"{change:+.2%}" for change in changes),
        )
    Console().print(table)
    values = {
        "run": "/".join(arguments.run.parts[-2:]),
        "capacity": arguments.capacity,
        "tokens_per_document": arguments.tokens,
        "rows": rows,
        "machine": describe_machine(),
    }
    write_json(arguments.json, values)


if __name__ == "__main__":
    main()
