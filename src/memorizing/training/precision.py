"""bf16 or fp32: which this machine multiplies matrices faster in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from memorizing.devices import synchronize
from memorizing.knn import multiplies_bf16

MIN_SPEEDUP = 1.2
"""bf16 is chosen where it is at least this many times faster; conversions eat a smaller gain."""
PROBE_TOKENS = 1024
PROBE_REPEATS = 5


@dataclass(frozen=True)
class Precision:
    """A choice of compute dtype, and the sentence that explains it."""

    name: Literal["fp32", "bf16"]
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products and activations. Parameters are fp32 either way."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32


def choose_precision(
    setting: Literal["auto", "fp32", "bf16"],
    model_dim: int,
    ffn_dim: int,
    device: torch.device | str = "cpu",
) -> Precision:
    """Turn `training.precision` into a choice; `auto` times a few products of the model's sizes.

    On a CPU whose bf16 products torch emulates, `auto` is fp32 without timing anything, and on a
    GPU that has units for bf16 it is bf16: a small model's products there take less time than their
    launch, and would say nothing.

    Args:
        setting: `fp32` and `bf16` are taken as they are.
        model_dim: columns of the probe's left factor.
        ffn_dim: columns of its right factor.
        device: where the model trains.
    """
    if setting != "auto":
        return Precision(setting, f"{setting}, as set")
    device = torch.device(device)
    has_bf16 = multiplies_bf16(device)
    if device.type == "cpu" and not has_bf16:
        # A probe would take half a minute to find out what torch knows.
        return Precision("fp32", "fp32: this processor does not multiply bf16")
    if device.type == "cuda" and has_bf16:
        return Precision("bf16", "bf16: this GPU multiplies it several times faster than fp32")
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(PROBE_TOKENS, model_dim, generator=generator).to(device)
    right = torch.randn(model_dim, ffn_dim, generator=generator).to(device)
    left_bf16, right_bf16 = left.bfloat16(), right.bfloat16()
    output, output_bf16 = left @ right, left_bf16 @ right_bf16
    fp32_s, bf16_s = _time_pair(
        lambda: torch.mm(left, right, out=output),
        lambda: torch.mm(left_bf16, right_bf16, out=output_bf16),
        device,
    )
    speedup = fp32_s / bf16_s
    name = "bf16" if speedup >= MIN_SPEEDUP else "fp32"
    return Precision(
        name, f"{name}: bf16 matrix products run at {speedup:.1f} times the speed of fp32 here"
    )


def _time_pair(
    first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device
) -> tuple[float, float]:
    """Median seconds of two functions, interleaved: other work on the machine meets both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(PROBE_REPEATS + 1):
        for times, function in zip(seconds, (first, second), strict=True):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if repeat > 0:  # the first call of each warms up
                times.append(time.perf_counter() - start)
    return median(seconds[0]), median(seconds[1])
