"""Products of keys and queries, also where the processor does not multiply 16-bit floats."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

_local = threading.local()

_FIRST_WITH_BF16 = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bf16 units."""


@cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether CPU products of a 16-bit dtype run without the processor's vector units.

    Without AVX-512 (most laptops), torch multiplies bf16 and fp16 element by element, 20 to 150
    times slower than fp32. Asked of torch and not timed, so that a machine always rounds alike.
    """
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has units for bf16 products: CPUs that do not emulate them, newer GPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _FIRST_WITH_BF16
    return device.type == "cpu" and not is_emulated(torch.bfloat16)


def widen_for_product(x: Tensor) -> Tensor:
    """`x` in the dtype in which `multiply_into` wants its factors: itself, or fp32 of it."""
    return x.float() if x.device.type == "cpu" and is_emulated(x.dtype) else x


def multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write the product of `left` (N, D) and `right` (D, T) into `out` (N, T).

    16-bit factors are accumulated in fp32 and the sums rounded once, on every processor. Where
    their product is emulated, `right` comes from `widen_for_product`, once for many `left`.
    """
    if right.dtype == left.dtype:
        torch.mm(left, right, out=out)
        return
    wide = _borrow_buffer(out.numel()).view(out.shape)
    torch.mm(left.to(right.dtype), right, out=wide)
    out.copy_(wide)


def _borrow_buffer(length: int) -> Tensor:
    """fp32 numbers of this thread, of any content: fresh pages would cost more than the product."""
    held = getattr(_local, "buffer", None)
    if held is None or held.numel() < length:
        # A buffer made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            held = _local.buffer = torch.empty(length)
    return held[:length]
