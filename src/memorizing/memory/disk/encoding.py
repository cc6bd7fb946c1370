"""Entries as they are stored. Shapes: H heads, n entries, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing.errors import MemoryFolderError
from memorizing.memory.disk.description import FolderDescription


def encode_layer(
    description: FolderDescription, layer: int, keys: Tensor, values: Tensor
) -> dict[str, Tensor]:
    """Keys and values (H, n, D) of a layer as tensors of a segment, by name, on the CPU.

    Raises:
        MemoryFolderError: a number that is NaN or infinite, or is so in the dtype of the folder.
    """
    encoded: dict[str, Tensor] = {}
    for kind, vectors in (("key", keys), ("value", values)):
        vectors = vectors.detach().cpu()
        if description.dtype == "int8":
            codes, factors = encode_int8(vectors)
            encoded[f"layers.{layer}.{kind}_factors"] = factors
            is_finite = bool(vectors.isfinite().all())
        else:
            codes = vectors.to(description.stored_dtype)
            is_finite = bool(codes.isfinite().all())
        if not is_finite:
            raise MemoryFolderError(
                f"{kind}s of layer {layer} are NaN or infinite in {description.dtype}; only finite "
                "entries are kept: look for NaN in the weights or the input, or use bfloat16"
            )
        encoded[f"layers.{layer}.{kind}s"] = codes.contiguous()
    return encoded


def encode_int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes round(x / factor) (H, n, D) int8 and factors max |x| / 127 (H, n) fp32.

    A decoded number differs by at most half a factor.
    """
    wide = vectors.float()
    factors = wide.abs().amax(-1) / 127
    codes = (wide / factors.masked_fill(factors == 0, 1.0).unsqueeze(-1)).round()
    return codes.clamp(-127, 127).to(torch.int8), factors


def decode_int8(codes: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors (H, n, D) of codes (H, n, D) and factors (H, n), rounded once."""
    decoded = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    # Head by head: the product in fp32 needs twice the bytes of what is made.
    for head in range(codes.shape[0]):
        decoded[head] = codes[head].float() * factors[head].unsqueeze(-1)
    return decoded
