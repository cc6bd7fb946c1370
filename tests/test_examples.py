"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_training_loop_of_ones_own_lowers_the_loss(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        text = f"a memory that was read {number} times is a memory. " * 61
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, EXAMPLES / "own_training_loop.py", folder, "21"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    losses = [float(line.split()[2]) for line in done.stdout.splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
