"""What a served memory holds: questions a second and how long each takes, by shards and clients.

    python experiments/machines/load.py --json load.json --entries 65536 --shards 0 1 2 4

0 shards is one process that searches the folder itself. A question for entries is that of a token
that is written: 8 heads ask for the 32 nearest of one layer. One for passages is that of a prompt:
16 tokens of 8 heads share their attention out over all entries, 64 words are looked up, and the
best four of 128 tokens are fetched. Clients are threads of one process, each of which asks when it
was answered. Entries are random, of one layer with 4 heads of width 64, in bfloat16; documents have
1,024 tokens. What is in the JSON already is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from memorizing.benchmark.preparing import describe_machine
from memorizing.huggingface.attaching.finding import Shelf, find_passages
from memorizing.huggingface.attaching.memory_layer import plan_open_heads
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.attaching.passages import Collection
from memorizing.huggingface.sessions.library import take_tokenizer
from memorizing.huggingface.sessions.stores import FolderStore
from memorizing.index_settings import parse_index
from memorizing.memory import FolderDescription, MemoryFolder, NewDocument, hash_text
from memorizing.ray import serve_memory
from memorizing.ray.asking import Shards
from memorizing.ray.cluster import join_cluster
from memorizing.ray.opening import Address, describe, find_replica
from memorizing.ray.served import ServedStore
from memorizing.storage.files import write_json

HEADS, GROUPS, WIDTH, DOCUMENT_LEN = 4, 2, 64, 1024
SETTINGS = MemorySettings(layers=(0,), read="both")
OPEN_HEADS = {0: plan_open_heads([True] * HEADS * GROUPS, HEADS, torch.device("cpu"))}
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="of a token for every byte")
    parser.add_argument("--entries", type=int, default=65_536)
    parser.add_argument("--shards", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        path = make_memory(Path(place) / "load", tokenizer, options.entries)
        for num_shards in options.shards:
            names = {
                (kind, clients): f"{kind}, {options.entries} entries, {num_shards} shards, "
                f"{clients} clients"
                for kind in ("entries", "passages")
                for clients in options.clients
            }
            if all(name in done for name in names.values()):
                continue
            with open_store(path, num_shards) as store:
                questions = make_questions(store, tokenizer)
                for (kind, clients), name in names.items():
                    done[name] = measure(questions[kind], clients, options.seconds)
                    print(name, done[name], flush=True)
                    write_json(options.json, {**done, "machine": describe_machine()})


def make_memory(path: Path, tokenizer: Any, num_entries: int) -> Path:
    """A memory of random entries, and random texts of as many tokens."""
    description = FolderDescription("load", (0,), HEADS, WIDTH, settings={})
    folder = MemoryFolder.create(path, take_tokenizer(description, tokenizer))
    generator = torch.Generator().manual_seed(0)
    documents = []
    for number in range(num_entries // DOCUMENT_LEN):
        letters = torch.randint(len(LETTERS), (DOCUMENT_LEN,), generator=generator)
        text = "".join(LETTERS[letter] for letter in letters.tolist())
        length = len(tokenizer(text)["input_ids"])
        places = torch.arange(length - DOCUMENT_LEN, length)
        documents.append(
            NewDocument(
                str(number), length, DOCUMENT_LEN, hash_text(text), text, entry_tokens=places
            )
        )
    shape = (HEADS, len(documents) * DOCUMENT_LEN, WIDTH)
    keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    folder.append(documents, {0: (keys, values)})
    return path


@contextlib.contextmanager
def open_store(path: Path, num_shards: int) -> Iterator[ServedStore | FolderStore]:
    """The memory in so many shards; 0 is this process."""
    if not num_shards:
        folder = MemoryFolder.open(path)
        yield FolderStore(path, folder, folder.description, parse_index("exact"))
        return
    with join_cluster(None, 2) as ray, serve_memory(path, num_shards=num_shards) as served:
        address = Address("auto", "load", 60.0)
        replicas = [[find_replica(ray, address, shard, 0)] for shard in range(num_shards)]
        shards = Shards(served.address, replicas, address.limit_s)
        described = describe(ray, address, served.address)
        yield ServedStore(shards, described, lambda: OPEN_HEADS, None)


def make_questions(store: Any, tokenizer: Any) -> dict[str, Callable[[int], object]]:
    """What is asked, by kind; of a number that draws it."""
    library = store.open_library(SETTINGS, tokenizer)
    layers = store.open_layers({0: torch.device("cpu")}, OPEN_HEADS)
    searched = library.shelve(Collection(tuple(library.num_entries), layers, library.read_ids))
    own = Shelf(Collection((), {}), None)

    def draw(number: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(number))

    def ask_entries(number: int) -> None:
        layers[0].retrieve(draw(number, 1, HEADS * GROUPS, 1, WIDTH), SETTINGS.num_neighbors)

    def ask_passages(number: int) -> None:
        queries = draw(number, HEADS * GROUPS, 16, WIDTH) / WIDTH**0.5
        ids = torch.tensor(tokenizer("some words of a prompt that is quoted " * 2)["input_ids"])
        places = {0: OPEN_HEADS[0].places}
        found = find_passages({0: queries}, places, ids, [searched, own], SETTINGS)
        assert found

    return {"entries": ask_entries, "passages": ask_passages}


def measure(ask: Callable[[int], object], num_clients: int, seconds: float) -> dict[str, float]:
    """Ask for so long; questions a second, and how long the middle one and one in 100 takes."""
    for number in range(5):
        ask(number)
    took: list[list[float]] = [[] for _ in range(num_clients)]
    end_s = time.perf_counter() + seconds

    def run(client: int) -> None:
        with torch.inference_mode():
            while (start_s := time.perf_counter()) < end_s:
                ask(client + num_clients * len(took[client]))
                took[client].append(time.perf_counter() - start_s)

    start_s = time.perf_counter()
    threads = [threading.Thread(target=run, args=(client,)) for client in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    all_s = time.perf_counter() - start_s
    every = sorted(sum(took, []))
    return {
        "questions": len(every),
        "per_s": round(len(every) / all_s, 1),
        "p50_ms": round(1e3 * every[len(every) // 2], 2),
        "p99_ms": round(1e3 * every[int(len(every) * 0.99)], 2),
    }


if __name__ == "__main__":
    main()
