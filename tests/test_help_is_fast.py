import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "datasets", "rich")
TOO_LONG_S = 0.5


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_imports_nothing_heavy(words):
    done = run_python(
        f"import sys; from memorizing.cli import main; status = main({words!r}); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], status)"
    )
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
    assert "examples:" in done.stdout


def test_help_starts_in_under_half_a_second():
    # Of the processor's time: other work on the machine does not count.
    code = (
        "import time; from memorizing.cli import main; main(['--help']); print(time.process_time())"
    )
    times_s = []
    for _ in range(3):
        done = run_python(code)
        assert done.returncode == 0
        times_s.append(float(done.stdout.splitlines()[-1]))
    assert min(times_s) < TOO_LONG_S
