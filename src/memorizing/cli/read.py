"""`memorizing read`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memorizing.cli.evaluate import Precision
from memorizing.cli.output import (
    INTERRUPTED_STATUS,
    JsonOption,
    parse_numbers,
    prepare_file,
    say,
    show_progress,
    write_result,
)
from memorizing.cli.pretrained import (
    AdapterOption,
    DeviceOption,
    ModelArgument,
    PrecisionOption,
    count_bytes,
    describe_bytes,
    load_model,
    open_folder,
    show_name,
)
from memorizing.cli.reading_plan import Plan, find_sources, plan_reading
from memorizing.cli.reading_progress import ReadingProgress
from memorizing.errors import ConfigError

if TYPE_CHECKING:
    from memorizing.data.text import ReadLog
    from memorizing.huggingface import MemorySession
    from memorizing.memory.disk import MemoryFolder, StoredDocument

EXAMPLES = """\b
examples:
  memorizing read runs/smollm2 src docs README.md --memory repo.memory
  memorizing read runs/smollm2 src --memory repo.memory --update
  memorizing read runs/smollm2 proofs --memory proofs.memory --calibrate
  memorizing read runs/smollm2 'books/**/*.txt' --memory books.memory --layers 20 --keep-text
  memorizing read runs/smollm2 . --memory repo.memory --exclude node_modules --exclude '*.min.js'
  git log | memorizing read runs/smollm2 - --name history --memory repo.memory
"""

_LEFT_OUT_SHOWN = 5


class EntryType(StrEnum):
    """How entries are stored."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    INT8 = "int8"


