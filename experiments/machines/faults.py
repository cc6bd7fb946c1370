"""Kill machines while a memory is read and while it is served, and see whether anything was lost.

    python experiments/machines/faults.py --json faults.json --kills 50

The cluster is one of Ray's own on this machine: a head, and two nodes of which one is killed at a
random moment and replaced. Reading: what two workers have read must be what one process reads,
every document once. Serving: two shards, a replica of each on either node; an answer, whatever is
missing, must be that of the documents of the shards that answered, and after a while all answer
again. Counts are in the JSON, from which the same command goes on. The first failure ends it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster

import memorizing
from memorizing.benchmark.preparing import describe_machine
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.loading import load_pretrained
from memorizing.memory import MemoryFolder
from memorizing.ray import RayReaders, serve_memory
from memorizing.ray.cluster import NAMESPACE
from memorizing.ray.reading import load_reader
from memorizing.ray.serving import divide
from memorizing.storage.files import write_json

NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
DOCUMENTS = {
    f"document {number}": " ".join(f"{number} {word * 7919 % 997}" for word in range(120))
    for number in range(40)
}
LAYER, NUM_NEIGHBORS, LIMIT_S, BACK_S = 1, 16, 3.0, 90.0


def main() -> None:
    """Kill as often as is asked for, half of the time each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a tiny one")
    parser.add_argument("--kills", type=int, default=50, help="while reading, and while serving")
    parser.add_argument("--kinds", nargs="+", default=["reading", "serving"])
    options = parser.parse_args()
    counts: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    for kind in ("reading", "serving"):
        counts.setdefault(kind, {"kills": 0})
    model, tokenizer = load_pretrained(str(options.model), dtype=torch.float32)
    memorizing.add_memory(
        model, layers=[LAYER], window=32, segment_len=32, read="entries", dtype="float32"
    )
    with tempfile.TemporaryDirectory() as name, start_cluster() as cluster:
        place = Path(name)
        whole = memorizing.open_memory(model, place / "whole", keep_text=True)
        whole.read(tokenizer, DOCUMENTS, progress=False)
        while "reading" in options.kinds and counts["reading"]["kills"] < options.kills:
            add(counts["reading"], kill_while_reading(cluster, model, tokenizer, place, options))
            write_json(options.json, {**counts, "machine": describe_machine()})
            print("reading", counts["reading"], flush=True)
        left = options.kills - counts["serving"]["kills"] if "serving" in options.kinds else 0
        for counted in kill_while_serving(cluster, model, tokenizer, place, left):
            add(counts["serving"], counted)
            write_json(options.json, {**counts, "machine": describe_machine()})
            print("serving", counts["serving"], flush=True)


def add(counts: dict[str, Any], more: dict[str, float]) -> None:
    """Sums, and of what ends with `_s` the most."""
    for key, value in more.items():
        before = counts.get(key, 0)
        counts[key] = round(max(before, value), 2) if key.endswith("_s") else before + value


@contextmanager
def start_cluster() -> Iterator[Cluster]:
    """A head that runs nothing, and two nodes."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False},
    )
    for _ in range(2):
        cluster.add_node(**NODE)
    ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_a_node(cluster: Cluster) -> None:
    """Kill one of the two with all that runs on it."""
    node = random.choice(list(cluster.worker_nodes))
    cluster.remove_node(node, allow_graceful=False)


def kill_while_reading(
    cluster: Cluster, model: Any, tokenizer: Any, place: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Read once, and kill a node at a random moment after the first documents are there."""
    path = place / f"read-{random.randrange(2**32)}"
    load = partial(load_reader, str(options.model.resolve()), "float32", "cpu", None, {})
    readers = RayReaders(load, 2, num_bytes=0)
    killer: list[threading.Timer] = []

    def begin(name: str, num_tokens: int) -> None:
        if not killer:
            killer.append(threading.Timer(random.uniform(0, 1.0), kill_a_node, [cluster]))
            killer[0].start()
        # As long as a model of a common size takes.
        time.sleep(0.02)

    start_s = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = memorizing.open_memory(model, path, keep_text=True)
        report = memory.read(tokenizer, DOCUMENTS, progress=begin, readers=readers)
    took_s = time.monotonic() - start_s
    killer[0].join()
    cluster.add_node(**NODE)
    assert report.num_documents == len(DOCUMENTS), report
    assert load_all(path) == load_all(place / "whole")
    return {"kills": 1, "workers_died": readers.num_deaths, "slowest_read_s": took_s}


