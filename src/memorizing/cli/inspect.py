"""`memorizing inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memorizing.cli.options import (
    AdapterOption,
    DeviceOption,
    ProbedPrecisionOption,
    option,
    prepare_files,
)
from memorizing.errors import ConfigError
from memorizing.terminal import say, show_progress

if TYPE_CHECKING:
    from memorizing.analysis.inspection import Inspection
    from memorizing.data import Document

EXAMPLES = """\b
examples:
  memorizing inspect runs/small --text src/model.py --out report.html
  memorizing inspect runs/small --text proof.thy --capacity 65536 --against 512
  memorizing inspect HuggingFaceTB/SmolLM2-135M --text new.py --memory repo.memory
  memorizing inspect HuggingFaceTB/SmolLM2-135M --text book.txt --index faiss_hnsw
"""

MAX_TOKENS = 32_768


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Folder of a run, or a model of transformers: its folder, or its name on the hub.",
        ),
    ],
    text: Annotated[Path, option("FILE", "The text that is read.", "--text")],
    memory: Annotated[
        Path | None,
        option("DIR", "Of a MODEL: folder that `memorizing read` made. Default: none.", "--memory"),
    ] = None,
    out: Annotated[
        Path, option("FILE.html", "The page; the data behind it go to FILE.json.")
    ] = Path("report.html"),
    capacity: Annotated[
        int | None,
        option("N", "Entries of the text's own memory. Default: as the model has it.", min=1),
    ] = None,
    against: Annotated[
        int, option("N", "Compare with a memory of so many entries; 0 is none.", min=0)
    ] = 0,
    max_tokens: Annotated[
        int, option("N", "Only the first N tokens of the text; 0 is all.", min=0)
    ] = MAX_TOKENS,
    index: Annotated[
        str | None,
        option(
            "INDEX",
            "What searches the memory (`memorizing info indexes`). Default: as the model has it.",
        ),
    ] = None,
    adapter: AdapterOption = None,
    precision: ProbedPrecisionOption = "fp32",
    device: DeviceOption = "auto",
) -> None:
    """A page that shows what a memory does: where it helps, and what it looked at.

    The text is read twice, with memory and without; and once more by exact search, where an
    approximate index searches. The page needs no network and no server: open
    it in a browser.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out is {str(out)!r}; the page is an .html file")
    prepare_files(out, out.with_suffix(".json"), plot=out)
    document = load_document(text)

    from memorizing.analysis import write_inspection
    from memorizing.index_settings import parse_index
    from memorizing.knn import make_index

    if index is not None:
        if memory is not None or adapter is not None:
            raise ConfigError(
                f"--index is given, and {memory or adapter} says what searches the memory; leave "
                "it out (another index: `memorizing read MODEL FILES --set index=...`)"
            )
        make_index(parse_index(index))  # a missing package is said before the work
    settings = {"capacity": capacity, "against": against, "max_tokens": max_tokens}
    if is_run(Path(model).expanduser()):
        if memory is not None or adapter is not None:
            raise ConfigError(
                "--memory and --adapter are of models of transformers; a run reads the text into "
                "its own memory: leave them out"
            )
        path = Path(model).expanduser()
        found = inspect_own(path, document, index, precision, device, settings)
    else:
        found = inspect_pretrained(
            model, document, memory, adapter, index, precision, device, settings
        )
    data = write_inspection(found, out)
    totals, baseline = (found.sum_nats(n) for n in (found.trace.nats, found.baseline_nats))
    print(
        f"perplexity {totals.perplexity:.3f} {found.memory}, {baseline.perplexity:.3f} "
        f"{found.baseline}, over {totals.tokens:,} tokens"
    )
    say(f"written: {out}, {out.stat().st_size / 1e6:.1f} MB, and {data}")


def load_document(path: Path) -> Document:
    """The text of a file, as `evaluate --corpus files:` reads it.

    Raises:
        CorpusError: there is none.
        ConfigError: a folder, or a pattern of several files.
    """
    from memorizing.config import DataConfig
    from memorizing.data import load_corpus

    documents = list(load_corpus(DataConfig(corpus=f"files:{path}")).documents())
    if path.is_dir() or len(documents) != 1:
        raise ConfigError(f"--text is {str(path)!r}, {len(documents)} files; give one file")
    return documents[0]


def is_run(path: Path) -> bool:
    """Whether a folder is a run of ours, or one of its checkpoints."""
    from memorizing.training.run_folder import CONFIG_FILE

    if (path / CONFIG_FILE).is_file():
        return True
    try:
        values = json.loads((path / "config.json").read_bytes())
        return str(values["model_type"]).startswith("memorizing")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def inspect_own(
    run_dir: Path,
    document: Document,
    index: str | None,
    precision: Any,
    device: str,
    settings: dict[str, Any],
) -> Inspection:
    """A text in a model of ours.

    Raises:
        ConfigError: a model without memory, or without a tokenizer.
    """
    import dataclasses

    from memorizing.analysis import inspect_run
    from memorizing.cli.pretrained import choose_device
    from memorizing.training import choose_precision, load_model
    from memorizing.training.reporting import METRICS_FILE, read_metrics

    place = choose_device(device)
    loaded = load_model(run_dir, device=place)
    shape = loaded.config
    if loaded.tokenizer is None or not shape.has_memory:
        what = "no tokenizer" if loaded.tokenizer is None else "no memory"
        raise ConfigError(f"{run_dir} has {what}; give a run that has one")
    choice = choose_precision(precision, shape.model_dim, shape.ffn_dim, place)
    loaded.model.compute_dtype = choice.dtype
    if index is not None:
        loaded.model.config = dataclasses.replace(shape, index=index)
    with show_progress("reading") as progress:
        found = inspect_run(
            loaded.model,
            loaded.tokenizer,
            document,
            name=str(run_dir),
            progress=progress,
            **settings,
        )
    metrics = run_dir / METRICS_FILE
    lines = read_metrics(metrics) if metrics.is_file() else []
    gates = tuple(
        (line["step"], line["train"]["gate"]) for line in lines if "gate" in line.get("train", {})
    )
    return dataclasses.replace(found, gates=gates)


def inspect_pretrained(
    model: str,
    document: Document,
    memory: Path | None,
    adapter: Path | None,
    index: str | None,
    precision: Any,
    device: str,
    settings: dict[str, Any],
) -> Inspection:
    """A text in a model of `transformers`.

    Raises:
        MemoryFolderError: the folder is no memory, or one of another model.
    """
    from contextlib import nullcontext

    from memorizing.cli.generate import choose_window
    from memorizing.cli.pretrained import load_model

    if memory is not None:
        from memorizing.memory.disk import MemoryFolder

        MemoryFolder.open(memory)
    loaded, tokenizer = load_model(model, precision, device)

    from memorizing.analysis import inspect_model
    from memorizing.huggingface import add_memory, open_memory
    from memorizing.huggingface.learning.adapter import load_adapter

    if adapter is not None:
        load_adapter(loaded, adapter)
    elif memory is None:
        window = choose_window(loaded)
        add_memory(loaded, window=window, read="entries", index=index or "exact")
    session = None if memory is None else open_memory(loaded, memory, tokenizer=tokenizer)
    with show_progress("reading") as progress, session or nullcontext():
        return inspect_model(
            loaded,
            tokenizer,
            document,
            session,
            name=model,
            memory_name="memory" if memory is None else memory.name,
            progress=progress,
            **settings,
        )
