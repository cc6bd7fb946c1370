"""SmolLM2-135M, as `convert.py` leaves it: where it is, and how it is loaded.

Apache-2.0; Llama architecture, 30 layers, d = 576, 9 query heads and 3 key/value heads of 64,
rotary base 100,000, tied embeddings, vocabulary 49,152, context 8,192; weights rounded to 4 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from memorizing.cli.pretrained import choose_device
from memorizing.data import Tokenizer, load_tokenizer
from memorizing.errors import CheckpointError

FOLDER = Path("runs/smollm2")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTEXT_LEN = 8192
"""Tokens the model was trained to see."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--device`. In place."""
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto is cuda where there is")


def describe_precision(device: str = "auto", name: str = "fp32") -> str:
    """In what products are computed."""
    if name != "fp32":
        return name
    return "fp32" if choose_device(device).type == "cpu" else "fp32, products in tf32"


def load_smollm(
    folder: Path = FOLDER, device: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer; documents begin with `<|endoftext|>`.

    On a GPU, factors of fp32 products are rounded to TF32 (10 bits): a fifth of the time.

    Raises:
        CheckpointError: the folder holds no model.
        ConfigError: the device is not there.
    """
    place = choose_device(device)
    torch.set_float32_matmul_precision("highest" if place.type == "cpu" else "high")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no model; make it: python experiments/pretrained/convert.py"
        )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.to(place).eval(), load_tokenizer(folder)
