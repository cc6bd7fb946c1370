"""`memorizing read`."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memorizing.cli.options import (
    INTERRUPTED_STATUS,
    AdapterOption,
    DeviceOption,
    HeadsOption,
    JsonOption,
    LayersOption,
    ModelArgument,
    ModelPrecisionOption,
    flag,
    option,
    parse_heads,
    parse_numbers,
    parse_settings,
    prepare_files,
    set_option,
    write_result,
)
from memorizing.cli.pretrained import calibrate_memory, describe_bytes, load_model
from memorizing.cli.reading_plan import Plan, find_sources, plan_reading
from memorizing.errors import ConfigError
from memorizing.storage.folders import count_bytes
from memorizing.terminal import make_display, say, show

if TYPE_CHECKING:
    from memorizing.data.text import ReadLog
    from memorizing.huggingface import MemorySession
    from memorizing.memory.disk import MemoryFolder, StoredDocument
    from memorizing.ray import RayReaders

EXAMPLES = """\b
examples:
  memorizing read runs/smollm2 src docs README.md --memory repo.memory
  memorizing read runs/smollm2 src --memory repo.memory --update
  memorizing read runs/smollm2 proofs --memory proofs.memory --calibrate
  memorizing read runs/smollm2 src --memory repo.memory --set read=entries --heads 20:1,5
  memorizing read runs/smollm2 'books/**/*.txt' --memory books.memory --layers 20
  memorizing read runs/smollm2 . --memory repo.memory --exclude node_modules --exclude '*.min.js'
  memorizing read runs/smollm2 src --memory repo.memory --workers 4
  memorizing read runs/smollm2 src --memory /shared/repo.memory --workers 64 --ray head:6379
  git log | memorizing read runs/smollm2 - --name history --memory repo.memory
