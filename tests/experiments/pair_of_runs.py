"""A run with memory and one without, as the queue leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from memorizing.config import Config
from memorizing.training import train

SIZE, NUM_TOKENS = 29, 331
"""Entries of the memory, and tokens that are read of a held-out document."""
MODEL = {
    "vocab_size": 307,
    "num_layers": 2,
    "model_dim": 13,
    "num_heads": 2,
    "head_dim": 7,
    "ffn_dim": 23,
    "segment_len": 11,
    "window": 11,
    "memory_layers": [1],
    "num_neighbors": 3,
}


def train_pair(folder: Path) -> Path:
    """`main/tiny-cache-seed0` and `main/tiny-memory-seed0`, in the folder that is returned."""
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for name in ("train1", "train2", "valid1", "valid2", "test1", "test2"):
        words = [f"word{n}" for n in rng.integers(0, 17, 400)]
        (folder / "texts" / f"{name}.txt").write_text(" ".join([name, *words]))
    for arm, capacity in (("cache", 0), ("memory", SIZE)):
        config = Config.from_dict(
            {
                "model": MODEL | {"capacity": capacity},
                "tokenizer": {"vocab_size": 307},
                "data": {
                    "corpus": f"files:{folder / 'texts'}",
                    "validation": ["valid*"],
                    "test": ["test*"],
                },
                "training": {"steps": 3, "rows": 2, "precision": "fp32"},
                "evaluation": {"capacities": [], "max_tokens_per_document": NUM_TOKENS},
            }
        )
        run_dir = folder / "runs" / "main" / f"tiny-{arm}-seed0"
        tokens = train(config, run_dir).tokens
        (run_dir / "trained.json").write_text(json.dumps({"tokens": tokens}))
    return folder / "runs"
