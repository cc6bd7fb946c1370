"""How long a round of questions takes with 1 to 1,000 shards: asked, planned and simulated.

    python experiments/machines/tail.py --json tail.json --tokenizer FOLDER   # some four minutes

*Asking*: shards that compute nothing; a few processes answer for all of them, so that what is
measured is whoever asks, Ray, and the merging of what all found. Two numbers are fitted to it: of a
round, and of each shard. *Search*: a memory in one shard, of two sizes of which two more are taken,
bytes of keys a second and what a search takes at any size; of other sizes `memorizing plan` says
how long a round takes, beside what is measured. All these are the quickest rounds, as others may
use the machine. *Tail*: with every shard on a machine of its own, a round ends with the slowest;
how much later than the quickest a shard answers is drawn from all rounds that were measured of one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import load
import numpy as np
import torch
from transformers import AutoTokenizer

from memorizing.benchmark.preparing import describe_machine
from memorizing.memory.disk import FolderDescription
from memorizing.memory.frozen import FrozenMemory
from memorizing.planning import ServingHardware, plan_serving
from memorizing.ray.asking import Replica, Shards
from memorizing.ray.cluster import join_cluster
from memorizing.ray.served import ServedMemory
from memorizing.ray.shard import pack
from memorizing.ray.wire import decode, encode
from memorizing.storage.files import write_json

NUM_NEIGHBORS, QUERY_HEADS, PROCESSES = 32, load.HEADS * load.GROUPS, 2
FITTED = (16_384, 65_536)
"""Entries that the speed of a search is taken from, and what it takes at any size."""
OTHERS = (32_768, 131_072)


class Answering:
    """A shard that has found something already."""

    def __init__(self) -> None:
        """Find it."""
        keys, values = torch.randn(2, load.HEADS, 64, load.WIDTH).bfloat16()
        memory = FrozenMemory.from_tensors(keys, values)
        self.found = encode(tuple(map(pack, memory.retrieve(make_queries(0), NUM_NEIGHBORS))))

    def ask(self, view: str, method: str, arguments: bytes) -> bytes:
        """The same, whatever is asked."""
        decode(arguments)
        return self.found


def make_queries(number: int) -> torch.Tensor:
    """Of a token that is written."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1, QUERY_HEADS, 1, load.WIDTH, generator=generator)


