"""Which layers of a model find passages: per layer, all heads, and the two that find best.

    python experiments/pretrained/finding_heads.py --model MODEL --choose FILE... --check FILE...

Heads are chosen on one text, as `calibrate` chooses them, and checked on another: shares of 64
places that come first and among the best four of its chunks, half of the prompts changed a little.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memorizing import add_memory, remove_memory
from memorizing.benchmark.preparing import describe_machine
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.attaching.passages import score_chunks
from memorizing.huggingface.learning.finding_heads import (
    Ranks,
    choose,
    draw_places,
    measure_shares,
    rank_places,
)
from memorizing.huggingface.loading import load_pretrained
from memorizing.huggingface.sessions.texts import encode_text
from memorizing.storage.files import write_json

RESULTS = Path("experiments/results/pretrained_finding_heads.json")


def main() -> None:
    """Measure, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="runs/smollm2")
    parser.add_argument("--choose", nargs="+", type=Path, required=True, help="one text")
    parser.add_argument("--check", nargs="+", type=Path, required=True, help="another")
    parser.add_argument("--tokens", type=int, default=8192, help="of each, at most")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, tokenizer = load_pretrained(options.model, dtype=torch.float32)
    chosen = [
        choose(shares.unbind(1), right, 2)
        for shares, right in measure(model, tokenizer, options.choose, options.tokens)
    ]
    rows = []
    print("layer | all heads, first / among four | best two | first / among four")
    layers = measure(model, tokenizer, options.check, options.tokens)
    for layer, ((shares, right), heads) in enumerate(zip(layers, chosen, strict=True)):
        whole, best = (rank(shares[:, take], right) for take in (slice(None), heads))
        row = [whole.first, whole.among_four, best.first, best.among_four]
        rows.append({"layer": layer, "heads": heads, "all": row[:2], "best": row[2:]})
        texts = [f"{share:.0%}" for share in row]
        print(f"{layer} | {' / '.join(texts[:2])} | {heads} | {' / '.join(texts[2:])}", flush=True)
    values = {key: [str(one) for one in getattr(options, key)] for key in ("choose", "check")}
    values |= {"model": options.model, "tokens": options.tokens, "layers": rows}
    write_json(options.json, values | {"machine": describe_machine()})


def measure(
    model: Any, tokenizer: Any, paths: Sequence[Path], num_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per layer, what every head gives the chunks of a text, and the right ones."""
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    tokens = torch.from_numpy(encode_text(tokenizer, text, is_whole=True)).long()[:num_tokens]
    add_memory(model, range(model.config.num_hidden_layers), read="passages")
    attachment = get_attachment(model)
    places = draw_places(tokens, attachment.settings.num_sinks)
    yield from measure_shares(attachment, tokens, places)
    remove_memory(model)


def rank(shares: Tensor, right: Tensor) -> Ranks:
    """How places are found by heads together: of shares (P, H, T, C)."""
    return Ranks(rank_places(score_chunks(shares.mean(1)), right))


if __name__ == "__main__":
    main()
