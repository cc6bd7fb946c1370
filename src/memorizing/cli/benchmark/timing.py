"""`memorizing benchmark`: one verb below it for everything that is timed.

Those that ask what a model makes of what it has read are in `memory_use`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memorizing.cli.options import (
    CorpusOption,
    JsonOption,
    ProbedPrecisionOption,
    RunArgument,
    TextColumnOption,
    flag,
    option,
    parse_numbers,
    prepare_files,
    write_result,
)
from memorizing.config import Use, load_config
from memorizing.terminal import show, show_progress

RecipeOption = Annotated[str, option("RECIPE", "Name of a recipe, or a TOML file.")]
SizesOption = Annotated[str, option("N,N,...", "Entries of each memory, full.")]
IndexOption = Annotated[str, option("INDEX", "What searches: NAME or NAME:OPTION=VALUE,...")]

_RECIPE = "paper_200m"
_SIZES = "8192,65536"
_NUM_PEAKS = 3
"""Processes of which `--peak-memory` takes the median."""

app = typer.Typer(help="Measure speed, or what a memory is worth.", rich_markup_mode=None)


@app.callback()
def _set_up() -> None:
    """Measure speed on this machine, or what a model makes of what it has read."""


@app.command(
    "search",
    epilog="""\b
examples:
  memorizing benchmark search
  memorizing benchmark search --entries 8192,65536,262144 --json search.json
  memorizing benchmark search --indexes "exact;int8;faiss_hnsw:ef_search=128"
  memorizing benchmark record runs/small --entries 65536 --out small.recorded
  memorizing benchmark search --recorded small.recorded --plot search.png
""",
)
def search(
    entries: SizesOption = _SIZES,
    indexes: Annotated[
        list[str] | None,
        option(
            "INDEX;INDEX;...",
            "name or name:option=value,... (`memorizing info indexes`); may be given more than "
            "once.  [default: exact]",
        ),
    ] = None,
    recorded: Annotated[
        Path | None, option("FILE", "Also search real keys, from `memorizing benchmark record`.")
    ] = None,
    use_random: Annotated[bool, flag("Search random keys.", "--random/--no-random")] = True,
    heads: Annotated[
        int | None, option("N", "Heads.  [default: 8, or those of the recording]")
    ] = None,
    queries: Annotated[int | None, option("N", "Queries per head.  [default: 512]")] = None,
    head_dim: Annotated[
        int | None, option("N", "Dimensions.  [default: 128, or those of the recording]")
    ] = None,
    neighbors: Annotated[int, option("K", "Neighbors of each query.")] = 32,
    pairs: Annotated[int, flag("Measurements of each, interleaved with the product.", min=1)] = 20,
    json_file: JsonOption = None,
    plot: Annotated[
        Path | None, option("FILE.png", "Draw recall against queries per second.")
    ] = None,
) -> None:
    """Time the search of a full memory by each index, and measure its recall.

    One search is all heads and queries. It is compared with the product of queries and keys alone,
    exact search also with torch.topk and faiss.knn. Results are checked before they are timed.
    """
    from memorizing.index_settings import parse_index

    numbers = parse_numbers(entries, "--entries")
    texts = [text for group in indexes or ["exact"] for text in group.split(";") if text.strip()]
    settings = [parse_index(text) for text in texts]
    prepare_files(json_file, plot=plot)

    from memorizing.benchmark import benchmark_search, choose_shape, load_recording
    from memorizing.cli.benchmark.tables import print_searches

    recording = None if recorded is None else load_recording(recorded)
    shape = choose_shape(
        recording,
        num_heads=heads,
        num_queries=queries,
        head_dim=head_dim,
        num_neighbors=neighbors,
    )
    with show_progress("timing searches") as progress:
        result = benchmark_search(
            numbers,
            settings,
            shape=shape,
            recording=recording,
            use_random=use_random,
            num_pairs=pairs,
            on_progress=progress,
        )
    print_searches(result)
    write_result(json_file, result)
    if plot is not None:
        from memorizing.benchmark.plots import plot_search

        plot_search(result, plot)
        show(f"written: {plot}")


@app.command(
    "step",
    epilog="""\b
examples:
  memorizing benchmark step
  memorizing benchmark step --entries 8192,65536 --pairs 5 --json step.json
  memorizing benchmark step --entries 262144 --peak-memory
  memorizing benchmark step --recipe small --index exact
""",
)
def step(
    entries: SizesOption = _SIZES,
    recipe: RecipeOption = _RECIPE,
    pairs: Annotated[
        int, flag("Measurements of each, interleaved with the step without.", min=1)
    ] = 20,
    index: IndexOption = "exact",
    peak_memory: Annotated[
        bool, flag("Also measure peak memory, in fresh processes.", "--peak-memory")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Time a training step of one row with a full memory, and without memory.

    A step is forward, loss, backward and commit. The medians of interleaved pairs are compared, and
    stand beside the bare products of the search (product) and the time of committing a segment
    (append). The step without memory is compared with its arithmetic limit.
    """
    _time_model(
        "step",
        recipe,
        json_file,
        entries=parse_numbers(entries, "--entries"),
        num_pairs=pairs,
        index=index,
        num_peaks=_NUM_PEAKS if peak_memory else 0,
    )


