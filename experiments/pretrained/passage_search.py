"""Is the right place among the passages that are found, of ten thousand entries to ten million?

    python experiments/pretrained/needles.py --quotes FILES     # reads a million tokens
    python experiments/pretrained/passage_search.py             # goes on where it stopped

Prompts are those of `memorizing benchmark recall` (48 tokens) from the files newer than the model
that `needles.py` read; right is a passage that has the token after the prompt. Beside these files
stand as many documents of the haystack as make up a size. Where more is wanted than was read, the
haystack's documents stand there again: keys with noise of a tenth of the standard deviation of each
dimension, and one token in ten exchanged for one of another place.

- `first`, `four`: shares of prompts whose right place is the best, and among the best four, by
  heads and words together; `heads`, `words`: among four, by the one or the other alone;
- `kept`: share of the four passages of exact search that an index finds too;
- `search_ms`: processor time, median over prompts; `build_s` of the index.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import add_precision_option, make_parser, run_command
from needles import HEADS, MEMORY, NEWER, SEED
from smollm import PRECISIONS
from torch import Tensor

from memorizing import MemorySession, add_memory, open_memory
from memorizing.benchmark.memory_use.places import draw_quotes, encode_package
from memorizing.benchmark.preparing import describe_machine
from memorizing.errors import ConfigError
from memorizing.evaluation.answers import compute_wilson_interval
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.attaching.passages import (
    LAST_WORDS,
    Collection,
    Span,
    choose_among,
    choose_in,
    count_words,
    list_words,
    match_words,
    rank_part,
    share_out,
    sum_chunks,
    total_sums,
    weigh_words,
)
from memorizing.huggingface.loading import load_pretrained
from memorizing.index_settings import parse_index
from memorizing.memory.frozen import FrozenBlock, FrozenMemory, make_block
from memorizing.storage.files import write_json

RESULTS = Path("experiments/results/pretrained_passage_search.json")
(LAYER,) = HEADS
SIZES = (34_000, 100_000, 1_000_000, 10_000_000)
NOISE = 0.1
FOUR, PASSAGE_LEN, MARGIN = 4, 128, 20.0


@dataclass(frozen=True)
class Prompt:
    """What the last tokens of a text ask for, and where that stands."""

    entry: int
    """Of the token after it, among those of the newer files."""
    queries: Tensor
    """(P, T, D), as `sum_chunks` takes them."""
    ids: Tensor


@dataclass(frozen=True)
class Read:
    """The entries of a folder, those of the newer files first."""

    keys: Tensor
    """(n, D) of the head of keys that is searched."""
    values: Tensor
    ids: Tensor
    """(n,)"""
    lengths: list[int]
    """Entries per document."""
    num_newer: int
    """Documents that prompts are of."""
    places: Tensor
    """(F,): which of the queries find."""


def main() -> int:
    """Measure what is not measured yet, print, and write the JSON."""
    parser = make_parser(__doc__)
    add_precision_option(parser)
    parser.add_argument("--memory", type=Path, default=MEMORY)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--indexes", nargs="+", default=["exact"], help="exact is the first")
    parser.add_argument("--neighbors", type=int, default=32, help="of an index, per query")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS)
    return run_command(measure, parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Every size with every index; the JSON is written after each."""
    about = {"heads": {str(layer): heads for layer, heads in HEADS.items()}}
    about |= {"precision": options.precision}
    values: dict[str, Any] = {}
    if options.json.is_file():
        values = json.loads(options.json.read_text())
        if any(values.get(name) != value for name, value in about.items()):
            raise ConfigError(
                f"{options.json} is of other heads or another precision; give another --json"
            )
    model, tokenizer = load_pretrained(str(options.model), dtype=PRECISIONS[options.precision])
    add_memory(model, layers=[LAYER], heads=HEADS, read="passages")
    memory = open_memory(model, options.memory, tokenizer=tokenizer)
    with memory, torch.inference_mode():
        read = take_entries(model, memory)
        prompts = ask_all(model, tokenizer, memory, options.memory, options.prompts)
    for size in options.sizes:
        whole = fill_up(read, size)
        exact: list[list[int]] = []
        for index in options.indexes:
            name = f"{size} {index}"
            if name not in values or index == "exact":
                line, chunks = measure_size(whole, prompts, index, options.neighbors, exact)
                values[name] = line | {"really_read": min(size, len(read.ids))}
                exact = chunks if index == "exact" else exact
                print(f"{name}: {values[name]}", flush=True)
            values |= about
            values["machine"] = describe_machine()
            values["command"] = shlex.join(["python", *sys.argv])
            write_json(options.json, values)


def take_entries(model: Any, memory: MemorySession) -> Read:
    """What was read, as tensors in the order of the folder."""
    opened = get_attachment(model).opened
    assert opened is not None
    assert opened.library is not None
    blocks = [block.load() for block in opened.base[LAYER].blocks]
    names, lengths = opened.library.names, list(opened.library.num_entries)
    num_newer = sum(name.startswith(NEWER) for name in names)
    assert all(name.startswith(NEWER) for name in names[:num_newer])
    return Read(
        torch.cat([block.keys[0, 0] for block in blocks]),
        torch.cat([block.values[0, 0] for block in blocks]),
        opened.library.read_ids(),
        lengths,
        num_newer,
        opened.open_heads[LAYER].places,
    )