def load_all(path: Path) -> dict[str, tuple[str, bytes]]:
    """Per document its text and its entries."""
    folder = MemoryFolder.open(path)
    folder.verify()
    found = {}
    for one in folder.documents:
        ((_, entries),) = folder.contents.read_entries(one, torch.arange(one.num_entries))
        content = b"".join(part.contiguous().numpy().tobytes() for part in entries)
        found[one.name] = (folder.contents.read_text(one.name), content)
    return found


def kill_while_serving(
    cluster: Cluster, model: Any, tokenizer: Any, place: Path, kills: int
) -> Iterator[dict[str, float]]:
    """Ask without a pause, kill, ask until all answer again; what was counted, per kill."""
    path = place / "whole"
    documents = MemoryFolder.open(path).documents
    edges = divide([one.num_entries for one in documents], 2)
    shards = [[one.name for one in part] for part in (documents[: edges[1]], documents[edges[1] :])]
    expected = {}
    for held in ((0, 1), (0,), (1,)):
        names = [name for shard in held for name in shards[shard]]
        with memorizing.open_memory(model, path, documents=names), torch.no_grad():
            expected[held] = ask(model)
    expected[()] = expected[(0,)][:0]
    for replicas in (1, 2) if kills > 0 else ():
        with serve_memory(path, name="faults", num_replicas=replicas) as served:
            address = f"{served.address}?limit_s={LIMIT_S}"
            with memorizing.open_memory(model, address) as memory, torch.no_grad():
                for _ in range(kills // 2 + kills % 2 * (replicas == 1)):
                    yield ask_until_back(cluster, model, memory, expected, replicas)


def ask_until_back(
    cluster: Cluster, model: Any, memory: Any, expected: dict[Any, Any], replicas: int
) -> dict[str, float]:
    """One kill."""
    killer = threading.Timer(random.uniform(0, 0.3), kill_a_node, [cluster])
    killer.start()
    asked = whole = 0
    slowest_s, start_s, back, is_new = 0.0, time.monotonic(), 0, False
    while killer.is_alive() or back < 20:
        if not killer.is_alive() and not is_new:
            # Nodes are made by the main thread only.
            cluster.add_node(**NODE)
            is_new = True
        before, begun_s = dict(memory.left_out), time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = ask(model)
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
        held = tuple(s for s in (0, 1) if memory.left_out.get(s, 0) == before.get(s, 0))
        assert found == expected[held], (held, found, expected[held])
        asked, whole = asked + 1, whole + (held == (0, 1))
        back = back + 1 if held == (0, 1) else 0
        assert time.monotonic() - start_s < BACK_S, "it did not come back"
        time.sleep(0.02)
    return {
        "kills": 1,
        f"kills_with_{replicas}_replicas": 1,
        f"questions_with_{replicas}_replicas": asked,
        f"answered_whole_with_{replicas}_replicas": whole,
        f"slowest_answer_with_{replicas}_replicas_s": slowest_s,
        f"longest_outage_with_{replicas}_replicas_s": time.monotonic() - start_s,
    }


def ask(model: Any) -> list[tuple[float, float]]:
    """Scores and values of what is retrieved, best first, rounded as numbers are added."""
    opened = get_attachment(model).opened
    assert opened is not None
    base = opened.base[LAYER]
    heads, width = base.num_heads, 10
    queries = torch.randn(1, 2 * heads, 1, width, generator=torch.Generator().manual_seed(7))
    found = []
    for part in base.retrieve(queries, NUM_NEIGHBORS):
        kept = part.neighbors.valid
        values = part.fetch_values().sum(-1)[kept]
        found += zip(part.neighbors.scores[kept].tolist(), values.tolist(), strict=True)
    return sorted((round(score, 4), round(value, 4)) for score, value in found)


if __name__ == "__main__":
    main()
