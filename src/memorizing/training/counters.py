"""What a run has counted so far, and the states of the random generators."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

_RECENT_STEPS = 100


@dataclass
class Window:
    """Sums over the steps since the last line of the metrics."""

    steps: int = 0
    nats: float = 0.0
    num_targets: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0

    def add(self, nats: float, num_targets: int, grad_norm: float, seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.nats += nats
        self.num_targets += num_targets
        self.grad_norm += grad_norm
        self.seconds += seconds


@dataclass
class Counters:
    """Counts of a run since its first step, in all its sessions."""

    step: int = 0
    """Steps taken."""
    tokens: int = 0
    """Target tokens read."""
    seconds: float = 0.0
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    """Summed nats and target tokens of the last steps."""
    window: Window = field(default_factory=Window)

    def add(self, nats: float, num_targets: int, grad_norm: float, seconds: float) -> None:
        """Count a step."""
        self.step += 1
        self.tokens += num_targets
        self.recent.append((nats, num_targets))
        self.window.add(nats, num_targets, grad_norm, seconds)

    @property
    def recent_nats(self) -> float:
        """Nats per token over the last steps, at most 100; NaN before the first."""
        num_targets = sum(count for _, count in self.recent)
        return sum(nats for nats, _ in self.recent) / num_targets if num_targets else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, exact."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "recent": list(self.recent),
            "window": asdict(self.window),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Counters:
        """The counters that `to_dict` described."""
        recent = deque([(nats, count) for nats, count in values["recent"]], maxlen=_RECENT_STEPS)
        return cls(
            values["step"], values["tokens"], values["seconds"], recent, Window(**values["window"])
        )


def capture_generators(closing: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators (dropout) and the one that closes memories: `rng.<name>`."""
    states = {"rng.torch": torch.get_rng_state(), "rng.closing": closing.get_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(
    states: Mapping[str, Tensor], closing: torch.Generator, device: torch.device
) -> None:
    """Put back what `capture_generators` gave. Changes torch's global generators."""
    torch.set_rng_state(states["rng.torch"])
    closing.set_state(states["rng.closing"])
    if device.type == "cuda" and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"], device)