@app.command(
    "decode",
    epilog="""\b
examples:
  memorizing benchmark decode
  memorizing benchmark decode --entries 1048576 --pairs 50 --json decode.json
  memorizing benchmark decode --index faiss_hnsw:ef_search=128 --recorded real.safetensors
""",
)
def decode(
    entries: Annotated[int, option("N", "Entries of the memory, full.", min=1)] = 65_536,
    recipe: RecipeOption = _RECIPE,
    pairs: Annotated[int, flag("Tokens, interleaved with tokens without memory.", min=1)] = 100,
    index: IndexOption = "exact",
    recorded: Annotated[
        Path | None, option("FILE", "Recorded keys and queries, in the place of random ones.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Time decoding one token with a full memory, and without memory.

    Weights are bf16, the batch is one row, and no gradient is kept. The index is built and sealed
    first. Graphs and lists are quicker or slower with the queries, so give recorded ones.
    """
    from memorizing.benchmark import load_recording

    recording = None if recorded is None else load_recording(recorded)
    settings = {"num_pairs": pairs, "index": index, "recording": recording}
    _time_model("token", recipe, json_file, entries=entries, **settings)


@app.command(
    "read",
    epilog="""\b
examples:
  memorizing benchmark read
  memorizing benchmark read --entries 65536,262144 --pairs 10 --json read.json
  memorizing benchmark read --recipe small --index exact
""",
)
def read(
    entries: SizesOption = _SIZES,
    recipe: RecipeOption = _RECIPE,
    pairs: Annotated[int, flag("Segments, interleaved with segments without memory.", min=1)] = 20,
    index: IndexOption = "exact",
    json_file: JsonOption = None,
) -> None:
    """Time reading a long text into memory, searched or closed, and without memory.

    Reading is forward without gradient and commit, segment by segment, weights in bf16, one row.
    """
    numbers = parse_numbers(entries, "--entries")
    _time_model("segment", recipe, json_file, entries=numbers, num_pairs=pairs, index=index)


def _time_model(unit: str, recipe: str, json_file: Path | None, **settings: Any) -> None:
    """Time what a model of a recipe does, print a table, and write the result.

    Args:
        unit: what is timed.
        recipe: its name or file.
        json_file: of `--json`.
        settings: of the function that times it.
    """
    config = load_config(recipe)
    prepare_files(json_file)

    from memorizing import benchmark
    from memorizing.cli.benchmark import tables

    measure, print_table = {
        "step": (benchmark.benchmark_step, tables.print_steps),
        "token": (benchmark.benchmark_decode, tables.print_tokens),
        "segment": (benchmark.benchmark_read, tables.print_segments),
    }[unit]
    with show_progress(f"timing {unit}s") as progress:
        result = measure(config.model, on_progress=progress, **settings)
    print_table(result)
    write_result(json_file, result)


@app.command(
    "record",
    epilog="""\b
examples:
  memorizing benchmark record runs/small --entries 8192 --out small.recorded
  memorizing benchmark record runs/small --use all --out small.recorded
  memorizing benchmark record runs/small --corpus python:torch --out torch.recorded
""",
)
def record(
    run_dir: RunArgument,
    out: Annotated[Path, option("FILE", "The safetensors file to write.")],
    entries: Annotated[int, option("N", "Keys per head.")] = 65_536,
    queries: Annotated[int, option("N", "Queries per head, of the tokens after the keys.")] = 512,
    layer: Annotated[
        int | None, option("N", "Which memory layer, counted from 0. Default: the first.")
    ] = None,
    corpus: CorpusOption = None,
    text_column: TextColumnOption = "text",
    use: Annotated[
        Use | None,
        flag("Documents of the run's corpus; default: validation. Of another corpus: all."),
    ] = None,
    precision: ProbedPrecisionOption = "auto",
) -> None:
    """Record what a trained model's memory holds and is searched for, for `benchmark search`.

    The model reads the longest document, and the next longest ones after it where that is too short
    for as many keys.
    """
    prepare_files(out)

    from memorizing.benchmark import record_search

    with show_progress("reading") as progress:
        recording = record_search(
            run_dir,
            entries,
            num_queries=queries,
            layer=layer,
            corpus=corpus,
            text_column=text_column,
            use=use,
            precision=precision,
            on_progress=progress,
        )
    recording.save(out)
    num_heads, num_entries, head_dim = recording.keys.shape
    show(
        f"layer {recording.source['layer']}: {num_entries:,} keys and "
        f"{recording.queries.shape[1]:,} queries of {num_heads} heads of {head_dim} dimensions"
    )
    show(_describe_documents(recording.source["documents"]))
    show(f"written: {out}")


def _describe_documents(names: list[str]) -> str:
    """Say whether one document was read, or several as if they were one."""
    if len(names) == 1:
        return f"read: {names[0]}"
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"no document is long enough; read as one stream: {len(names)} documents ({shown})"
