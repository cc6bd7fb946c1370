"""What a training step holds at its peak, measured in a fresh process.

A process's memory before the step depends on what it did earlier; so every measurement has a
process of its own, in which the memories are filled and one step is run before. Then the high-water
mark of resident memory is reset, by writing 5 to /proc/self/clear_refs, and read after the next
step (VmHWM in /proc/self/status). Where a system has neither, it is the peak since the start of the
process (getrusage's ru_maxrss): filling a memory takes less than a step, beyond the entries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memorizing.benchmark.preparing import DEFAULT_PRECISION, DTYPES, fill_state, run_step
from memorizing.config import ModelConfig
from memorizing.errors import MemorizingError
from memorizing.model import MemorizingTransformer
from memorizing.settings import build_dataclass

_START = "from memorizing.benchmark.peak_memory import main; main()"
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Memory of a process that runs a step."""

    peak_bytes: int
    """Most that was resident."""
    entry_bytes: int
    """Keys and values of all memories, which are resident throughout."""
    method: str
    """`VmHWM` (of one step) or `ru_maxrss` (since the start)."""


def measure_peak(
    config: ModelConfig, capacity: int, precision: str = DEFAULT_PRECISION, index: str = "exact"
) -> Peak:
    """Run a training step in a fresh process, as `benchmark_step` does, and take its peak.

    Args:
        config: the model; one row of `segment_len` tokens.
        capacity: of every memory, filled; 0 is no memory.
        precision: `bf16` or `fp32`.
        index: what searches the memories.

    Raises:
        MemorizingError: the process failed, most likely for want of memory.
    """
    settings = {
        "config": asdict(config),
        "capacity": capacity,
        "precision": precision,
        "index": index,
        "num_threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-c", _START],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        raise MemorizingError(
            f"the process that measures a step with {capacity:,} entries ended with status "
            f"{done.returncode} ({last}); if the machine is out of memory, give fewer entries"
        )
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Read settings from standard input, run the steps and print the peak as a line of JSON."""
    settings = json.load(sys.stdin)
    torch.set_num_threads(settings.pop("num_threads"))
    config = build_dataclass(ModelConfig, settings.pop("config"))
    print(json.dumps(asdict(_measure_here(config, **settings))))


def _measure_here(config: ModelConfig, capacity: int, precision: str, index: str) -> Peak:
    torch.manual_seed(0)
    model = MemorizingTransformer(replace(config, capacity=capacity))
    model.compute_dtype = DTYPES[precision]
    tokens = torch.randint(config.vocab_size, (1, config.segment_len + 1))
    state = fill_state(model, tokens[:, :-1], capacity, index)
    state = run_step(model, state, tokens)
    model.zero_grad(set_to_none=True)
    is_reset = _reset_peak()
    state = run_step(model, state, tokens)
    entry_bytes = sum(m.keys.nbytes + m.values.nbytes for m in state.memories.values())
    return Peak(
        _read_peak() if is_reset else _read_peak_since_start(),
        entry_bytes,
        "VmHWM" if is_reset else "ru_maxrss",
    )


def _reset_peak() -> bool:
    """Whether the system's high-water mark of this process is now what is resident."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return "VmHWM" in _STATUS.read_text(encoding="utf-8")


def _read_peak() -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _read_peak_since_start() -> int:
    import resource

    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
