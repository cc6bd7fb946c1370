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
from smollm import add_model_options, describe_precision, load_smollm

import memorizing
from memorizing.benchmark.machine import describe_machine
from memorizing.devices import synchronize
from memorizing.files import write_json
from memorizing.huggingface.attachment import get_attachment
from memorizing.huggingface.reading import read_tokens
from memorizing.memory import FrozenMemory

RESULTS = Path("experiments/results/pretrained_speed.json")
SEGMENT, NUM_REAL, NUM_ENTRIES, NUM_DECODED = 512, 2048, 65_536, 24


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[18])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, tokenizer = load_smollm(options.model, options.device)
    memorizing.add_memory(model, options.layers)
    attachment = get_attachment(model)
    text = inspect.getsource(argparse)
    tokens = torch.tensor(tokenizer.encode(text))
    base = make_base(list(read_tokens(attachment, tokens[: NUM_REAL + 4])), model.device)
    segment = tokens[NUM_REAL : NUM_REAL + SEGMENT].to(model.device)

    def mark() -> float:
        synchronize(model.device)
        return time.perf_counter()

    @torch.inference_mode()
    def run(layers: dict[int, FrozenMemory] | None, num_decoded: int) -> tuple[float, float]:
        """Seconds of a segment, and of each token that follows it."""
        if layers is not None:
            attachment.bind(layers)
        try:
            cache = attachment.make_cache()
            marks = [mark()]
            for piece in (segment, *segment[:num_decoded].split(1)):
                model(input_ids=piece[None], past_key_values=cache, use_cache=True)
                marks.append(mark())
        finally:
            attachment.unbind()
        decoded = [b - a for a, b in itertools.pairwise(marks[1:])]
        return marks[1] - marks[0], statistics.median(decoded) if decoded else 0.0

    def read() -> float:
        start = mark()
        for _ in read_tokens(attachment, segment):
            pass
        return mark() - start

    times: dict[str, list[tuple[float, float]]] = {"reading": [], "segment": [], "decoding": []}
    for pair in range(options.pairs + 1):
        plain, remembering, reading = run(None, NUM_DECODED), run(base, NUM_DECODED), read()
        if pair == 0:
            continue
        times["reading"].append((plain[0], reading))
        times["segment"].append((plain[0], remembering[0]))
        times["decoding"].append((plain[1], remembering[1]))
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
            "entries": NUM_ENTRIES,
            "segment": SEGMENT,
            "precision": describe_precision(options.device),
            "threads": torch.get_num_threads(),
            "rows": rows,
            "machine": describe_machine(),
            "command": shlex.join(["python", *sys.argv]),
        },
    )


def make_base(pieces: list[Any], device: torch.device) -> dict[int, FrozenMemory]:
    """Per layer, real entries written many times with noise."""
    generator = torch.Generator().manual_seed(0)
    base = {}
    for layer in pieces[0]:
        keys, values = (torch.cat([piece[layer][i] for piece in pieces], 1) for i in (0, 1))
        copies = NUM_ENTRIES // keys.shape[1]
        keys, values = keys.repeat(1, copies, 1), values.repeat(1, copies, 1)
        noise = torch.randn(keys.shape, generator=generator) * (0.1 * keys.float().std())
        noisy = (keys.float() + noise).to(device, keys.dtype)
        base[layer] = FrozenMemory.from_tensors(noisy, values.to(device))
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
