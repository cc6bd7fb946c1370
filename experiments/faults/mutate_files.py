"""Read a hundred thousand damaged and hostile files: no traceback, no hang, no code, no flood.

    python experiments/faults/mutate_files.py --files 100000       # an hour and a half of two cores
    python experiments/faults/mutate_files.py --files 300 --only memory
    python experiments/faults/mutate_files.py --only memory --first 4711 --files 1    # one again

Every number stands for one mutated file of one folder that this project, or a corpus, or the hub
wrote. The command line reads it in a child, which may take a limited time and memory, may run no
other program and unpickle nothing, and must end with a message. Checksums are made right again
where they can be: what then passes is what a malicious author can write.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kill_writers import finetune, finish, read, train, write_adapter
from mutations import mutate
from processes import fork, kill_group
from tiny import find_llama, save_llama, write_texts

LIMIT_S = 60.0
"""For one file."""
MEMORY_GIB = 4
"""What one file may take beyond what the imports took."""
FP32 = ("--precision", "fp32", "--device", "cpu")
PROGRAMS = {"git"}
"""That may be run: `run.json` says the commit of the source."""
BOMB = "unpickled"
"""A file that appears in a folder if something was unpickled from it."""


@dataclass(frozen=True)
class Target:
    """A folder of files, one of which is mutated, and commands that read it."""

    name: str
    prepare: Callable[[Path], None]
    """Makes the folder `seed` below the folder that it is given."""
    commands: Callable[[Path], list[list[str]]]
    """Of the folder that holds `seed`, mutated; one of these is run."""
    weight: float
    """Share of all files."""
    files: tuple[str, ...] = ("**/*",)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, folder: Path) -> None:
        """Into this folder."""
        self.path = folder / BOMB

    def __reduce__(self) -> tuple[Any, ...]:
        """Write the file."""
        return (Path.touch, (self.path,))


def plant_bombs(folder: Path) -> None:
    """Pickles under names that libraries load."""
    for name in ("scann_docids.pkl", "pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(folder)))


def sign_manifest(values: dict[str, Any]) -> dict[str, Any]:
    """A memory's manifest with the checksum of what it holds now."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True).encode("utf-8", "surrogatepass")
    return {**rest, "checksum": hashlib.sha256(text).hexdigest()}


