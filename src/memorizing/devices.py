"""Tensors on their way from the CPU to where the model computes."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what a GPU still has to compute.

    CUDA copies ordinary memory aside before the call returns: the tensor may be changed afterwards.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
