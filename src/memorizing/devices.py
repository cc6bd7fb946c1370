"""Where a model computes, how much at once, and tensors on their way there from the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 20
"""Numbers worked on at once: 4 MiB in fp32, which stays in the processor's cache."""
_DEVICE_CHUNK = 1 << 25
"""On an accelerator few large kernels are faster: 128 MiB in fp32."""


def find_device(device: torch.device | str | None = None) -> torch.device:
    """The device that is named; None is CUDA where there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to compute: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what a GPU still has to compute.

    CUDA copies ordinary memory aside before the call returns: the tensor may be changed afterwards.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def split_rows(matrix: Tensor) -> list[slice]:
    """Rows of a matrix (N, V) that are worked on at once, so that what they give fits a cache."""
    num_rows, width = matrix.shape
    elements = _CPU_CHUNK if matrix.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, elements // width)
    return [slice(start, start + step) for start in range(0, num_rows, step)]