def sign_files(folder: Path, path: Path) -> None:
    """Enter the checksum of a changed file where a manifest names it. In place."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for manifest in (path.parent / "manifest.json", folder / "manifest.json"):
        try:
            values = json.loads(manifest.read_bytes())
            if isinstance(values["files"], dict):
                values["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
            manifest.write_text(json.dumps(values))
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            values = json.loads(manifest.read_bytes())
            for segment in values["segments"]:
                if segment["file"] == path.name:
                    segment["sha256"] = digest
                    segment["num_bytes"] = path.stat().st_size
            manifest.write_text(json.dumps(sign_manifest(values)))


# What is mutated.


def prepare_memory(folder: Path) -> None:
    """A memory of five documents, with their texts."""
    write_texts(folder / "texts")
    finish(read(folder), folder / "output")
    (folder / "memory").rename(folder / "seed")
    plant_bombs(folder / "seed")


def prepare_indexed_memory(folder: Path, index: str) -> None:
    """The same, searched by an index that is saved with it."""
    write_texts(folder / "texts", 60)
    finish([*read(folder), "--set", f"index={index}"], folder / "output")
    (folder / "memory").rename(folder / "seed")
    finish(generate(folder, "--memory", str(folder / "seed")), folder / "output")
    for saved in (folder / "seed").rglob("*"):
        if saved.is_dir():
            plant_bombs(saved)


def generate(folder: Path, *words: str, model: Path | None = None) -> list[str]:
    """One token by the model."""
    return ["generate", str(model or find_llama(folder)), "--prompt", "alpha 1;",
            "--max-new-tokens", "1", *FP32, *words]  # fmt: skip


def prepare_run(folder: Path) -> None:
    """A run of our model."""
    write_texts(folder / "texts")
    finish(train(folder), folder / "output")
    (folder / "run").rename(folder / "seed")


def prepare_tuned(folder: Path) -> None:
    """A finetuning."""
    write_texts(folder / "texts")
    finish(finetune(folder), folder / "output")
    (folder / "run").rename(folder / "seed")
    plant_bombs(folder / "seed" / "adapter")


def prepare_adapter(folder: Path) -> None:
    """An adapter alone."""
    folder.mkdir(parents=True)
    write_adapter(folder, 0.25)
    (folder / "adapter").rename(folder / "seed")
    plant_bombs(folder / "seed")


def prepare_model(folder: Path) -> None:
    """A model as of the hub, with code of its own beside it."""
    save_llama(folder / "seed")
    plant_bombs(folder / "seed")
    (folder / "seed" / "modeling_own.py").write_text(
        f"from pathlib import Path\nPath({str(folder / 'seed' / BOMB)!r}).touch()\n"
    )


def prepare_recipe(folder: Path) -> None:
    """A recipe."""
    from memorizing import load_config

    (folder / "seed").mkdir(parents=True)
    (folder / "seed" / "mine.toml").write_text(load_config("tiny").to_toml())


def prepare_corpora(folder: Path) -> None:
    """A file of every kind that is read."""
    import bz2
    import gzip
    import lzma
    import tarfile
    import zipfile

    import pyarrow
    from pyarrow import parquet

    seed = folder / "seed"
    rows = [{"text": f"document {n} " * 9, "path": f"f{n}.py", "repo_name": "r"} for n in range(9)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, content in {
        "rows.jsonl": lines,
        "rows.jsonl.gz": gzip.compress(lines),
        "c4/c4-train.00000.json.gz": gzip.compress(lines.replace(b"document", b"word " * 500)),
        "rows.jsonl.bz2": bz2.compress(lines),
        "rows.jsonl.xz": lzma.compress(lines),
        "thys/ROOT": b"session A = HOL +\n  theories\n    T\n    U\n",
        "thys/T.thy": b'theory T imports Main U begin\nlemma "x = x" by simp\nend\n',
        "thys/U.thy": b"theory U imports Main begin text \\<open>no\\<close> end\n",
        "checkouts/one/b.py": b"x = 1\n" * 9,
        "checkouts/two/README.md": b"# Two\n",
        "files/a.py": b"def f(x):\n    return x\n",
        "files/b.txt": "A text \N{EM DASH}.\n".encode() * 9,
        "pg19/train/1.txt": b"A book.\n" * 99,
        "pg19/metadata.csv": b"1,A book,1900,http://x\n",
    }.items():
        (seed / name).parent.mkdir(parents=True, exist_ok=True)
        (seed / name).write_bytes(content)
    parquet.write_table(pyarrow.Table.from_pylist(rows), seed / "rows.parquet")
    paper = rb"\documentclass{article}\begin{document}\input{b}Text.\end{document}"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in (("main.tex", paper), ("b.tex", b"An \\emph{input}.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (seed / "arxiv").mkdir()
    with tarfile.open(seed / "arxiv" / "arXiv_src_0001_001.tar", "w") as archive:
        member = tarfile.TarInfo("0001/math0001001.gz")
        member.size = len(buffer.getvalue())
        archive.addfile(member, io.BytesIO(buffer.getvalue()))
    metadata = json.dumps({"id": "math/0001001", "categories": "math.AG", "title": "T"}).encode()
    (seed / "arxiv" / "arxiv-metadata-oai-snapshot.json").write_bytes(metadata + b"\n")
    with zipfile.ZipFile(seed / "files" / "c.zip", "w") as packed:
        packed.writestr("x.txt", "x")
    shutil.make_archive(str(seed / "thys"), "gztar", seed, "thys")


def read_corpora(folder: Path) -> list[list[str]]:
    """Every kind of corpus."""
    seed = folder / "seed"
    kinds = (
        f"jsonl:{seed / 'rows.jsonl'}", f"jsonl:{seed / 'rows.jsonl.gz'}",
        f"jsonl:{seed / 'rows.jsonl.bz2'}", f"jsonl:{seed / 'rows.jsonl.xz'}",
        f"parquet:{seed / 'rows.parquet'}", f"c4:{seed / 'c4'}", f"isabelle:{seed / 'thys'}",
        f"isabelle:{seed / 'thys.tar.gz'}", f"arxiv:{seed / 'arxiv'}", f"files:{seed / 'files'}",
        f"repositories:{seed}", f"github:{seed / 'checkouts'}", f"github:{seed / 'rows.parquet'}",
        f"pg19:{seed / 'pg19'}",
    )  # fmt: skip
    return [["corpus", kind, *words] for kind in kinds for words in ([], ["--stats"])]


TARGETS = [
    Target(
        "memory",
        prepare_memory,
        lambda folder: [
            ["memory", "verify", str(folder / "seed")],
            ["memory", "info", str(folder / "seed")],
            ["memory", "list", str(folder / "seed")],
            ["memory", "forget", str(folder / "seed"), "beta.txt", "delta.txt"],
            ["memory", "merge", str(folder / "seed"), "--out", str(folder / "merged")],
            generate(folder, "--memory", str(folder / "seed"), "--sources"),
        ],
        0.3,
    ),
    *(
        Target(
            f"memory by {index}",
            lambda folder, index=index: prepare_indexed_memory(folder, index),
            lambda folder: [generate(folder, "--memory", str(folder / "seed"))],
            0.04,
        )
        for index in ("faiss_hnsw", "faiss_ivf", "int8")
    ),
    Target(
        "run",
        prepare_run,
        lambda folder: [
            ["info", str(folder / "seed")],
            ["info", str(folder / "seed")],
            [*train(folder), "--resume", "--run", str(folder / "seed")],
            ["evaluate", str(folder / "seed"), "--corpus", f"files:{folder / 'texts'}"],
        ],
        0.18,
    ),
    Target(
        "finetuning",
        prepare_tuned,
        lambda folder: [[*finetune(folder), "--resume", "--out", str(folder / "seed")]],
        0.06,
    ),
    Target(
        "adapter",
        prepare_adapter,
        lambda folder: [generate(folder, "--adapter", str(folder / "seed"))],
        0.06,
    ),
    Target(
        "model",
        prepare_model,
        lambda folder: [generate(folder, model=folder / "seed")],
        0.06,
    ),
    Target(
        "recipe",
        prepare_recipe,
        lambda folder: [["info", str(folder / "seed" / "mine.toml")]],
        0.06,
    ),
    Target("corpora", prepare_corpora, read_corpora, 0.16),
]


def watch_for_code(folder: Path) -> None:
    """From now on, end this process where it runs or unpickles what it must not."""
    allowed = os.path.realpath(sys.prefix)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        bad = event in ("os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
        if event == "subprocess.Popen":
            bad = os.path.basename(os.fspath(arguments[0])) not in PROGRAMS
        if event == "pickle.find_class":
            # Libraries unpickle what they installed themselves.
            bad = not any(allowed in frame.filename for frame in traceback.extract_stack()[-2:-1])
        if bad:
            print(f"CODE: {event} {arguments!r}"[:500])
            traceback.print_stack()
            sys.stdout.flush()
            os._exit(77)

    sys.addaudithook(watch)


def check_seed(target: Target, seeds: Path, output: Path) -> None:
    """Every command must succeed where nothing was mutated, or it shows nothing."""
    work = seeds / "whole"
    for number in range(len(target.commands(work))):
        shutil.rmtree(work, ignore_errors=True)
        copy_seed(seeds, work)
        finish(target.commands(work)[number], output)
    shutil.rmtree(work)


def copy_seed(seeds: Path, work: Path) -> None:
    """A copy of what is mutated, beside what it was made of."""
    shutil.copytree(seeds / "seed", work / "seed", symlinks=True)
    if (seeds / "texts").exists():
        (work / "texts").symlink_to(seeds / "texts")


def read_one(target: Target, seeds: Path, number: int) -> str:
    """Mutate one file of a copy, read it, and say how that ended.

    Raises:
        Exception: whatever the command line let through.
    """
    from memorizing.cli import main

    draw = random.Random(f"{target.name} {number}")
    work = seeds / f"work{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    copy_seed(seeds, work)
    files = [path for path in sorted((work / "seed").rglob("*")) if path.is_file()]
    path = draw.choice(files)
    is_memory = target.name.startswith("memory") and path.name == "manifest.json"
    path.write_bytes(mutate(path.read_bytes(), draw, sign_manifest if is_memory else None))
    if draw.random() < 0.5:
        sign_files(work / "seed", path)
    command = draw.choice(target.commands(work))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(command)
    assert not list(work.rglob(BOMB)), f"{BOMB}: {command}"
    assert status in (0, 1, 2), (status, command, output.getvalue()[-2000:])
    assert "Traceback" not in output.getvalue(), output.getvalue()[-3000:]
    assert "\x1b" not in output.getvalue(), f"control characters: {output.getvalue()[-2000:]!r}"
    return "read" if status == 0 else "refused"


def work_on(target: Target, seeds: Path, numbers: range, progress: Path) -> int:
    """Read many files in this process; what happened is appended to `progress`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = size + (MEMORY_GIB << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    watch_for_code(seeds)
    with progress.open("a", buffering=1) as log:
        for number in numbers:
            log.write(f"{number} ")
            start_s = time.monotonic()
            try:
                outcome = read_one(target, seeds, number)
            except BaseException:
                outcome = f"FAILED {json.dumps(traceback.format_exc()[-4000:])}"
            time_s = time.monotonic() - start_s
            log.write(f"{outcome if time_s < LIMIT_S / 2 else f'FAILED slow {time_s}'}\n")
    return 0


def read_target(
    target: Target, root: Path, numbers: range, failures: list[str]
) -> tuple[Counter[str], int]:
    """Read many files of one kind, in child after child; outcomes, and children that died."""
    seeds = root / target.name.replace(" ", "_")
    progress, output = seeds / "progress", seeds / "output"
    outcomes: Counter[str] = Counter()
    num_died, first = 0, numbers.start
    while first < numbers.stop:
        progress.write_text("")
        part = range(first, min(first + 500, numbers.stop))
        child = fork(lambda part=part: work_on(target, seeds, part, progress), output)
        seen_s, size = time.monotonic(), 0
        why = ""
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                why = f"status {os.waitstatus_to_exitcode(status)}" if status else ""
                break
            if progress.stat().st_size != size:
                seen_s, size = time.monotonic(), progress.stat().st_size
            if time.monotonic() - seen_s > LIMIT_S:
                kill_group(child)
                os.waitpid(child, 0)
                why = "hangs"
                break
            time.sleep(0.02)
        for line in progress.read_text().splitlines():
            number, _, outcome = line.partition(" ")
            first = int(number) + 1
            if not outcome or outcome.startswith("FAILED"):
                what = json.loads(outcome[7:]) if outcome.startswith('FAILED "') else outcome
                died = f"{why}\n{output.read_text(errors='replace')[-3000:]}"
                failures.append(f"{target.name} {number}: {what or died}")
                outcome = "failed"
            outcomes[outcome] += 1
        num_died += bool(why)
        if why and not progress.read_text():
            raise SystemExit(f"{target.name}: {why}\n{output.read_text(errors='replace')}")
    return outcomes, num_died


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000, help="in all, or of --only")
    parser.add_argument("--only", nargs="+", choices=[target.name for target in TARGETS])
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--out", type=Path, help="JSON file; kinds that are not read stay")
    parser.add_argument("--failures", type=Path, help="text file for all failures")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="mutate_files_"))
    os.environ |= {"MEMORIZING_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    import memorizing.cli
    import memorizing.huggingface.learning.calibration
    import memorizing.huggingface.own_model.model
    import memorizing.huggingface.sessions.opening
    import memorizing.training.finetuning  # noqa: F401

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    save_llama(root / "llama")
    chosen = [t for t in TARGETS if not arguments.only or t.name in arguments.only]
    failures: list[str] = []
    for target in chosen:
        seeds = root / target.name.replace(" ", "_")
        target.prepare(seeds)
        check_seed(target, seeds, seeds / "output")
        total = sum(other.weight for other in chosen)
        num_files = round(arguments.files * target.weight / total)
        numbers = range(arguments.first, arguments.first + num_files)
        known = len(failures)
        start_s = time.monotonic()
        outcomes, num_died = read_target(target, root, numbers, failures)
        counts = {"files": num_files, **dict(sorted(outcomes.items())), "died": num_died}
        print(
            f"{target.name}: {json.dumps(counts)}, {time.monotonic() - start_s:.0f} s", flush=True
        )
        for failure in failures[known:][:3]:
            print(failure, flush=True)
        if arguments.failures:
            arguments.failures.write_text("\n\n".join(failures))
        if arguments.out:
            values = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
            text = json.dumps({**values, target.name: counts}, indent=2)
            arguments.out.write_text(f"{text}\n", encoding="utf-8")
    shutil.rmtree(root)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
