"""`memorizing evaluate` of a model of `transformers`: what a memory adds to its window."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from memorizing.cli.options import Precision, write_result
from memorizing.cli.pretrained import load_model
from memorizing.cli.read import read_settings
from memorizing.config import Control, DataConfig
from memorizing.errors import ConfigError
from memorizing.terminal import make_console, say, show_progress

if TYPE_CHECKING:
    from memorizing.ranks import Ranks

OURS = ("memorizing_transformer", "memorizing")
"""What `config.json` calls a model that `memorizing train` wrote."""

Retrieval = Literal["bm25"]


def is_pretrained(name: str) -> bool:
    """Whether a model of `transformers` is meant, by its folder or its name on the hub."""
    path = Path(name)
    if not path.exists():
        return len(path.parts) == 2 and not path.parent.is_dir()
    try:
        values = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type", OURS[0]) not in OURS


def evaluate(
    name: str,
    corpus: str | None,
    text_column: str,
    capacities: Sequence[int] | None,
    *,
    controls: bool,
    num_documents: int,
    max_tokens: int,
    memory: Path | None,
    layers: str | None,
    heads: Sequence[str] | None,
    window: int | None,
    settings: Sequence[str] | None,
    adapter: Path | None,
    retrieval: Retrieval | None,
    stride: int | None,
    precision: Precision,
    device: str,
    json_file: Path | None,
    ranks: Ranks,
) -> None:
    """Perplexity of whole documents with each memory, beside the window alone; see `evaluate.run`.

    Raises:
        ConfigError: options that say nothing together.
    """
    if corpus is None:
        raise ConfigError(f"{name} is a model of transformers; say what it reads: --corpus")
    if stride is not None and retrieval is None:
        raise ConfigError(f"--stride is {stride}, and nothing is retrieved; add --retrieval bm25")
    wanted = read_settings(layers, heads, window, settings)
    given = wanted and (memory or adapter)
    if given:
        raise ConfigError(
            f"{', '.join(wanted)} of the memory are given, and {given} has them; leave them out"
        )

    from memorizing.data import load_splits
    from memorizing.evaluation import compare_results, evaluate_model
    from memorizing.evaluation.in_context import InContext
    from memorizing.evaluation.pretrained import evaluate_in_context
    from memorizing.huggingface import MemorySettings, add_memory, open_memory
    from memorizing.huggingface.attaching.attachment import get_attachment
    from memorizing.huggingface.learning.adapter import load_adapter
    from memorizing.memory.disk import MemoryFolder
    from memorizing.settings import build_dataclass

    # Refused before anything is loaded.
    known = {key: value for key, value in wanted.items() if key not in ("layers", "heads")}
    checked = {"layers": [0], "segment_len": wanted.get("window", MemorySettings.window), **known}
    build_dataclass(MemorySettings, checked, "memory.")
    if retrieval is not None and ranks.size > 1:
        raise ConfigError("--retrieval works in one process; leave it out, or start one")
    how = InContext() if stride is None else InContext(stride)
    if memory is not None:
        MemoryFolder.open(memory)
    splits = load_splits(DataConfig(corpus=corpus, text_column=text_column))
    documents = [*splits.train, *splits.validation, *splits.test][: num_documents or None]
    if controls and len(documents) < 2:
        raise ConfigError(
            f"--controls needs two documents, and there is {len(documents)}: one reads the memory "
            "of the other; give another, or leave it out"
        )
    loaded, tokenizer = load_model(name, precision, device)
    start_s = time.monotonic()
    with ExitStack() as stack:
        if adapter is not None:
            load_adapter(loaded, adapter)
        elif memory is None:
            add_memory(loaded, **wanted)
        if memory is not None:
            stack.enter_context(open_memory(loaded, memory, tokenizer=tokenizer))
        memory_settings = get_attachment(loaded).settings
        capacities = [*(capacities or (0, memory_settings.capacity))]
        options: dict[str, Any] = {"max_tokens": max_tokens}
        options["progress"] = stack.enter_context(show_progress("evaluating"))
        results = {
            f"{capacity}": evaluate_model(
                loaded, documents, tokenizer, capacity=capacity, ranks=ranks, **options
            )
            for capacity in sorted(set(capacities))
        }
        for control in get_args(Control) if controls else ():
            results[control] = evaluate_model(
                loaded, documents, tokenizer, control=control, ranks=ranks, **options
            )
        rival = None
        if retrieval is not None:
            rival = evaluate_in_context(loaded, documents, tokenizer, how, **options)
    differences = {key: compare_results(one, rival) for key, one in results.items() if rival}
    say(f"memory: {', '.join(f'{k} {v}' for k, v in memory_settings.to_dict().items())}")
    _print(results, rival, differences, f"BM25, stride {how.stride}")
    write_result(
        json_file,
        {
            "model": name,
            "corpus": splits.describe(),
            "memory": None if memory is None else str(memory),
            "settings": memory_settings.to_dict(),
            "perplexity": {key: one.perplexity for key, one in results.items()},
            "results": {key: one.to_dict() for key, one in results.items()},
            "retrieval": dataclasses.asdict(how) | {"by": retrieval} if rival else None,
            "rival": rival.to_dict() if rival else None,
            "differences": {key: one.to_dict() for key, one in differences.items()},
            "evaluate_s": time.monotonic() - start_s,
        },
    )


def _print(
    results: dict[str, Any], rival: Any, differences: dict[str, Any], rival_name: str
) -> None:
    from memorizing.analysis import describe_reach, make_position_table, make_result_table

    console = make_console()
    table = make_result_table(
        results,
        baseline=rival,
        baseline_name=rival_name,
        differences=differences if rival else None,
    )
    table.caption = None  # of models that were trained with a memory
    console.print(table)
    columns = {f"{one.capacity:,}": one for one in results.values() if one.control is None}
    console.print(make_position_table({**({rival_name: rival} if rival else {}), **columns}))
    reach = describe_reach(results)
    if reach:
        console.print(reach, highlight=False)
