"""A memory of many entries: what is resident, and how long it takes to open and to search.

    python experiments/larger_than_ram.py --json FILE --place FOLDER --millions 4   # ten minutes

One head of width 128, keys and values in bfloat16, in segments of a million entries. Keys are
8,192 centers with noise of 0.7 of their spread, of length 1; queries are stored keys with noise of
0.3. Every measurement is a process of its own. Resident is sampled: what is the process's own, and
what it has mapped of files, which the system may drop. Recall is of the 32 nearest, by exact
search. What is in the JSON already is not measured again. 20 millions take ten minutes of a core
and 16 GB of the disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memorizing.benchmark.preparing import describe_machine
from memorizing.index_settings import parse_index
from memorizing.memory.disk import FolderDescription, MemoryFolder, NewDocument, hash_text
from memorizing.model.block import normalize
from memorizing.storage.files import write_json

WIDTH, SEGMENT, DOCUMENT, CENTERS = 128, 2**20, 2**16, 8192
INDEX = "faiss_ivf:num_lists=1024,num_probes=8,num_bits=8,oversample=2"
NUM_NEIGHBORS, NUM_QUERIES, NUM_COMPARED = 32, 200, 20


def main() -> None:
    """Measure what is missing, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--place", type=Path, required=True, help="a folder on a disk")
    parser.add_argument("--millions", type=int, default=4)
    parser.add_argument("--index", default=INDEX)
    parser.add_argument("--do", choices=sorted(STEPS), help="measure this here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.do:
        print(json.dumps(STEPS[options.do](options)))
        return
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    for name in STEPS:
        if name not in done:
            command = [sys.executable, __file__, *sys.argv[1:], "--do", name]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            done[name] = json.loads(told.splitlines()[-1])
            print(name, done[name], flush=True)
            write_json(options.json, {**done, "machine": describe_machine()})


def measure(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an action tells, its seconds, and the most MiB resident while it went on."""
    most, ended = {"own_mib": 0, "mapped_mib": 0, "resident_mib": 0}, threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = dict(line.split(":", 1) for line in lines)
            for name, field in (
                ("own_mib", "RssAnon"), ("mapped_mib", "RssFile"), ("resident_mib", "VmRSS")
            ):  # fmt: skip
                most[name] = max(most[name], int(found[field].split()[0]) // 1024)

    thread = threading.Thread(target=sample)
    thread.start()
    start_s = time.perf_counter()
    told = act()
    took_s = time.perf_counter() - start_s
    ended.set()
    thread.join()
    return {**told, "seconds": round(took_s, 2), **most}


def make_keys(number: int) -> torch.Tensor:
    """Keys of a segment (1, SEGMENT, WIDTH)."""
    centers = torch.randn(CENTERS, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(number + 1)
    chosen = torch.randint(CENTERS, (SEGMENT,), generator=generator)
    noise = torch.randn(SEGMENT, WIDTH, generator=generator)
    return normalize(centers[chosen] + 0.7 * noise).bfloat16().unsqueeze(0)


def write(options: argparse.Namespace) -> dict[str, Any]:
    """Segments, one after another."""

    def act() -> dict[str, Any]:
        folder = MemoryFolder.create(
            options.place / "large", FolderDescription("x", (0,), 1, WIDTH)
        )
        for number in range(options.millions):
            keys = make_keys(number)
            first = number * (SEGMENT // DOCUMENT)
            documents = [
                NewDocument(str(first + one), DOCUMENT, DOCUMENT, hash_text(""), None)
                for one in range(SEGMENT // DOCUMENT)
            ]
            folder.append(documents, {0: (keys, keys.roll(1, -1))})
        return {"entries": folder.num_entries, "segments": len(folder.contents.segments)}

    return measure(act)


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Indexes of all segments."""

    def act() -> dict[str, Any]:
        MemoryFolder.open(options.place / "large").save_indexes(parse_index(options.index))
        return {}

    return measure(act)


def open_folder(options: argparse.Namespace) -> dict[str, Any]:
    """Open, and nothing else."""
    return measure(lambda: {"entries": MemoryFolder.open(options.place / "large").num_entries})


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Load what is searched, then ask, a query at a time."""
    queries = draw_queries()
    folder = MemoryFolder.open(options.place / "large")
    memory = folder.open_layer(0, index=parse_index(options.index))
    loaded = measure(lambda: memory.prepare() or {})
    took_s: list[float] = []
    worked_s: list[float] = []
    found: list[list[int]] = []

    def act() -> dict[str, Any]:
        for one in queries:
            start_s, begun_s = time.perf_counter(), time.process_time()
            parts = memory.retrieve(one.view(1, 1, 1, WIDTH), NUM_NEIGHBORS)
            took_s.append(time.perf_counter() - start_s)
            worked_s.append(time.process_time() - begun_s)
            found.append(
                [
                    first + int(slot)
                    for part, first in zip(parts, memory.first_entries, strict=True)
                    for slot in part.neighbors.slots[part.neighbors.valid]
                ]
            )
        return {}

    asked = measure(act)
    return {
        "load": loaded,
        "ask": asked,
        "first_ms": round(1e3 * took_s[0], 1),
        "processor_ms": round(1e3 * statistics.median(worked_s), 2),
        "median_ms": round(1e3 * statistics.median(took_s), 2),
        "p99_ms": round(1e3 * sorted(took_s)[int(0.99 * len(took_s))], 2),
        "found": found[:NUM_COMPARED],
    }


def draw_queries() -> torch.Tensor:
    """Keys of the first segment with noise."""
    keys = make_keys(0)[0]
    generator = torch.Generator().manual_seed(99)
    chosen = torch.randint(SEGMENT, (NUM_QUERIES,), generator=generator)
    noise = 0.3 * torch.randn(NUM_QUERIES, WIDTH, generator=generator) / WIDTH**0.5
    return normalize(keys[chosen].float() + noise)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The share of the nearest, by a product with all keys, that was found."""
    found = json.loads(options.json.read_text())["search"]["found"]
    asked = draw_queries()[:NUM_COMPARED].bfloat16().float()
    best, entries = torch.empty(NUM_COMPARED, 0), torch.empty(NUM_COMPARED, 0, dtype=torch.int64)
    for number in range(options.millions):
        scores, places = (asked @ make_keys(number)[0].float().T).topk(NUM_NEIGHBORS)
        best = torch.cat([best, scores], 1)
        entries = torch.cat([entries, places + number * SEGMENT], 1)
    nearest = entries.gather(1, best.topk(NUM_NEIGHBORS).indices).tolist()
    hits = [len({*right} & {*mine}) for right, mine in zip(nearest, found, strict=True)]
    return {"of_nearest": round(sum(hits) / (NUM_COMPARED * NUM_NEIGHBORS), 4)}


def forget(options: argparse.Namespace) -> dict[str, Any]:
    """A document of the first segment."""

    def act() -> dict[str, Any]:
        folder = MemoryFolder.open(options.place / "large")
        folder.forget("3")
        return {"entries": folder.num_entries}

    return measure(act)


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """All of it, into another folder."""

    def act() -> dict[str, Any]:
        merged = MemoryFolder.merge([options.place / "large"], options.place / "merged")
        return {"entries": merged.num_entries}

    return measure(act)


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "write": write, "open": open_folder, "build": build, "search": search, "recall": compare,
    "forget": forget, "merge": merge,
}  # fmt: skip


if __name__ == "__main__":
    main()
