"""Two settings of a memory on SmolLM2: what is nearest, and in how many bits it is stored.

    python experiments/pretrained/convert.py
    python experiments/corpora/build.py proofs code
    python experiments/pretrained/search_and_storage.py      # goes on where it stopped

Nothing is trained; the test documents are read in fp32 (on a GPU products are in TF32) with a local
window of 512 and the first four tokens.

- `gain`: change of perplexity by a memory of the same document whose nearest entries are those with
  the largest inner product, or, with `search="normalized"`, with the most similar direction. For
  each `calibrate` chooses layers, heads and bias itself.
- `recall`: of real queries, the last 512 of the first document, among the keys of all tokens before
  them, in bf16, by index and by kind of keys: layers are those of `gain`.
- `storage`: a document's first part is read into a folder, in fp32, bf16 or int8, and the nats of
  its rest are counted with that folder open and a memory of its own of 32 entries, which lie
  within the window: all that is retrieved comes from the folder. `none` is without a folder.

Nats of every token go to `runs/pretrained/search_and_storage`; numbers to the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training_free
from command_line import add_calibrations_option, make_parser, run_command
from documents import FAMILIES, TEST_TOKENS, Family, ReadDocument, load_documents
from smollm import load_smollm
from torch import Tensor
from training_free import find_heads, read_arm, restore_calibration
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memorizing import open_memory, remove_memory
from memorizing.benchmark.preparing import describe_machine
from memorizing.data import Tokenizer
from memorizing.evaluation.pretrained import evaluate_model
from memorizing.index_settings import parse_index
from memorizing.knn import StoredKeys, make_index
from memorizing.knn.recall import recall_at_k
from memorizing.metrics import compare_token_nats
from memorizing.storage.files import write_json

RESULTS = Path("experiments/results/pretrained_search_and_storage.json")
RUNS = Path("runs/pretrained/search_and_storage")
PARTS = ("gain", "storage", "recall")
SEARCHES = ("inner_product", "normalized")
STORAGES = ("none", "float32", "bfloat16", "int8")
INDEXES = ("exact", "int8", "buckets")
"""Those that need no other package; `int8` is for CPUs."""
NUM_QUERIES = 512
NUM_NEIGHBORS = 32


def main() -> int:
    """Measure what is not measured yet, print, and write the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=TEST_TOKENS, help="of each document")
    parser.add_argument("--documents", type=int, default=4, help="first test documents of a family")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder; nats of every token")
    add_calibrations_option(parser, training_free.NATS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    return run_command(measure, options)


def measure(options: argparse.Namespace) -> None:
    """Every part of every family; the JSON is written after each."""
    model, tokenizer = load_smollm(options.model, options.device)
    for part in options.parts:
        for family in options.families:
            documents = load_documents(
                family, "test", tokenizer, corpora=options.corpora, max_tokens=options.tokens
            )[: options.documents]
            run = {"gain": read_searches, "storage": read_storages, "recall": measure_recall}[part]
            run(model, tokenizer, family, documents, options)
            machine = options.runs / f"machine-{part}.json"
            if not machine.is_file():
                write_json(machine, describe_machine())
            report(options)


def find(
    model: Any, tokenizer: Tokenizer, family: Family, search: str, options: argparse.Namespace
) -> dict[str, Any]:
    """What `calibrate` finds for a search."""
    return find_heads(
        model, tokenizer, family, options.corpora, options.calibrations, search=search
    )


def read_searches(
    model: Any,
    tokenizer: Tokenizer,
    family: Family,
    documents: list[ReadDocument],
    options: argparse.Namespace,
) -> None:
    """Nats without a memory, and with one of each search."""
    for search in SEARCHES:
        found = find(model, tokenizer, family, search, options)
        restore_calibration(found).add_to(model)
        folder = options.runs / "gain" / family
        start_token = tokenizer.start_token
        read_arm(model, documents, start_token, "window", folder)
        read_arm(model, documents, start_token, "memory", folder / search)
        remove_memory(model)


def read_storages(
    model: Any,
    tokenizer: Tokenizer,
    family: Family,
    documents: list[ReadDocument],
    options: argparse.Namespace,
) -> None:
    """Nats of the last quarter of each document, its first part in a folder of each dtype."""
    found = find(model, tokenizer, family, SEARCHES[0], options)
    reader = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    for document in documents:
        for dtype in STORAGES:
            path = options.runs / "storage" / family / dtype / f"{document.name}.npy"
            if path.is_file():
                continue
            restore_calibration(found).add_to(model, capacity=NUM_NEIGHBORS)
            nats = read_rest(model, tokenizer, reader, document, dtype, options.runs / "folder")
            remove_memory(model)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, nats)
            print(f"storage {dtype}, {document.name}: {nats.mean():.4f}", flush=True)