def run(
    model: ModelArgument,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES...", help="Files, folders, patterns in quotes, or - for standard input."
        ),
    ],
    memory: Annotated[
        Path,
        typer.Option("--memory", metavar="DIR", help="Folder of the memory; made, or added to."),
    ],
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Layers that read it. Default: one, at 3/5 of the depth."
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Find layers and heads that gain, on the beginning of FILES."
        ),
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens of local attention. Default: 512."),
    ] = None,
    dtype: Annotated[
        EntryType | None, typer.Option(help="Of stored entries. Default: bfloat16.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another setting of the memory, as num_neighbors=64. Repeatable.",
        ),
    ] = None,
    keep_text: Annotated[
        bool,
        typer.Option(
            "--keep-text", help="Also keep the texts, for `generate --sources` and reports."
        ),
    ] = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Read documents that have changed again, in their place."),
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Leave out files and folders of such names. Repeatable."
        ),
    ] = None,
    max_file_mib: Annotated[
        float, typer.Option(min=0.0, metavar="MIB", help="Leave out files that are larger.")
    ] = 2.0,
    prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="Put before all names, as other_repository/.")
    ] = "",
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of what is read from standard input.")
    ] = None,
    adapter: AdapterOption = None,
    precision: PrecisionOption = Precision.AUTO,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Let a model read files, and keep what it read as a memory. Nothing is trained.

    A document is a file, named by its path in the folder that is given. Hidden files, binary ones
    and empty ones are left out. What is in the memory already is not read again, so that the same
    command goes on where it was stopped; Ctrl-C keeps all documents that were read whole.
    """
    if calibrate and (layers is not None or adapter is not None):
        raise ConfigError("--calibrate finds layers, and --layers or --adapter has them; give one")
    prepare_file(json_file)
    wanted = parse_settings(layers, window, settings or [])

    from memorizing.data.reading.files import Rules
    from memorizing.data.text import ReadLog

    left_out = ReadLog()
    folder = open_folder(memory)
    check_settings(memory, folder, wanted, dtype)
    rules = Rules(round(max_file_mib * 2**20), tuple(exclude or ()))
    sources = find_sources(files, rules, prefix, name, left_out)
    plan = plan_reading(sources, folder, update=update, path=memory)
    loaded, tokenizer = load_model(model, precision, device)

    from memorizing.huggingface import add_memory, open_memory
    from memorizing.huggingface.attaching.attachment import get_attachment
    from memorizing.huggingface.learning.adapter import load_adapter
    from memorizing.huggingface.learning.calibration import add_calibrated_memory

    if folder is None and dtype and dtype != EntryType.INT8:
        wanted["dtype"] = dtype.value
    if adapter is not None:
        load_adapter(loaded, adapter, **({} if folder else wanted))
    elif folder is None and calibrate:
        say("calibrating on the beginning of the files, which is read several times")
        with show_progress("calibrating") as advance:
            texts = (source.load() or "" for source in plan.sources)
            found = add_calibrated_memory(loaded, tokenizer, texts, progress=advance, **wanted)
        say(f"calibrated: {found}")
    elif folder is None:
        add_memory(loaded, **wanted)
    session = open_memory(
        loaded, memory, keep_text=keep_text, dtype=dtype.value if dtype and not folder else None
    )
    say(describe_plan(plan, memory, get_attachment(loaded).settings.layers))
    progress = ReadingProgress(len(plan.sources), plan.num_bytes)
    before = {(document.name, document.sha256) for document in session.documents}
    is_interrupted = False
    try:
        with progress.watch(loaded):
            if plan.sources:
                texts = follow(plan, progress)
                session.read(tokenizer, texts, update=update, progress=False)
    except KeyboardInterrupt:
        is_interrupted = True
    read = [one for one in session.documents if (one.name, one.sha256) not in before]
    result = summarize(memory, model, session, read, plan, left_out, progress)
    print_result(result)
    short = [one.name for one in read if not one.num_entries]
    if short:
        say(
            f"{len(short):,} documents leave nothing in memory, such as {show_name(short[0])}: "
            f"the first {get_attachment(loaded).settings.num_sinks} tokens of a text are not stored"
        )
    write_result(json_file, {**result, "interrupted": is_interrupted})
    if is_interrupted:
        say("interrupted; what was read whole is kept, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED_STATUS)


def parse_settings(
    layers: str | None, window: int | None, settings: Sequence[str]
) -> dict[str, Any]:
    """Settings of a memory that were given, by name.

    Raises:
        ConfigError: an unknown one, or one that is not written as KEY=VALUE.
    """
    from memorizing.huggingface.attaching.memory_settings import MemorySettings
    from memorizing.settings import describe_unknown, list_keys, parse_value

    values: dict[str, Any] = {}
    known = [key for key in list_keys(MemorySettings) if key not in ("layers", "window", "dtype")]
    for text in settings:
        key, separator, value = (part.strip() for part in text.partition("="))
        if key in ("layers", "window", "dtype"):
            raise ConfigError(f"--set has {text!r}; write --{key} {value}")
        if not separator or key not in known:
            raise ConfigError(describe_unknown("setting of a memory", key, known))
        values[key] = parse_value(value)
    if layers is not None:
        values["layers"] = parse_numbers(layers, "--layers")
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
    stored = dict(folder.description.settings.get("memory", {}))
    stored["dtype"] = folder.description.dtype
    if dtype is not None:
        wanted = {**wanted, "dtype": dtype.value}
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise ConfigError(
                f"{path} was made with {key} = {stored.get(key)}, and {value} is asked for; leave "
                "that out, or make another memory"
            )


def follow(plan: Plan, progress: ReadingProgress) -> Iterator[tuple[str, str]]:
    """Name and text of what is read, each loaded when it is its turn, and progress told of each."""
    for source in plan.sources:
        text = source.load()
        if text is not None:
            progress.begin(source.name, source.num_bytes)
            yield source.name, text
    progress.begin("", 0)


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
        "read": {
            **count(read),
            "seconds": round(progress.seconds, 3),
            "tokens_per_s": round(progress.tokens_per_s, 1),
        },
        "already_there": plan.num_known,
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out.items],
        "total": {
            **count(session.documents),
            "bytes": count_bytes(memory) if memory.exists() else 0,
        },
    }


def print_result(result: dict[str, Any]) -> None:
    """Print what was left out and why, what was read, and what the memory holds now."""
    left_out = result["left_out"]
    if left_out:
        counts: dict[str, int] = {}
        for item in left_out:
            counts[item["reason"]] = counts.get(item["reason"], 0) + 1
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        say(f"left out: {reasons}")
        for item in left_out[:_LEFT_OUT_SHOWN]:
            say(f"  {show_name(item['name'])}: {item['reason']}")
        if len(left_out) > _LEFT_OUT_SHOWN:
            say(f"  and {len(left_out) - _LEFT_OUT_SHOWN:,} more; --json has them all")
    read, total = result["read"], result["total"]
    there = result["already_there"]
    print(
        f"read {read['documents']:,} documents, {read['tokens']:,} tokens, "
        f"{read['entries']:,} entries, {read['tokens_per_s']:,.0f} tokens/s"
        + (f"; {there:,} were there already" if there else "")
    )
    print(
        f"{result['memory']}: {total['documents']:,} documents, {total['tokens']:,} tokens, "
        f"{total['entries']:,} entries, {describe_bytes(total['bytes'])} on disk"
    )
