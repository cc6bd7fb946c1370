"""Kill every verb that writes, hundreds of times, and see whether anything was lost.

    python experiments/faults/kill_writers.py --kills 500          # all verbs: about an hour
    python experiments/faults/kill_writers.py --kills 20 --verbs forget merge

A child is forked after all imports and runs the command line; it is killed at a random moment, or
before a random one of its changes of the disk. Then what stands on the disk is checked (it is what
was there before, or what was wanted, or in between whole documents or checkpoints), and the same
command again must end as if nothing had happened, and leave nothing else behind. The first failure
ends the program and leaves its folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import count_changes, fork, kill_at_change, kill_group, wait
from tiny import TRAINING, WORDS, find_llama, save_llama, write_texts

LIMIT_S = 120.0
MODEL = ("--precision", "fp32", "--device", "cpu")
MEMORY = ("--layers", "1", "--window", "17", "--keep-text", *MODEL)
FINETUNING = ("--rows", "2", "--layers", "1", *MODEL)
SEEDS = {"train": ("--set", "training.seed=1"), "finetune": ("--seed", "1")}
"""Of the run that is replaced."""


@dataclass(frozen=True)
class Verb:
    """A command, what it begins with, and what may stand there when it was killed."""

    name: str
    prepare: Callable[[Path], None]
    """Makes what was there before, in a folder."""
    command: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]
    """What a user types after it was killed."""
    check: Callable[[Path, Path, Path], str]
    """(killed, before, after): what is there; an assertion fails where something was lost."""
    describe: Callable[[Path], object]
    """What has to be the same as after a command that was not killed."""


def run(*words: object) -> int:
    """The command line in this process."""
    from memorizing.cli import main

    return main([str(word) for word in words])


def finish(command: list[str], output: Path) -> None:
    """A command in a child, which must succeed."""
    status = wait(fork(lambda: run(*command), output), LIMIT_S)
    assert status == 0, (status, command, output.read_text(errors="replace")[-3000:])


def hash_files(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of all files by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def list_names(folder: Path) -> list[str]:
    """All files and folders, but locks and what a log or TensorBoard names by time."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if "lock" not in path.name and "tfevents" not in path.name
    )


# Memory folders.


def describe_memory(path: Path) -> dict[str, tuple[str, str]]:
    """Text and keys of every document, after a look at all checksums."""
    from memorizing.memory.disk import MemoryFolder

    folder = MemoryFolder.open(path)
    folder.verify()
    (block,) = folder.open_layer(1).blocks
    keys = block.load().keys[0]
    return {
        document.name: (
            document.sha256,
            hashlib.sha256(
                keys[:, document.first_entry : document.entries.stop].float().numpy().tobytes()
            ).hexdigest(),
        )
        for document in folder.documents
    }


def try_memory(path: Path) -> dict[str, tuple[str, str]]:
    """As `describe_memory`, and nothing where there is no folder or no entry yet."""
    from memorizing.memory.disk import MemoryFolder

    if not path.exists() or not (path / "manifest.json").exists():
        return {}
    if not MemoryFolder.open(path).documents:
        return {}
    return describe_memory(path)


def prepare_reading(folder: Path) -> None:
    """Texts that were never read."""
    write_texts(folder / "texts")


def prepare_memory(folder: Path) -> None:
    """Texts that were read."""
    prepare_reading(folder)
    finish(read(folder), folder / "output")


def read(folder: Path) -> list[str]:
    """The command that reads the texts."""
    return ["read", find_llama(folder), str(folder / "texts"),
            "--memory", str(folder / "memory"), *MEMORY]  # fmt: skip


def check_reading(killed: Path, before: Path, after: Path) -> str:
    """Documents that are there are whole."""
    found, wanted = try_memory(killed / "memory"), describe_memory(after / "memory")
    assert found.items() <= wanted.items(), (found, wanted)
    return f"{len(found)} of {len(wanted)} documents"


def prepare_update(folder: Path) -> None:
    """Three of five texts were changed since they were read."""
    prepare_memory(folder)
    for word in WORDS[:3]:
        path = folder / "texts" / f"{word}.txt"
        path.write_text(f"changed {path.read_text()}")


def update(folder: Path) -> list[str]:
    """The command that reads what was changed."""
    return [*read(folder), "--update"]


