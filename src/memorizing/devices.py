"""Where a model computes, and tensors on their way there from the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


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