"""

_LEFT_OUT_SHOWN = 5
_BYTES_PER_TOKEN = 3.5
"""Of the first document; it is not known before."""


EntryType = Literal["bfloat16", "float16", "float32", "int8"]
"""How entries are stored."""


def run(
    model: ModelArgument,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES...", help="Files, folders, patterns in quotes, or - for standard input."
        ),
    ],
    memory: Annotated[Path, option("DIR", "Folder of the memory; made, or added to.", "--memory")],
    layers: LayersOption = None,
    heads: HeadsOption = None,
    calibrate: Annotated[
        bool, flag("Find which layers and heads read, on the beginning of FILES.", "--calibrate")
    ] = False,
    window: Annotated[
        int | None, option("N", "Tokens of local attention. Default: 512.", min=1)
    ] = None,
    dtype: Annotated[EntryType | None, flag("Of stored entries. Default: bfloat16.")] = None,
    settings: Annotated[
        list[str] | None, set_option("Another setting of the memory, as num_neighbors=64.")
    ] = None,
    keep_text: Annotated[
        bool, flag("Where entries are read: also keep the texts, to show sources.", "--keep-text")
    ] = False,
    update: Annotated[
        bool, flag("Read documents that have changed again, in their place.", "--update")
    ] = False,
    exclude: Annotated[
        list[str] | None,
        option("PATTERN", "Leave out files and folders of such names. Repeatable."),
    ] = None,
    max_file_mib: Annotated[
        float, option("MIB", "Leave out files that are larger.", min=0.0)
    ] = 2.0,
    prefix: Annotated[str, option("TEXT", "Put before all names, as other_repository/.")] = "",
    name: Annotated[str | None, option("NAME", "Name of what is read from standard input.")] = None,
    workers: Annotated[
        int | None, option("N", "Processes that read, each with a model of its own.", min=1)
    ] = None,
    ray: Annotated[
        str | None,
        option("ADDRESS", "Workers run in this Ray cluster: HOST:PORT, or auto.", "--ray"),
    ] = None,
    adapter: AdapterOption = None,
    precision: ModelPrecisionOption = "auto",
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Let a model read files, and keep what it read as a memory. Nothing is trained.

    A document is a file, named by its path in the folder that is given. Hidden files, binary ones
    and empty ones are left out. What is in the memory already is not read again, so that the same
    command goes on where it was stopped; Ctrl-C keeps all documents that were read whole.
    """
    if calibrate and (layers or heads or adapter is not None):
        raise ConfigError(
            "--calibrate finds layers and heads, and --layers, --heads or --adapter has them; give "
            "one"
        )
    if ray is not None and workers is None:
        raise ConfigError(f"--ray {ray} is where workers run, and there are none; add --workers N")
    prepare_files(json_file)
    wanted = read_settings(layers, heads, window, settings)

    from memorizing.data.reading.files import Rules
    from memorizing.data.text import ReadLog
    from memorizing.memory.disk import MemoryFolder

    left_out = ReadLog()
    folder = MemoryFolder.find(memory)
    check_settings(memory, folder, wanted, dtype)
    rules = Rules(round(max_file_mib * 2**20), tuple(exclude or ()))
    sources = find_sources(files, rules, prefix, name, left_out)
    plan = plan_reading(sources, folder, update=update, path=memory)
    loaded, tokenizer = load_model(model, precision, device)

    from memorizing.huggingface import add_memory, open_memory
    from memorizing.huggingface.attaching.attachment import get_attachment
    from memorizing.huggingface.learning.adapter import load_adapter

    if folder is None and dtype and dtype != "int8":
        wanted["dtype"] = dtype
    if adapter is not None:
        load_adapter(loaded, adapter, **({} if folder else wanted))
    elif folder is None and calibrate:
        texts = (source.load() or "" for source in plan.sources)
        calibrate_memory(loaded, tokenizer, texts, "files", wanted)
    elif folder is None:
        add_memory(loaded, **wanted)
    readers = None
    if workers is not None:
        options = {} if folder else wanted
        readers = make_readers(workers, ray, plan, loaded, model, adapter, options)
    session = open_memory(loaded, memory, keep_text=keep_text, dtype=None if folder else dtype)
    say(describe_plan(plan, memory, get_attachment(loaded).settings.layers))
    progress = ReadingProgress(plan)
    before = {(document.name, document.sha256) for document in session.documents}
    is_interrupted = False
    try:
        if plan.sources:
            session.read(
                tokenizer,
                progress.follow(),
                update=update,
                progress=progress.count,
                readers=readers,
            )
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        progress.stop()
    read = [one for one in session.documents if (one.name, one.sha256) not in before]
    result = summarize(memory, model, session, read, plan, left_out, progress)
    print_result(result, left_out.describe())
    short = [one.name for one in read if not one.num_entries]
    if short:
        say(
            f"{len(short):,} documents leave nothing in memory, such as {short[0]}: "
            f"the first {get_attachment(loaded).settings.num_sinks} tokens of a text are not stored"
        )
    write_result(json_file, {**result, "interrupted": is_interrupted})
    if is_interrupted:
        say("interrupted; what was read whole is kept, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED_STATUS)


def read_settings(
    layers: str | None,
    heads: Sequence[str] | None,
    window: int | None,
    settings: Sequence[str] | None,
) -> dict[str, Any]:
    """What `add_memory` is given, by name.

    Raises:
        ConfigError: an unknown one, or one that is not written as KEY=VALUE.
    """
    from memorizing.huggingface.attaching.memory_settings import MemorySettings
    from memorizing.settings import describe_unknown, list_keys

    form = "KEY=VALUE with a setting of a memory, such as num_neighbors=64"
    values = parse_settings(settings, form)
    options = ("layers", "window", "dtype")
    known = [key for key in list_keys(MemorySettings) if key not in options]
    for key, value in values.items():
        if key in options:
            raise ConfigError(f"--set has {key}={value}; write --{key} {value}")
        if key not in known:
            raise ConfigError(describe_unknown("setting of a memory", key, known))
    if layers is not None:
        values["layers"] = parse_numbers(layers, "--layers")
    if heads:
        values["heads"] = parse_heads(heads)
    if window is not None:
        values["window"] = window
    return values


def check_settings(
    path: Path, folder: MemoryFolder | None, wanted: dict[str, Any], dtype: EntryType | None
) -> None:
    """Refuse settings that differ from those of a memory that is there.

    Raises:
        ConfigError: with both values.
    """
    if folder is None:
        return
    from memorizing.huggingface.attaching.memory_settings import MemorySettings

    described = folder.description.settings.get("memory")
    # All settings, also those that it leaves out because they are the default.
    stored = {} if described is None else asdict(MemorySettings.from_dict(described))
    stored |= {"layers": list(stored.get("layers", ())), "dtype": folder.description.dtype}
    if "heads" in wanted:
        from memorizing.huggingface.attaching.attachment import list_open_heads

        kept = list_open_heads(folder.description.settings.get("heads"))
        stored["heads"] = {layer: kept.get(str(layer)) for layer in wanted["heads"]}
    if dtype is not None:
        wanted = {**wanted, "dtype": dtype}
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise ConfigError(
                f"{path} was made with {key} = {stored.get(key)}, and {value} is asked for; leave "
                "that out, or make another memory"
            )


def make_readers(
    num_workers: int,
    address: str | None,
    plan: Plan,
    loaded: Any,
    model: str,
    adapter: Path | None,
    settings: dict[str, Any],
) -> RayReaders:
    """Workers that read as the model that was loaded here.

    Raises:
        IndexUnavailableError: Ray is not installed.
    """
    from memorizing.ray.cluster import import_ray
    from memorizing.ray.reading import RayReaders, load_reader

    import_ray()
    place = Path(model)
    load = functools.partial(
        load_reader,
        str(place.resolve()) if place.exists() else model,
        str(loaded.dtype).removeprefix("torch."),
        loaded.device.type,
        adapter and adapter.resolve(),
        settings,
    )
    is_gpu = loaded.device.type == "cuda"
    return RayReaders(load, num_workers, address, num_gpus=is_gpu, num_bytes=plan.num_bytes)


class ReadingProgress:
    """Gives the documents out, counts what is read of them, and shows it."""

    def __init__(self, plan: Plan) -> None:
        """Take what there is to read."""
        self.num_tokens = 0
        self._plan = plan
        self._bytes: dict[str, int] = {}
        """Of every document that was given out."""
        self._begun: set[str] = set()
        self._bytes_begun = self._bytes_done = self._tokens_done = 0
        self._display = make_display(is_patient=True, is_transient=True)
        self._display.start(0, 100, "percent")
        self._start_s = time.perf_counter()

    def measure(self) -> dict[str, float]:
        """Seconds since the start, and tokens per second."""
        seconds = time.perf_counter() - self._start_s
        speed = self.num_tokens / max(seconds, 1e-9)
        return {"seconds": round(seconds, 3), "tokens_per_s": round(speed, 1)}

    def follow(self) -> Iterator[tuple[str, str]]:
        """Name and text of what is read, each loaded when it is its turn."""
        for source in self._plan.sources:
            text = source.load()
            if text is not None:
                self._bytes[source.name] = source.num_bytes
                yield source.name, text

    def count(self, name: str, num_tokens: int) -> None:
        """Tokens of a document were read; those before it are read whole."""
        if name not in self._begun:
            self._begun.add(name)
            self._bytes_done, self._tokens_done = self._bytes_begun, self.num_tokens
            self._bytes_begun += self._bytes[name]
        self.num_tokens += num_tokens
        bytes_per_token = _BYTES_PER_TOKEN
        if self._tokens_done:
            bytes_per_token = self._bytes_done / self._tokens_done
        read = min((self.num_tokens - self._tokens_done) * bytes_per_token, self._bytes[name])
        facts = {
            "documents": f"{len(self._begun):,} of {len(self._plan.sources):,}",
            "tokens": f"{self.num_tokens:,}",
            "tokens/s": f"{self.measure()['tokens_per_s']:,.0f}",
            "reading": name[-40:],
        }
        share = (self._bytes_done + read) / max(self._plan.num_bytes, 1)
        self._display.update(int(100 * share), facts)

    def stop(self) -> None:
        """Give the terminal back."""
        self._display.stop()


def describe_plan(plan: Plan, memory: Path, layers: Sequence[int]) -> str:
    """What will be read, on a line."""
    parts = [
        f"{len(plan.sources):,} documents to read, {describe_bytes(plan.num_bytes)}",
        *([f"{len(plan.changed):,} of them again"] if plan.changed else []),
        *([f"{plan.num_known:,} are there already"] if plan.num_known else []),
    ]
    return f"memory: {memory} of layers {', '.join(map(str, layers))}; " + ", ".join(parts)


def summarize(
    memory: Path,
    model: str,
    session: MemorySession,
    read: Sequence[StoredDocument],
    plan: Plan,
    left_out: ReadLog,
    progress: ReadingProgress,
) -> dict[str, Any]:
    """What was done, as plain values."""

    def count(documents: Sequence[StoredDocument]) -> dict[str, int]:
        return {
            "documents": len(documents),
            "tokens": sum(document.num_tokens for document in documents),
            "entries": sum(document.num_entries for document in documents),
        }

    return {
        "memory": str(memory),
        "model": model,
        "read": {**count(read), **progress.measure()},
        "already_there": plan.num_known,
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out.items],
        "total": {
            **count(session.documents),
            "bytes": count_bytes(memory) if memory.exists() else 0,
        },
    }


def print_result(result: dict[str, Any], reasons: str) -> None:
    """Print what was left out and why, what was read, and what the memory holds now."""
    left_out = result["left_out"]
    if left_out:
        say(f"left out: {reasons}")
        for item in left_out[:_LEFT_OUT_SHOWN]:
            say(f"  {item['name']}: {item['reason']}")
        if len(left_out) > _LEFT_OUT_SHOWN:
            say(f"  and {len(left_out) - _LEFT_OUT_SHOWN:,} more; --json has them all")
    read, total = result["read"], result["total"]
    there = result["already_there"]
    show(
        f"read {read['documents']:,} documents, {read['tokens']:,} tokens, "
        f"{read['entries']:,} entries, {read['tokens_per_s']:,.0f} tokens/s"
        + (f"; {there:,} were there already" if there else "")
    )
    show(
        f"{result['memory']}: {total['documents']:,} documents, {total['tokens']:,} tokens, "
        f"{total['entries']:,} entries, {describe_bytes(total['bytes'])} on disk"
    )