def check_update(killed: Path, before: Path, after: Path) -> str:
    """Every document is there, as it was or as it is."""
    old, found, new = (describe_memory(folder / "memory") for folder in (before, killed, after))
    assert found.keys() == old.keys(), (found.keys(), old.keys())
    assert all(found[name] in (old[name], new[name]) for name in found)
    return f"{sum(found[name] == new[name] != old[name] for name in found)} replaced"


def forget(folder: Path) -> list[str]:
    """The command that forgets three documents."""
    return ["memory", "forget", str(folder / "memory"), *(f"{word}.txt" for word in WORDS[1:4])]


def forget_the_rest(folder: Path) -> list[str]:
    """The same command; where nothing is left to forget, a look."""
    found = describe_memory(folder / "memory")
    return forget(folder) if f"{WORDS[1]}.txt" in found else verify(folder)


def verify(folder: Path) -> list[str]:
    """The command that looks at checksums."""
    return ["memory", "verify", str(folder / "memory")]


def check_forgetting(killed: Path, before: Path, after: Path) -> str:
    """Documents go together, and the others stay as they are."""
    old, found, new = (describe_memory(folder / "memory") for folder in (before, killed, after))
    assert found in (old, new), (found.keys(), old.keys())
    return "before" if found == old else "after"


def prepare_merge(folder: Path) -> None:
    """Two memories."""
    prepare_memory(folder)
    write_texts(folder / "more", 11)
    words = read(folder)
    words[2:5] = [str(folder / "more"), "--memory", str(folder / "other")]
    finish([*words, "--prefix", "more/"], folder / "output")


def merge(folder: Path) -> list[str]:
    """The command that merges them."""
    return ["memory", "merge", str(folder / "memory"), str(folder / "other"),
            "--out", str(folder / "merged")]  # fmt: skip


def merge_if_missing(folder: Path) -> list[str]:
    """The same command; a look where it was done."""
    return (
        [*verify(folder)[:2], str(folder / "merged")]
        if (folder / "merged").exists()
        else merge(folder)
    )


def check_merging(killed: Path, before: Path, after: Path) -> str:
    """The sources are untouched, and what is there of the result is all of it."""
    for name in ("memory", "other"):
        assert hash_files(killed / name) == hash_files(before / name)
    found = try_memory(killed / "merged")
    assert found in ({}, describe_memory(after / "merged"))
    return "after" if found else "before"


# Runs.


def describe_run(path: Path) -> tuple[dict[str, str], list[object]]:
    """The last weights, and the losses of all steps, by `read_metrics`' file."""
    from memorizing.training import list_checkpoints

    last = list_checkpoints(path)[-1]
    weights = {
        name: value
        for name, value in hash_files(last).items()
        if name.endswith("safetensors") and "optimizer" not in name and "state" not in name
    }
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line.get("loss", line.get("nats"))) for line in lines]
    return weights, losses


def look_at_run(path: Path) -> int:
    """Checkpoints that are whole; -1 where there is no run."""
    from memorizing.training import list_checkpoints

    if not path.is_dir():
        return -1
    checkpoints = list_checkpoints(path)
    for checkpoint in checkpoints:
        files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
        found = hash_files(checkpoint)
        assert files, checkpoint
        assert all(found[name] == one["sha256"] for name, one in files.items()), checkpoint
    return len(checkpoints)


def train(folder: Path, *words: str) -> list[str]:
    """The command that trains our model."""
    values = [*TRAINING, f"data.corpus=files:{(folder / 'texts').resolve()}"]
    return ["train", "tiny", "--run", str(folder / "run"),
            *(word for value in values for word in ("--set", value)), *words]  # fmt: skip


def finetune(folder: Path, *words: str) -> list[str]:
    """The command that finetunes a model with memory."""
    return ["finetune", find_llama(folder), "--corpus", f"files:{(folder / 'texts').resolve()}",
            "--out", str(folder / "run"), "--steps", "4", "--train", "gates", "--window", "17",
            "--set", "finetune.checkpoint_every=1", *FINETUNING, *words]  # fmt: skip


def go_on(start: Callable[..., list[str]]) -> Callable[[Path], list[str]]:
    """Resume where there is a run, begin where there is none."""

    def command(folder: Path) -> list[str]:
        is_run = any((folder / "run" / name).is_file() for name in ("config.toml", "finetune.json"))
        return start(folder, "--resume") if is_run else start(folder)

    return command


def check_run(killed: Path, before: Path, after: Path) -> str:
    """All checkpoints are whole."""
    num_whole = look_at_run(killed / "run")
    return f"{num_whole} checkpoints" if num_whole >= 0 else "no run"


