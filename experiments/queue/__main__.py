"""The queue of all experiments: what is done, and doing the rest.

    python experiments/queue --status             # what is done, what is not
    python experiments/queue --run                # do the rest; after Ctrl-C the same goes on
    python experiments/queue --run table4 proofs  # only jobs whose name holds one of the words,
                                                  # and those that they start from

Every job trains in a folder of its own under --runs and writes one JSON file under --results.
Several workers share the queue; each does a whole job with its share of the threads. On a GPU they
share it too: twelve do 3.6 times as much as one, and six times as much once NVIDIA's MPS runs
(`nvidia-cuda-mps-control -d`).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from jobs import Job

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
    jobs = choose_jobs(arguments.words)
    if not jobs:
        parser.error(
            f"no job's name holds {' or '.join(map(repr, arguments.words))}; --status without "
            "words lists all"
        )
    if arguments.status:
        show_status(jobs, arguments.runs, arguments.results)
    elif arguments.worker:
        stop_when_orphaned()
        try:
            work(jobs, arguments.runs, arguments.results)
        except KeyboardInterrupt:  # outside of training, which catches it to save
            say("stopped; the same command goes on")
            sys.exit(130)
    else:
        start_workers(arguments.workers)


def choose_jobs(words: list[str]) -> list[Job]:
    """Jobs whose name holds one of the words, and those that they start from, in their order."""
    from plan import find_jobs, list_jobs

    jobs = list_jobs()
    chosen = {job.name for job in find_jobs(words)}
    while starts := {j.start_from for j in jobs if j.name in chosen and j.start_from} - chosen:
        chosen |= starts
    return [job for job in jobs if job.name in chosen]


def show_status(jobs: list[Job], runs: Path, results: Path) -> None:
    """A line per job: tier, state, name, detail."""
    from claims import is_claimed
    from status import describe_progress

    counts: dict[str, int] = {}
    width = max(len(job.name) for job in jobs)
    for job in jobs:
        claimed = is_claimed(runs / job.name)
        state, detail = describe_progress(job, runs, results, claimed)
        counts[state] = counts.get(state, 0) + 1
        print(f"{job.tier}  {state:8}  {job.name:{width}}  {detail}".rstrip())
    print(", ".join(f"{count} {state}" for state, count in counts.items()))


def work(jobs: list[Job], runs: Path, results: Path) -> None:
    """Do one job after another until none is left or a signal comes.

    A job that fails is said and left out, and so are those that wait for it; the worker ends with
    status 1 then. What waits for another worker's job is left to that worker.
    """
    from claims import claim
    from running import run_job
    from status import can_be_started_from, is_done

    from memorizing.errors import MemorizingError

    by_name = {job.name: job for job in jobs}
    failed: set[str] = set()
    while True:
        waiting = []
        for job in jobs:
            if job.name in failed or is_done(job, results):
                continue
            if job.start_from and not can_be_started_from(by_name[job.start_from], runs, results):
                waiting.append(job)
                continue
            with claim(runs / job.name) as is_mine:
                if not is_mine or is_done(job, results):
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
            is_stuck = say_waiting(waiting, by_name, runs, results)
            sys.exit(1 if failed or is_stuck else 0)


def say_waiting(waiting: list[Job], by_name: dict[str, Job], runs: Path, results: Path) -> bool:
    """Say what each job waits for; whether one waits for what nobody does."""
    from claims import is_claimed
    from status import is_done

    is_stuck = False
    for job in waiting:
        start = by_name[job.start_from]
        if is_claimed(runs / start.name):
            say(f"{job.name}: waits for {start.name}, which another worker does")
            continue
        is_stuck = True
        why = "which is not done"
        if is_done(start, results):
            path = results / f"{start.name}.json"
            why = f"whose weights are not in {runs / start.name}; remove {path} to train it again"
        say(f"{job.name}: not done: it waits for {start.name}, {why}")
    return is_stuck


def start_workers(num_workers: int) -> None:
    """Run workers as processes with a share of the threads each, and end with their worst status.

    SIGINT and SIGTERM go to all of them, once: they are in sessions of their own, where Ctrl-C in
    a terminal does not reach them, since a second signal stops them without saving.
    """
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        **KEEP_FREED_MEMORY,
    }
    command = [sys.executable, *sys.argv, "--worker"]
    workers: list[subprocess.Popen[bytes]] = []
    # A worker may run before it is in the list.
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if len(workers) < num_workers:
            early.append(number)
            return
        for worker in workers:
            worker.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for _ in range(num_workers):
        workers.append(subprocess.Popen(command, env=environment, start_new_session=True))
    for number in early:
        forward(number, None)
    codes = [worker.wait() for worker in workers]
    # A worker that a signal killed has minus its number, which shells add to 128.
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def stop_when_orphaned() -> None:
    """Have this process save and stop, as by SIGTERM, once the one that started it is gone.

    Workers are sessions of their own: where the queue is killed, no signal reaches them. What a
    shell starts in the background may ignore SIGINT.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def say(text: str) -> None:
    """A line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
