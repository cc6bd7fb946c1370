"""What a memory of 65,536 entries costs SmolLM2 when it reads and when it writes.

    python experiments/pretrained/convert.py
    python experiments/pretrained/speed.py

Each line is a ratio to the same model without memory, with the same window of 512: calls in turns,
after one of each that is not counted, medians. Entries are those of 2,048 tokens of real code, each
written 32 times with a little noise, so that the search has as many near keys as far ones.

- `reading`: `MemorySession.read`, which computes nothing above the memory layer, against a forward
  pass over the same segment;
- `segment`: a forward pass over a segment that retrieves for every token;
- `decoding`: one token behind a full window, median of 24.

The last two also with the layers that `calibrate` chose on code, with all of their heads and with
those that it chose: closed heads are not searched for.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import training_free
from command_line import add_calibrations_option, make_parser
from smollm import describe_precision, load_smollm
from training_free import find_heads

import memorizing
from memorizing.benchmark.preparing import describe_machine
from memorizing.devices import synchronize
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.sessions.reading import read_tokens
from memorizing.memory import FrozenMemory
from memorizing.storage.files import write_json

RESULTS = Path("experiments/results/pretrained_speed.json")
SEGMENT, NUM_REAL, NUM_ENTRIES, NUM_DECODED = 512, 2048, 65_536, 24
CALIBRATED_ON = "code"
Heads = dict[int, tuple[int, ...]]
"""Per layer, heads of queries that read; none named is all."""


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[18])
    parser.add_argument("--pairs", type=int, default=7)
    add_calibrations_option(parser, training_free.NATS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, tokenizer = load_smollm(options.model, options.device)
    found = find_heads(model, tokenizer, CALIBRATED_ON, options.corpora, options.calibrations)
    chosen = {int(layer): tuple(heads) for layer, heads in found["heads"].items()}
    num_heads = model.config.num_attention_heads * len(chosen)
    num_open = sum(map(len, chosen.values()))
    arms: dict[str, Heads] = {
        "": dict.fromkeys(options.layers, ()),
        f", {len(chosen)} layers": dict.fromkeys(chosen, ()),
        f", {len(chosen)} layers, {num_open} of {num_heads} heads": chosen,
    }
    tokens = torch.tensor(tokenizer.encode(inspect.getsource(argparse)))
    segment = tokens[NUM_REAL : NUM_REAL + SEGMENT].to(model.device)
    layers = sorted({*options.layers, *chosen})
    memorizing.add_memory(model, layers, read="entries")
    pieces = list(read_tokens(get_attachment(model), tokens[: NUM_REAL + 4]))
    entries = make_entries(pieces, model.device)
    memorizing.remove_memory(model)
    times: dict[str, list[tuple[float, float]]] = {}
    for pair in range(options.pairs + 1):
        for end, heads in arms.items():
            add_heads(model, heads)
            base = make_base(model, entries)
            plain, remembering = run(model, segment, None), run(model, segment, base)
            rows = {"segment": (plain[0], remembering[0]), "decoding": (plain[1], remembering[1])}
            if not end:
                rows = {"reading": (plain[0], read(model, segment)), **rows}
            memorizing.remove_memory(model)
            for name, seconds in rows.items() if pair else ():
                times.setdefault(f"{name}{end}", []).append(seconds)
    rows = {name: summarize(pairs) for name, pairs in times.items()}
    for name, row in rows.items():
        print(
            f"{name}: {row['without_s']:.4f} s without, {row['with_s']:.4f} s with, "
            f"ratio {row['ratio']:.2f}"
        )
    write_json(
        options.json,
        {
            "layers": options.layers,
            "calibrated": found["heads"],
            "entries": NUM_ENTRIES,
            "segment": SEGMENT,
            "precision": describe_precision(options.device),
            "threads": torch.get_num_threads(),
            "rows": rows,
            "machine": describe_machine(),
            "command": shlex.join(["python", *sys.argv]),
        },
    )


def add_heads(model: Any, heads: Heads) -> None:
    """Give the model a memory in these layers. In place."""
    chosen = {layer: one for layer, one in heads.items() if one}
    memorizing.add_memory(model, list(heads), heads=chosen, read="entries")


def mark(model: Any) -> float:
    """Seconds of a clock, when all that was begun is done."""
    synchronize(model.device)
    return time.perf_counter()


@torch.inference_mode()
def run(
    model: Any, segment: torch.Tensor, base: dict[int, FrozenMemory] | None
) -> tuple[float, float]:
    """Seconds of a segment, and of each token that follows it."""
    attachment = get_attachment(model)
    if base is not None:
        attachment.bind(base)
    try:
        cache = attachment.make_cache()
        marks = [mark(model)]
        for piece in (segment, *segment[:NUM_DECODED].split(1)):
            model(input_ids=piece[None], past_key_values=cache, use_cache=True)
            marks.append(mark(model))
    finally:
        attachment.unbind()
    decoded = [b - a for a, b in itertools.pairwise(marks[1:])]
    return marks[1] - marks[0], statistics.median(decoded)


def read(model: Any, segment: torch.Tensor) -> float:
    """Seconds in which a segment is read."""
    start = mark(model)
    for _ in read_tokens(get_attachment(model), segment):
        pass
    return mark(model) - start


def make_entries(
    pieces: list[Any], device: torch.device
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, real keys and values (H, n, D), written many times with noise."""
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for layer in pieces[0]:
        keys, values = (torch.cat([piece[layer][i] for piece in pieces], 1) for i in (0, 1))
        copies = NUM_ENTRIES // keys.shape[1]
        keys, values = keys.repeat(1, copies, 1), values.repeat(1, copies, 1)
        noise = torch.randn(keys.shape, generator=generator) * (0.1 * keys.float().std())
        entries[layer] = (keys.float() + noise).to(device, keys.dtype), values.to(device)
    return entries


def make_base(
    model: Any, entries: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> dict[int, FrozenMemory]:
    """What the memory layers of the model search, as an open memory would have it."""
    base = {}
    for layer, heads in get_attachment(model).open_heads.items():
        base[layer] = FrozenMemory.from_tensors(*entries[layer], heads=heads.key_heads)
        base[layer].prepare()
    return base


def summarize(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of both, and of the ratios."""
    return {
        "without_s": statistics.median(a for a, _ in pairs),
        "with_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "pairs": len(pairs),
    }


if __name__ == "__main__":
    main()
