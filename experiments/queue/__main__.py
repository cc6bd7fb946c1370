"""The queue of all experiments: what is done, and doing the rest.

    python experiments/queue --status             # what is done, what is not
    python experiments/queue --run                # do the rest; after Ctrl-C the same goes on
    python experiments/queue --run table4 proofs  # only jobs whose name holds one of the words

Every job trains in a folder of its own under --runs and writes one JSON file under --results.
Several workers share the queue; each does a whole job with its share of the threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""glibc: large tensors reuse memory that was freed. Steps of small models take a tenth less."""


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="queue", description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--status", action="store_true", help="say what is done")
    what.add_argument("--run", action="store_true", help="do what is not done")
    parser.add_argument("words", nargs="*", help="only jobs whose name holds one of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--results", type=Path, default=HERE.parent / "results" / "runs")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.status:
        show_status(arguments.words, arguments.runs, arguments.results)
    elif arguments.worker:
        work(arguments.words, arguments.runs, arguments.results)
    else:
        start_workers(arguments.workers)


def show_status(words: list[str], runs: Path, results: Path) -> None:
    """A line per job."""
    from claims import is_claimed
    from plan import find_jobs
    from rich.console import Console
    from rich.table import Table
    from status import describe_progress

    table = Table("tier", "job", "state", "detail")
    counts: dict[str, int] = {}
    for job in find_jobs(words):
        claimed = is_claimed(runs / job.name)
        state, detail = describe_progress(job, runs, results, claimed)
        counts[state] = counts.get(state, 0) + 1
        table.add_row(str(job.tier), job.name, state, detail)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()))


def work(words: list[str], runs: Path, results: Path) -> None:
    """Do one job after another until none is left or a signal comes.

    A job that fails is said and left out; the worker ends with status 1 then.
    """
    from claims import claim
    from plan import find_jobs
    from running import run_job

    from memorizing.errors import MemorizingError

    failed: set[str] = set()
    while True:
        for job in find_jobs(words):
            if job.name in failed or (results / f"{job.name}.json").exists():
                continue
            if job.start_from and not (runs / job.start_from / "trained.json").exists():
                continue
            with claim(runs / job.name) as is_mine:
                if not is_mine or (results / f"{job.name}.json").exists():
                    continue
                say(f"{job.name}: begins")
                start_s = time.monotonic()
                try:
                    is_whole = run_job(job, runs, results)
                except MemorizingError as error:
                    say(f"{job.name}: failed: {error}")
                    failed.add(job.name)
                    break
                if not is_whole:
                    say(f"{job.name}: stopped; the same command goes on")
                    sys.exit(130)
                say(f"{job.name}: done in {(time.monotonic() - start_s) / 60:.1f} minutes")
                break
        else:
            sys.exit(1 if failed else 0)


def start_workers(num_workers: int) -> None:
    """Run workers as processes with a share of the threads each; a signal goes to all of them."""
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        **KEEP_FREED_MEMORY,
    }
    command = [sys.executable, *sys.argv, "--worker"]
    workers = [subprocess.Popen(command, env=environment) for _ in range(num_workers)]
    try:
        sys.exit(max(worker.wait() for worker in workers))
    except KeyboardInterrupt:
        # The terminal has sent the signal to the workers too: they save and end.
        sys.exit(max(worker.wait() for worker in workers))


def say(text: str) -> None:
    """A line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