def ask_all(
    model: Any, tokenizer: Any, memory: MemorySession, path: Path, num_prompts: int
) -> list[Prompt]:
    """The prompts of `benchmark recall`, each through the layers below the one that finds."""
    attachment = get_attachment(model)
    opened = attachment.opened
    assert opened is not None
    assert opened.library is not None
    newer = [name for name in opened.library.names if name.startswith(NEWER)]
    texts = [(name, memory.read_text(name)) for name in newer]
    package = encode_package(tokenizer, "newer", texts)
    prompts = []
    for place in draw_quotes(package, num_prompts, prompt_len=48, answer_len=16, seed=SEED):
        ids = torch.tensor(place.prompt)
        cache = attachment.pass_cache(memory.new_cache())
        asked = attachment.ask(input_ids=ids.unsqueeze(0), **cache)
        number = newer.index(place.document)
        tokens, _ = opened.library.read_tokens(number)
        entry = int(torch.searchsorted(tokens, place.sources[0].token))
        first = opened.collection.first_entries[number]
        prompts.append(Prompt(first + entry, asked[LAYER][0].clone(), ids))
    return prompts


def fill_up(read: Read, size: int) -> Read:
    """The newer files, and documents of the haystack until there are so many entries."""
    newer = sum(read.lengths[: read.num_newer])
    generator = torch.Generator().manual_seed(SEED)
    keys, values, ids = [read.keys[:newer]], [read.values[:newer]], [read.ids[:newer]]
    lengths, total = read.lengths[: read.num_newer], newer
    deviation = NOISE * read.keys.float().std(0)
    is_copy = False
    while total < size:
        count = min(size - total, len(read.ids) - newer)
        part = slice(newer, newer + count)
        more, said = read.keys[part], read.ids[part]
        if is_copy:
            noise = torch.randn(more.shape, generator=generator) * deviation
            more = (more.float() + noise).to(more.dtype)
            is_other = torch.rand(count, generator=generator) < NOISE
            said = torch.where(is_other, said[torch.randperm(count, generator=generator)], said)
        keys.append(more)
        values.append(read.values[part])
        ids.append(said)
        left = count
        for length in read.lengths[read.num_newer :]:
            lengths = [*lengths, min(length, left)]
            left -= lengths[-1]
            if not left:
                break
        total, is_copy = total + count, True
    joined = (torch.cat(parts) for parts in (keys, values, ids))
    return Read(*joined, lengths, read.num_newer, read.places)


def choose(part: Collection, shares: Tensor, matches: Tensor) -> list[Span]:
    """The best spans by shares (T, c) and words (4, c)."""
    shares = part.join_next(shares)
    scores = rank_part(shares, matches, matches.logsumexp(1))
    return choose_among(choose_in(part, shares, scores, FOUR, PASSAGE_LEN), FOUR, MARGIN)


def measure_size(
    read: Read, prompts: Sequence[Prompt], index: str, neighbors: int, exact: list[list[int]]
) -> tuple[dict[str, Any], list[list[int]]]:
    """One line of the table, and the chunks that were found."""
    begun = time.process_time()
    block = make_block(read.keys[None, None], read.values[None, None], parse_index(index))
    build_s = time.process_time() - begun
    frozen = FrozenMemory(1, read.keys.shape[1], [FrozenBlock(len(read.ids), lambda: block)])
    part = Collection(tuple(read.lengths), {LAYER: frozen}, lambda: read.ids)
    assert len(part.ids) == len(part.is_sink)
    found: list[list[int]] = []
    seconds, ranks = [], {"heads": [], "words": [], "together": []}
    for prompt in prompts:
        start = time.process_time()
        queries, places = {LAYER: prompt.queries}, {LAYER: read.places}
        sums = sum_chunks(queries, places, part, neighbors)
        shares = share_out(
            sums, total_sums(sums), len(part.first_of_chunk), prompt.queries.shape[1]
        )
        words = list_words(prompt.ids[-LAST_WORDS:])
        counts = count_words(words, part)
        weights = weigh_words(words, (counts > 0).sum(1), counts.shape[1])
        matches = match_words(part, counts, weights)
        spans = choose(part, shares, matches)
        seconds.append(time.process_time() - start)
        found.append([span.chunk for span in spans])
        alone = {
            "heads": (shares, torch.zeros_like(matches)),
            "words": (torch.zeros_like(shares), matches),
        }
        ranks["together"].append(find_place(spans, prompt.entry))
        for name, told in alone.items():
            ranks[name].append(find_place(choose(part, *told), prompt.entry))
    count = len(prompts)
    num_first, num_four = (sum(rank <= most for rank in ranks["together"]) for most in (1, FOUR))
    kept = [
        len({*mine} & {*theirs}) / len(theirs)
        for mine, theirs in zip(found, exact, strict=False)
        if theirs
    ]
    line = {
        "entries": len(read.ids),
        "prompts": count,
        "first": num_first / count,
        "four": num_four / count,
        "interval_of_four": list(compute_wilson_interval(num_four, count)),
        "heads": sum(rank <= FOUR for rank in ranks["heads"]) / count,
        "words": sum(rank <= FOUR for rank in ranks["words"]) / count,
        "kept": statistics.mean(kept) if kept else None,
        "search_ms": 1000 * statistics.median(seconds),
        "build_s": build_s,
    }
    return line, found


def find_place(passages: Sequence[Span], entry: int) -> int:
    """The number, from 1, of the first passage that has an entry; 99 of none."""
    right = (number for number, one in enumerate(passages, 1) if one.start <= entry < one.end)
    return next(right, 99)


if __name__ == "__main__":
    sys.exit(main())