def prepare_replacing(start: Callable[..., list[str]]) -> Callable[[Path], None]:
    """A finished run of another seed."""

    def prepare(folder: Path) -> None:
        prepare_reading(folder)
        command = start(folder)
        finish([*command, *SEEDS[command[0]]], folder / "output")

    return prepare


def check_replacing(killed: Path, before: Path, after: Path) -> str:
    """The old run is untouched, or the new one, which has taken a step, is there in its place."""
    num_whole = look_at_run(killed / "run")
    assert num_whole >= 0
    old = hash_files(before / "run", without=("lock", ".lock"))
    found = hash_files(killed / "run", without=("lock", ".lock"))
    if all(found.get(name) == value for name, value in old.items()):
        return "old run"
    # Put away for the moment of the exchange; whoever opens the folder next puts it back.
    inside = {name: name.removeprefix("checkpoints/") for name in old}
    if all(
        value in (found.get(name), found.get(f".replaced/{name}"))
        or value == found.get(f"checkpoints/.replaced/{inside[name]}")
        for name, value in old.items()
    ):
        return "old run, put away"
    descriptions = [name for name in ("config.toml", "finetune.json") if name in found]
    assert descriptions, "the old run is gone, and there is no new one"
    assert all(found[name] != old[name] for name in descriptions), "a part of the old run is gone"
    return f"new run, {num_whole} checkpoints"


# Adapters.


def prepare_adapter(folder: Path) -> None:
    """An adapter of gates at 0.25."""
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, 0.25)


def write_adapter(folder: Path, strength: float) -> None:
    """Save gates of one value."""
    import torch
    from transformers import AutoModelForCausalLM

    import memorizing

    model = AutoModelForCausalLM.from_pretrained(find_llama(folder), trust_remote_code=False)
    memorizing.add_memory(model, layers=[1], window=17, read="entries")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".memory." in name:
                parameter.fill_(strength)
    memorizing.save_adapter(model, folder / "adapter")


def describe_adapter(path: Path) -> list[float]:
    """All gates and scales, as they load."""
    from transformers import AutoModelForCausalLM

    import memorizing

    model = AutoModelForCausalLM.from_pretrained(find_llama(path), trust_remote_code=False)
    memorizing.load_adapter(model, path)
    return [
        value
        for name, parameter in model.named_parameters()
        if ".memory." in name
        for value in parameter.flatten().tolist()
    ]


def check_adapter(killed: Path, before: Path, after: Path) -> str:
    """It is the old one or the new one, not a mixture."""
    found = set(describe_adapter(killed / "adapter"))
    assert found in ({0.25}, {0.75}), found
    return "before" if found == {0.25} else "after"


def describe_texts(folder: Path, name: str) -> object:
    """A memory below a folder, with the names of its files but those of segments."""
    files = [file for file in list_names(folder / name) if "safetensors" not in file]
    return describe_memory(folder / name), files


def describe_finished_run(folder: Path) -> object:
    """Weights, losses and names of files of a run."""
    names = [name for name in list_names(folder / "run") if "tensorboard" not in name]
    return describe_run(folder / "run"), names


def resume_or_replace(start: Callable[..., list[str]]) -> Callable[[Path], list[str]]:
    """Replace what is there, whatever it is."""
    return lambda folder: start(folder, "--overwrite")


VERBS = [
    Verb(
        "read",
        prepare_reading,
        read,
        read,
        check_reading,
        lambda folder: describe_texts(folder, "memory"),
    ),
    Verb(
        "update",
        prepare_update,
        update,
        update,
        check_update,
        lambda folder: describe_texts(folder, "memory"),
    ),
    Verb(
        "forget",
        prepare_memory,
        forget,
        forget_the_rest,
        check_forgetting,
        lambda folder: describe_texts(folder, "memory"),
    ),
    Verb(
        "merge",
        prepare_merge,
        merge,
        merge_if_missing,
        check_merging,
        lambda folder: (describe_texts(folder, "merged"), sorted(os.listdir(folder))),
    ),
    *(
        Verb(
            f"{name}{suffix}",
            prepare,
            command,
            again,
            check,
            describe_finished_run,
        )
        for name, start in (("train", train), ("finetune", finetune))
        for suffix, prepare, command, again, check in (
            ("", prepare_reading, start, go_on(start), check_run),
            (
                " --overwrite",
                prepare_replacing(start),
                resume_or_replace(start),
                resume_or_replace(start),
                check_replacing,
            ),
        )
    ),
    Verb(
        "adapter",
        prepare_adapter,
        lambda folder: ["save_adapter", str(folder)],
        lambda folder: ["save_adapter", str(folder)],
        check_adapter,
        lambda folder: (describe_adapter(folder / "adapter"), list_names(folder / "adapter")),
    ),
]
"""Everything that writes what somebody would miss. A run saves a checkpoint after every step."""


