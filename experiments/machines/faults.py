"""Kill machines while a memory is read and while it is served, and see whether anything was lost.

    python experiments/machines/faults.py --json faults.json --kills 50
    python experiments/machines/faults.py --json faults.json --kills 10 --kinds stopping head

The cluster is one of Ray's own on this machine: a head, and two nodes of which one is killed at a
random moment and replaced. Reading: what two workers have read must be what one process reads,
every document once. Serving: two shards, a replica of each on either node; an answer, whatever is
missing, must be that of the documents of the shards that answered, and after a while all answer
again. Stopping: all processes of a node stand still for ten seconds (SIGSTOP) and go on. Head: it
is killed while a memory is read and while one is served; whoever waits must end with an error that
names it within 30 seconds, and the folder must be whole and can be gone on with. Counts are in the
JSON, from which the same command goes on. The first failure ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
import ray
import torch
from ray.cluster_utils import Cluster

import memorizing
from memorizing.benchmark.preparing import describe_machine
from memorizing.errors import RankError
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
STOPPED_S, HEAD_S = 10.0, 30.0
KINDS = ("reading", "serving", "stopping", "head")


def main() -> None:
    """Kill as often as is asked for, half of the time each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a tiny one")
    parser.add_argument("--kills", type=int, default=50, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=["reading", "serving"], choices=KINDS)
    parser.add_argument("--kill-head", choices=("reading", "serving"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    for kind in KINDS:
        counts.setdefault(kind, {"kills": 0})

    def keep(kind: str, counted: dict[str, float]) -> None:
        add(counts[kind], counted)
        write_json(options.json, {**counts, "machine": describe_machine()})
        print(kind, counts[kind], flush=True)

    # A cluster without its head is of no more use, to nobody in this process.
    while (
        "head" in options.kinds
        and counts["head"]["kills"] < options.kills
        and not options.kill_head
    ):
        for doing in ("reading", "serving"):
            command = [sys.executable, __file__, *sys.argv[1:], "--kill-head", doing]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            keep("head", json.loads(told.splitlines()[-1]))
    model, tokenizer = load_pretrained(str(options.model), dtype=torch.float32)
    memorizing.add_memory(
        model, layers=[LAYER], window=32, segment_len=32, read="entries", dtype="float32"
    )
    with tempfile.TemporaryDirectory() as name, start_cluster() as cluster:
        place = Path(name)
        whole = memorizing.open_memory(model, place / "whole", keep_text=True)
        whole.read(tokenizer, DOCUMENTS, progress=False)
        if options.kill_head:
            kill_head(options.kill_head, cluster, model, tokenizer, place, options)
        while "reading" in options.kinds and counts["reading"]["kills"] < options.kills:
            keep("reading", kill_while_reading(cluster, model, tokenizer, place, options))
        for kind, break_one in (("serving", kill_a_node), ("stopping", stop_a_node)):
            left = options.kills - counts[kind]["kills"] if kind in options.kinds else 0
            for counted in break_while_serving(cluster, model, place, left, break_one):
                keep(kind, counted)


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
    """Kill one of the two with all that runs on it, at a random moment."""
    time.sleep(random.uniform(0, 0.3))
    node = random.choice(list(cluster.worker_nodes))
    cluster.remove_node(node, allow_graceful=False)


def stop_a_node(cluster: Cluster) -> None:
    """Let all processes of one of the two stand still for a while."""
    time.sleep(random.uniform(0, 0.3))
    node = random.choice(list(cluster.worker_nodes))
    (raylet,) = node.all_processes["raylet"]
    parent = psutil.Process(raylet.process.pid)
    stopped = [parent, *parent.children(recursive=True)]
    for one in stopped:
        one.suspend()
    time.sleep(STOPPED_S)
    for one in stopped:
        with suppress(psutil.NoSuchProcess):
            one.resume()


def kill_head(
    doing: str, cluster: Cluster, model: Any, tokenizer: Any, place: Path, options: Any
) -> NoReturn:
    """Kill the head while something is done, and print what came of it; ends this process."""
    killed: list[float] = []

    def kill() -> None:
        time.sleep(random.uniform(0, 1.0))
        killed.append(time.monotonic())
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)

    killer = threading.Thread(target=kill)
    path, said, took_s, told = place / "whole", "", 0.0, 0
    if doing == "reading":
        path = place / "read"
        memory = memorizing.open_memory(model, path, keep_text=True)
        readers = make_readers(options)

        def begin(name: str, num_tokens: int) -> None:
            if killer.ident is None:
                killer.start()
            # Longer than it takes to notice.
            time.sleep(0.7)

        try:
            memory.read(tokenizer, DOCUMENTS, progress=begin, readers=readers)
        except RankError as error:
            said, took_s = str(error), time.monotonic() - killed[0]
    else:
        with serve_memory(path, name="faults") as served, torch.no_grad():
            address = f"{served.address}?limit_s={LIMIT_S}"
            with memorizing.open_memory(model, address), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ask(model)
                killer.start()
                while not said:
                    assert not killed or time.monotonic() < killed[0] + 2 * HEAD_S, "not noticed"
                    try:
                        ask(model)
                    except RankError as error:
                        said, took_s = str(error), time.monotonic() - killed[0]
    assert "the head of the Ray cluster" in said, said
    assert took_s <= HEAD_S, took_s
    if doing == "reading":
        told = len(load_all(path))
        # Without the cluster, what is missing.
        with memorizing.open_memory(model, path, keep_text=True) as memory:
            memory.read(tokenizer, DOCUMENTS, progress=False)
    assert load_all(path) == load_all(place / "whole")
    counted = {
        "kills": 1,
        f"kills_{doing}": 1,
        f"slowest_{doing}_s": took_s,
        "documents_kept": told,
    }
    print(json.dumps(counted), flush=True)
    for node in cluster.list_all_nodes():
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    shutil.rmtree(place)
    os._exit(0)


def make_readers(options: argparse.Namespace) -> RayReaders:
    """Two workers."""
    load = partial(load_reader, str(options.model.resolve()), "float32", "cpu", None, {})
    return RayReaders(load, 2, num_bytes=0)


def kill_while_reading(
    cluster: Cluster, model: Any, tokenizer: Any, place: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Read once, and kill a node at a random moment after the first documents are there."""
    path = place / f"read-{random.randrange(2**32)}"
    readers = make_readers(options)
    killer: list[threading.Timer] = []

    def begin(name: str, num_tokens: int) -> None:
        if not killer:
            killer.append(threading.Timer(random.uniform(0, 0.7), kill_a_node, [cluster]))
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


def break_while_serving(
    cluster: Cluster,
    model: Any,
    place: Path,
    times: int,
    break_one: Callable[[Cluster], None],
) -> Iterator[dict[str, float]]:
    """Ask without a pause, break, ask until all answer again; what was counted, per fault."""
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
    for replicas in (1, 2) if times > 0 else ():
        with serve_memory(path, name="faults", num_replicas=replicas) as served:
            address = f"{served.address}?limit_s={LIMIT_S}"
            with memorizing.open_memory(model, address) as memory, torch.no_grad():
                for _ in range(times // 2 + times % 2 * (replicas == 1)):
                    yield ask_until_back(cluster, model, memory, expected, replicas, break_one)


def ask_until_back(
    cluster: Cluster,
    model: Any,
    memory: Any,
    expected: dict[Any, Any],
    replicas: int,
    break_one: Callable[[Cluster], None],
) -> dict[str, float]:
    """One fault."""
    breaking = threading.Thread(target=break_one, args=(cluster,))
    breaking.start()
    asked = whole = 0
    slowest_s, start_s, back = 0.0, time.monotonic(), 0
    while breaking.is_alive() or back < 20:
        # Nodes are made by the main thread only.
        if not breaking.is_alive() and len(cluster.worker_nodes) < 2:
            cluster.add_node(**NODE)
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