def main() -> None:
    """Measure what is missing, then plan and simulate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="of a token for every byte")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 16, 64, 256, 1000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Workers import this folder's scripts as this process does.
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    with join_cluster(None, 2) as ray, torch.inference_mode():
        for num_shards in options.shards:
            name = f"asking {num_shards}"
            if name not in done:
                done[name] = ask_nothing(ray, num_shards)
                write_json(options.json, done)
        for num_entries in (*FITTED, *OTHERS):
            name = f"search {num_entries}"
            if name not in done:
                with tempfile.TemporaryDirectory() as place:
                    path = load.make_memory(Path(place) / "load", tokenizer, num_entries)
                    done[name] = search(path, tokenizer)
                write_json(options.json, done)
    done |= {"machine": describe_machine(), "planned": compare(done, options.shards)}
    done["tail"] = simulate(done, options.shards)
    write_json(options.json, done)
    print(json.dumps({key: done[key] for key in ("planned", "tail")}, indent=1))


def summarize(took_s: list[float]) -> dict[str, Any]:
    """Milliseconds: the least, the middle, one in 100, and all."""
    took = sorted(1e3 * one for one in took_s)
    return {
        "least": round(took[0], 2),
        "p50": round(took[len(took) // 2], 2),
        "p99": round(took[int(0.99 * len(took))], 2),
        "all": [round(one, 2) for one in took],
    }


def time_rounds(ask: Any, seconds: float) -> dict[str, Any]:
    """Ask one after another for so long, after some that are not counted."""
    for number in range(5):
        ask(number)
    took, end_s = [], time.perf_counter() + seconds
    while (start_s := time.perf_counter()) < end_s:
        ask(len(took))
        took.append(time.perf_counter() - start_s)
    return summarize(took)


def ask_nothing(ray: Any, num_shards: int) -> dict[str, Any]:
    """Rounds of shards that compute nothing."""
    make = ray.remote(Answering).options(num_cpus=0).remote
    actors = [make() for _ in range(min(PROCESSES, num_shards))]
    ray.get([actor.ask.remote("", "", encode(())) for actor in actors])
    replicas = [[Replica("", actors[number % len(actors)])] for number in range(num_shards)]
    shards = Shards("", replicas, 60.0)
    description = FolderDescription("x", (0,), load.HEADS, load.WIDTH)
    firsts = [[64 * number] for number in range(num_shards)]
    memory = ServedMemory(shards, 0, load.HEADS, description, firsts, 64 * num_shards)
    found = time_rounds(lambda number: memory.retrieve(make_queries(number), NUM_NEIGHBORS), 8.0)
    for actor in actors:
        ray.kill(actor)
    return found


def search(path: Path, tokenizer: Any) -> dict[str, Any]:
    """Rounds of one shard that searches."""
    with load.open_store(path, 1) as store:
        return time_rounds(load.make_questions(store, tokenizer)["entries"], 20.0)


def compare(done: dict[str, Any], shards: list[int]) -> dict[str, Any]:
    """What is fitted, and rounds as planned with it beside the quickest that were measured."""
    asked = [done[f"asking {number}"]["least"] for number in shards]
    weights = 1 / np.array(asked)  # so that each counts by its share
    shard_ms, round_ms = np.polyfit(shards, asked, 1, w=weights)
    key_bytes = 2 * load.HEADS * load.WIDTH
    few, many = (done[f"search {number}"]["least"] for number in FITTED)
    entry_ms = (many - few) / (FITTED[1] - FITTED[0])
    search_ms = many - FITTED[1] * entry_ms - round_ms - shard_ms
    hardware = ServingHardware(
        search_gb_s=key_bytes / entry_ms / 1e6, search_ms=max(0.0, float(search_ms)),
        round_ms=float(round_ms), shard_ms=float(shard_ms), network_gb_s=1e6,
    )  # fmt: skip
    rows = [
        {"what": f"asking {n}", "measured": ms, "planned": round(round_ms + n * shard_ms, 2)}
        for n, ms in zip(shards, asked, strict=True)
    ]
    with tempfile.TemporaryDirectory() as place:
        config = {
            "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": QUERY_HEADS,
            "num_key_value_heads": load.HEADS, "head_dim": load.WIDTH,
            "hidden_size": QUERY_HEADS * load.WIDTH, "vocab_size": 7, "intermediate_size": 7,
        }  # fmt: skip
        (Path(place) / "config.json").write_text(json.dumps(config))
        for entries in (*FITTED, *OTHERS):
            planned = plan_serving(place, entries, 1, hardware, read="entries")
            measured = done[f"search {entries}"]["least"]
            rows.append(
                {
                    "what": f"search {entries}",
                    "measured": measured,
                    "planned": round(planned["ms"]["all"], 2),
                }
            )
    for row in rows:
        row["ratio"] = round(row["planned"] / row["measured"], 3)
    return {
        "round_ms": round(float(round_ms), 3),
        "shard_ms": round(float(shard_ms), 3),
        "search_gb_s": round(hardware.search_gb_s, 3),
        "search_ms": round(hardware.search_ms, 3),
        "rows": rows,
    }


def simulate(done: dict[str, Any], shards: list[int]) -> list[dict[str, float]]:
    """Rounds whose shards search as many entries each as the first, on machines of their own.

    Every shard answers as much later than the quickest as one that was measured, drawn for itself.
    """
    generator, fitted = np.random.default_rng(0), done["planned"]
    first = done[f"search {FITTED[1]}"]
    later = np.array(first["all"]) - first["least"]
    rows = []
    for number in shards:
        slowest = np.concatenate(
            [generator.choice(later, (100, number)).max(1) for _ in range(math.ceil(10_000 / 100))]
        )
        whole = first["least"] + (number - 1) * fitted["shard_ms"] + slowest
        rows.append(
            {
                "shards": number,
                "p50_ms": round(float(np.quantile(whole, 0.5)), 1),
                "p99_ms": round(float(np.quantile(whole, 0.99)), 1),
                "of_it_asking_ms": round(fitted["round_ms"] + number * fitted["shard_ms"], 1),
            }
        )
    return rows


if __name__ == "__main__":
    main()