def do(command: list[str]) -> int:
    """A command of `VERBS` in this process."""
    if command[0] == "save_adapter":
        write_adapter(Path(command[1]), 0.75)
        return 0
    return run(*command)


def kill_verb(verb: Verb, num_kills: int, root: Path, seed: int) -> dict[str, object]:
    """Kill one verb again and again; what stood there afterwards, counted."""
    before, after, killed = root / "before", root / "after", root / "killed"
    verb.prepare(before)
    shutil.copytree(before, after, symlinks=True)
    num_changes, time_s = measure(verb, after)
    outcomes: Counter[str] = Counter()
    for number in range(num_kills):
        draw = random.Random(f"{seed} {verb.name} {number}")
        shutil.copytree(before, killed, symlinks=True)
        step = draw.randint(1, num_changes) if number % 2 else None

        def work(step: int | None = step) -> int:
            if step is not None:
                kill_at_change(step)
            return do(verb.command(killed))

        child = fork(work, root / "output")
        if step is None:
            time.sleep(draw.uniform(0, time_s))
            kill_group(child)
        status = wait(child, LIMIT_S)
        assert status is not None, f"hangs, number {number}"
        # `PYTHONFAULTHANDLER` and the like aside, nothing but our signal may end it.
        output = (root / "output").read_text(errors="replace")
        assert status in (0, -9), (status, number, output[-3000:])
        outcomes[verb.check(killed, before, after)] += 1
        status = wait(fork(lambda: do(verb.again(killed)), root / "output"), LIMIT_S)
        output = (root / "output").read_text(errors="replace")
        assert status == 0, (status, number, output[-3000:])
        found, wanted = (verb.describe(folder) for folder in (killed, after))
        assert found == wanted, (number, found, wanted)
        shutil.rmtree(killed)
    return {
        "kills": num_kills,
        "changes_of_the_disk": num_changes,
        "command_s": round(time_s, 3),
        "found": dict(sorted(outcomes.items())),
    }


def measure(verb: Verb, after: Path) -> tuple[int, float]:
    """Changes of the disk that a whole command makes, and its time."""
    reading, writing = os.pipe()

    def work() -> int:
        os.close(reading)
        counted = [0]
        count_changes(lambda number: counted.__setitem__(0, number))
        status = do(verb.command(after))
        os.write(writing, str(counted[0]).encode())
        return status

    output = after.with_name("output")
    start_s = time.perf_counter()
    child = fork(work, output)
    status = wait(child, LIMIT_S)
    time_s = time.perf_counter() - start_s
    os.close(writing)
    assert status == 0, (status, output.read_text(errors="replace")[-3000:])
    num_changes = int(os.read(reading, 100))
    os.close(reading)
    return num_changes, time_s


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="of every verb")
    parser.add_argument("--verbs", nargs="+", choices=[verb.name for verb in VERBS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; verbs that are not done again stay")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kill_writers_"))
    os.environ |= {"MEMORIZING_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    import torch
    import tqdm
    import transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import memorizing.cli
    import memorizing.huggingface.learning.calibration
    import memorizing.huggingface.own_model.model
    import memorizing.huggingface.sessions.opening
    import memorizing.training.finetuning  # noqa: F401

    torch.set_num_threads(1)
    # Its lock is shared with forked children, and one that is killed while it holds it keeps it.
    tqdm.tqdm.monitor_interval = 0
    tqdm.tqdm.set_lock(threading.RLock())
    for verb in VERBS:
        if arguments.verbs and verb.name not in arguments.verbs:
            continue
        folder = root / verb.name.replace(" ", "")
        save_llama(folder / "llama")
        counts = kill_verb(verb, arguments.kills, folder, arguments.seed)
        print(f"{verb.name}: {json.dumps(counts)}", flush=True)
        if arguments.out:
            record(arguments.out, verb.name, counts)
    shutil.rmtree(root)


def record(path: Path, name: str, counts: dict[str, object]) -> None:
    """Add the counts of a verb to a JSON file."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, name: counts}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