def read_rest(
    model: Any,
    tokenizer: Tokenizer,
    reader: Any,
    document: ReadDocument,
    dtype: str,
    folder: Path,
) -> np.ndarray:
    """Nats of the last quarter, with what came before it in a folder."""
    begin = len(document.tokens) * 3 // 4
    rest = ReadDocument(document.name, "", document.tokens[begin:], 0)
    shutil.rmtree(folder, ignore_errors=True)
    stored = None if dtype == "none" else dtype
    with open_memory(model, folder if stored else None, dtype=stored) as memory:
        if stored:
            text = tokenizer.decode(document.tokens[:begin])
            memory.read(reader, [(document.name, text)], progress=False)
        result = evaluate_model(model, [rest], start_token=tokenizer.start_token)  # type: ignore[list-item]
    shutil.rmtree(folder, ignore_errors=True)
    return result.documents[0].token_nats


def measure_recall(
    model: Any,
    tokenizer: Tokenizer,
    family: Family,
    documents: list[ReadDocument],
    options: argparse.Namespace,
) -> None:
    """Recall of each index on the first document, by kind of keys and by layer."""
    path = options.runs / "recall" / f"{family}.json"
    if path.is_file():
        return
    values: dict[str, Any] = {"document": documents[0].name}
    layers = {
        search: [int(n) for n in find(model, tokenizer, family, search, options)["heads"]]
        for search in SEARCHES
    }
    wanted = sorted({layer for found in layers.values() for layer in found})
    collected = collect(model, documents[0], tokenizer.start_token, wanted)
    for search in SEARCHES:
        values[search] = {}
        for layer in layers[search]:
            queries, keys = collected[layer]
            if search == "normalized":
                norm = keys.norm(dim=-1, keepdim=True).mean(2, keepdim=True)
                keys = torch.nn.functional.normalize(keys, dim=-1) * norm
            values[search][layer] = compare_indexes(queries, keys.bfloat16())
            print(f"recall {family}, {search}, layer {layer}: {values[search][layer]}", flush=True)
    write_json(path, values)


