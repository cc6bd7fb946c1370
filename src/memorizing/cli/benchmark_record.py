"""`memorizing benchmark record`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memorizing.cli.evaluate import Precision, Use
from memorizing.cli.output import prepare_file, show_progress

EXAMPLES = """\b
examples:
  memorizing benchmark record runs/small --entries 8192 --out small.recorded
  memorizing benchmark record runs/small --use all --out small.recorded
  memorizing benchmark record runs/small --corpus python:torch --out torch.recorded
"""


def run(
    run_dir: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run (or, with --corpus, a checkpoint)."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    entries: Annotated[int, typer.Option(metavar="N", help="Keys per head.")] = 65_536,
    queries: Annotated[
        int, typer.Option(metavar="N", help="Queries per head, of the tokens after the keys.")
    ] = 512,
    layer: Annotated[
        int | None,
        typer.Option(metavar="N", help="Which memory layer, counted from 0. Default: the first."),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="KIND:WHERE", help="Read another corpus (`memorizing info corpora`)."),
    ] = None,
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="Where jsonl: and parquet: corpora have the text.")
    ] = "text",
    use: Annotated[
        Use | None,
        typer.Option(
            help="Documents of the run's corpus; default: validation. Of another corpus: all."
        ),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="auto asks a short probe of this machine.")
    ] = Precision.AUTO,
) -> None:
    """Record what a trained model's memory holds and is searched for, for `benchmark search`.

    The model reads the longest document, and the next longest ones after it where that is too short
    for as many keys.
    """
    prepare_file(out)

    from memorizing.benchmark.recording import record_search

    with show_progress("reading") as progress:
        recording = record_search(
            run_dir,
            entries,
            num_queries=queries,
            layer=layer,
            corpus=corpus,
            text_column=text_column,
            use=use.value if use else None,
            precision=precision.value,
            on_progress=progress,
        )
    recording.save(out)
    num_heads, num_entries, head_dim = recording.keys.shape
    print(
        f"layer {recording.source['layer']}: {num_entries:,} keys and "
        f"{recording.queries.shape[1]:,} queries of {num_heads} heads of {head_dim} dimensions"
    )
    print(describe_documents(recording.source["documents"]))
    print(f"written: {out}")


def describe_documents(names: list[str]) -> str:
    """Say whether one document was read, or several as if they were one."""
    if len(names) == 1:
        return f"read: {names[0]}"
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"no document is long enough; read as one stream: {len(names)} documents ({shown})"
