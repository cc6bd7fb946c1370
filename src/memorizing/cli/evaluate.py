"""`memorizing evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memorizing.cli import evaluate_pretrained
from memorizing.cli.options import (
    AdapterOption,
    CorpusOption,
    DeviceOption,
    HeadsOption,
    JsonOption,
    LayersOption,
    ProbedPrecisionOption,
    TextColumnOption,
    flag,
    option,
    parse_numbers,
    prepare_files,
    set_option,
    write_result,
)
from memorizing.cli.ranks import join_launched
from memorizing.config import Use
from memorizing.errors import ConfigError
from memorizing.terminal import make_console, show_progress

EXAMPLES = """\b
examples:
  memorizing evaluate runs/small --capacity 0,512,2048,8192,65536
  memorizing evaluate runs/small --controls --against runs/cache_only
  memorizing evaluate runs/small --use test --json test.json --plot test.png
  memorizing evaluate runs/small --corpus files:books --max-tokens 100000
  memorizing evaluate runs/small --capacity 65536 --index faiss_hnsw
  torchrun --nproc-per-node 2 -m memorizing evaluate runs/small
  memorizing evaluate MODEL --corpus files:books --controls
  memorizing evaluate MODEL --corpus files:books --heads 18:6,7 --controls \\
      --retrieval bm25 --stride 16 --max-tokens 4096
"""


def run(
    run_or_model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Folder of a run. With --corpus also a checkpoint, or a model of transformers, by "
            "its folder or its name on the hub.",
        ),
    ],
    corpus: CorpusOption = None,
    text_column: TextColumnOption = "text",
    use: Annotated[
        Use | None,
        flag(
            "Documents of the run's corpus: held out for choices (validation, the default) or for "
            "claims (test), trained on, or all. Of another corpus: all."
        ),
    ] = None,
    capacity: Annotated[
        str | None, option("N,N,...", "Entries of the memory. Default: as in the recipe.")
    ] = None,
    controls: Annotated[
        bool | None,
        flag(
            "Also memory off, another document's memory, values shuffled. Default: those that the "
            "recipe names.",
            "--controls/--no-controls",
            show_default=False,
        ),
    ] = None,
    spread: Annotated[
        bool | None,
        flag(
            "In several processes: each holds a part of every memory, and all read every document. "
            "Default: as in the recipe.",
            "--spread/--no-spread",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        option("RUN2", "Compare with this run, token by token; 95% intervals draw documents."),
    ] = None,
    documents: Annotated[int, option("N", "Only the first N documents; 0 is all.", min=0)] = 0,
    max_tokens: Annotated[
        int | None,
        option("N", "Only the first N tokens of each; 0 is all. Default: as in the recipe.", min=0),
    ] = None,
    rows: Annotated[int | None, option("N", "Documents read side by side.", min=1)] = None,
    precision: ProbedPrecisionOption = "fp32",
    index: Annotated[
        str | None,
        option(
            "INDEX",
            "What searches the memory (`memorizing info indexes`). Default: as in the recipe.",
        ),
    ] = None,
    memory: Annotated[
        Path | None, option("DIR", "MODEL: also read what `memorizing read` made.", "--memory")
    ] = None,
    layers: LayersOption = None,
    heads: HeadsOption = None,
    window: Annotated[
        int | None, option("N", "MODEL: tokens of local attention. Default: 512.", min=1)
    ] = None,
    settings: Annotated[
        list[str] | None, set_option("MODEL: a setting of the memory, as read=entries.")
    ] = None,
    adapter: AdapterOption = None,
    retrieval: Annotated[
        evaluate_pretrained.Retrieval | None,
        flag(
            "MODEL: beside its rival without memory, which reads the window anew behind the "
            "passages that BM25 finds in the document."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        option("N", "Of --retrieval: tokens until it finds and reads anew. Default: 4.", min=1),
    ] = None,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
    plot: Annotated[Path | None, option("FILE.png", "Draw perplexity against capacity.")] = None,
) -> None:
    """Perplexity and bits per byte over whole documents, with each memory.

    A model that was trained with a small memory can be evaluated with larger ones. A model of
    transformers is given a memory, which has the document itself behind its window, and with
    --memory what was read before; nothing is trained.
    """
    numbers = None if capacity is None else parse_numbers(capacity, "--capacity")
    of_runs = {
        "--use": use,
        "--against": against,
        "--rows": rows,
        "--index": index,
        "--plot": plot,
        "--spread": spread,
    }
    of_models = {
        "--memory": memory,
        "--layers": layers,
        "--heads": heads or None,
        "--window": window,
        "--set": settings,
        "--adapter": adapter,
        "--retrieval": retrieval,
    }
    is_model = evaluate_pretrained.is_pretrained(run_or_model)
    for name, value in (of_runs if is_model else of_models).items():
        if value is not None:
            is_what = "a model of transformers" if is_model else "a run, or was to be one"
            raise ConfigError(
                f"{name} is given, and {run_or_model!r} is {is_what}; leave {name} out"
            )
    with join_launched(device) as ranks:
        if not ranks.is_main:
            json_file = plot = None
        if ranks.size > 1:
            device = str(ranks.find_device())
        if is_model:
            prepare_files(json_file)
            evaluate_pretrained.evaluate(
                run_or_model,
                corpus,
                text_column,
                numbers,
                controls=bool(controls),
                num_documents=documents,
                max_tokens=max_tokens or 0,
                memory=memory,
                layers=layers,
                heads=heads,
                window=window,
                settings=settings,
                adapter=adapter,
                retrieval=retrieval,
                stride=stride,
                precision=precision,
                device=device,
                json_file=json_file,
                ranks=ranks,
            )
            return
        if plot is not None and numbers is not None and not any(numbers):
            raise ConfigError(
                f"--plot with --capacity {capacity} has no memory to draw; give a capacity above 0"
            )
        prepare_files(json_file, plot=plot)

        from memorizing.analysis import (
            describe_reach,
            make_position_table,
            make_result_table,
            plot_capacities,
        )
        from memorizing.run_report import report_run

        with show_progress("evaluating") as progress:
            report = report_run(
                Path(run_or_model),
                corpus=corpus,
                text_column=text_column,
                use=use,
                capacities=numbers,
                controls=controls,
                against=against,
                num_documents=documents,
                max_tokens=max_tokens,
                rows=rows,
                precision=precision,
                index=index,
                device=None if device == "auto" else device,
                progress=progress,
                ranks=ranks,
                spread=spread,
            )
        console = make_console()
        for line in report.corpus:
            console.print(line, markup=False, highlight=False)
        baseline = report.baseline
        other = against.name if against else ""
        console.print(
            make_result_table(
                report.results,
                baseline=baseline,
                baseline_name=other,
                differences=report.differences if baseline else None,
            )
        )
        columns = {
            f"{result.capacity:,}": result
            for result in report.results.values()
            if result.control is None
        }
        console.print(make_position_table({**({other: baseline} if baseline else {}), **columns}))
        reach = describe_reach(report.results)
        if reach:
            console.print(reach, highlight=False)
        write_result(json_file, report.to_dict())
        if plot is not None:
            plot_capacities(report.results, plot, baseline=baseline, baseline_name=other)
            console.print(f"written: {plot}", markup=False, highlight=False)