@torch.inference_mode()
def collect(
    model: Any, document: ReadDocument, start_token: int, layers: list[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer, queries (1, H, NUM_QUERIES, D) at the distance of a memory, and keys before them.

    Keys are (1, H_kv, n, D). On the CPU, fp32, of the model without memory and with a context of
    512 tokens: each segment is read by itself.
    """
    taken: dict[tuple[int, str], list[Tensor]] = {}
    hooks = []
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        for name, projection in (("q", attention.q_proj), ("k", attention.k_proj)):
            parts = taken[layer, name] = []
            hooks.append(
                projection.register_forward_hook(
                    lambda _module, _inputs, output, parts=parts: parts.append(
                        output[0].float().cpu()
                    )
                )
            )
    tokens = torch.tensor([start_token, *document.tokens[:-1].tolist()])
    try:
        for piece in tokens.split(NUM_QUERIES):
            model.model(input_ids=piece[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    distance = torch.tensor([[NUM_QUERIES]], device=model.device)
    found = {}
    for layer in layers:
        head_dim = model.model.layers[layer].self_attn.head_dim
        queries, keys = (
            torch.cat(taken[layer, name]).unflatten(-1, (-1, head_dim)).transpose(0, 1)[None]
            for name in ("q", "k")
        )
        queries, keys = queries[:, :, -NUM_QUERIES:], keys[:, :, :-NUM_QUERIES]
        turn = model.model.rotary_emb(queries.to(model.device), distance)
        cos, sin = (part.cpu() for part in turn)
        found[layer] = apply_rotary_pos_emb(queries, queries, cos, sin)[0], keys.contiguous()
    return found


def compare_indexes(queries: Tensor, keys: Tensor) -> dict[str, float]:
    """Recall of the 32 nearest of each index."""
    num_heads = keys.shape[1]
    asked = queries.unflatten(1, (num_heads, -1)).flatten(2, 3).to(keys.dtype)
    stored = StoredKeys(keys, (keys.shape[2],))
    recalls = {}
    for spec in INDEXES:
        index = make_index(parse_index(spec))
        index.append(stored)
        recalls[spec] = recall_at_k(index.search(asked, stored, NUM_NEIGHBORS), asked, stored)
    return recalls


def report(options: argparse.Namespace) -> None:
    """Write all that is measured so far to the JSON."""
    values: dict[str, Any] = {"gain": {}, "storage": {}, "recall": {}}
    for family in FAMILIES:
        folder = options.runs / "gain" / family
        changes = {s: compare(folder / s / "memory", folder / "window") for s in SEARCHES}
        if found := {search: change for search, change in changes.items() if change}:
            values["gain"][family] = found | {"calibration": load_calibrations(family, options)}
        folder = options.runs / "storage" / family
        changes = {s: compare(folder / s, folder / "float32") for s in STORAGES if s != "float32"}
        if found := {dtype: change for dtype, change in changes.items() if change}:
            values["storage"][family] = found
        path = options.runs / "recall" / f"{family}.json"
        if path.is_file():
            values["recall"][family] = json.loads(path.read_text(encoding="utf-8"))
    machines = {part: options.runs / f"machine-{part}.json" for part in PARTS}
    values |= {
        "machines": {
            part: json.loads(path.read_text(encoding="utf-8"))
            for part, path in machines.items()
            if path.is_file()
        },
        "command": shlex.join(["python", *sys.argv]),
    }
    write_json(options.json, values)
    for part, bases in (("gain", "no memory"), ("storage", "float32")):
        for family, changes in values[part].items():
            for name, change in changes.items():
                if "perplexity_change" in change:
                    print(f"{family}, {name} against {bases}: {change['perplexity_change']:+.2%}")


def load_calibrations(family: Family, options: argparse.Namespace) -> dict[str, Any]:
    """Heads and bias of both searches."""
    kept = {}
    for path in sorted(options.calibrations.glob(f"calibration-{family}-*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        kept[values.get("search", SEARCHES[0])] = {
            key: values[key] for key in ("heads", "bias", "nats_without", "nats_with")
        }
    return kept


def compare(mine: Path, base: Path) -> dict[str, Any]:
    """Change of perplexity on the documents that both have read, with each document's."""
    names = sorted({p.name for p in mine.glob("*.npy")} & {p.name for p in base.glob("*.npy")})
    if not names:
        return {}
    pairs = [(np.load(mine / name), np.load(base / name)) for name in names]
    difference = compare_token_nats([a for a, _ in pairs], [b for _, b in pairs])
    each = {
        name.removesuffix(".npy"): math.expm1(float(np.mean(a - b, dtype=np.float64)))
        for name, (a, b) in zip(names, pairs, strict=True)
    }
    return difference.to_dict() | {"documents": each}


if __name__ == "__main__":
    sys.exit(main())
