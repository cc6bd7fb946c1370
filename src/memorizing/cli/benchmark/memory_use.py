"""`memorizing benchmark recall` and `completion`: does a model say, and use, what it has read?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    prepare_files,
    set_option,
    write_result,
)
from memorizing.cli.pretrained import calibrate_memory, load_model
from memorizing.cli.read import read_settings
from memorizing.errors import ConfigError, CorpusError
from memorizing.storage.files import encode_json, read_json, write_output
from memorizing.terminal import make_display, say

if TYPE_CHECKING:
    from memorizing.benchmark.memory_use.places import Package, Place

RECALL_EXAMPLES = """\b
examples:
  memorizing benchmark recall runs/smollm2 src --heads 18:6,7
  memorizing benchmark recall runs/smollm2 src --calibrate other_repository
  memorizing benchmark recall runs/smollm2 src --answer-len 128 --arms nothing,passages,bm25
  memorizing benchmark recall runs/smollm2 src --embedder runs/minilm --json recall.json
  memorizing benchmark recall runs/smollm2 src --rename
  memorizing benchmark recall runs/smollm2 src --absent
  memorizing benchmark recall runs/smollm2 src --adapter runs/passages/adapter
"""
COMPLETION_EXAMPLES = """\b
examples:
  memorizing benchmark completion runs/smollm2 src/memorizing --heads 18:6,7
  memorizing benchmark completion runs/smollm2 packages/* --places 200 --json completion.json
  memorizing benchmark completion runs/smollm2 packages/* --json completion.json --resume
"""
_ANSWER_LEN = 64
"""Tokens of the window that the prompt of a completion leaves for its answer."""

ArmsOption = Annotated[
    str | None,
    option(
        "NAME,NAME,...",
        "Only these: nothing, entries, passages, passages-1, passages-entries, bm25, bm25-1, "
        "bm25-entries, embedder, embedder-1, whole. Default: all that can be had, but those that "
        "keep entries.",
    ),
]
EmbedderOption = Annotated[
    str | None,
    option(
        "EMBEDDER", "Folder of an encoder of sentences of transformers, or its name on the hub."
    ),
]
CalibrateOption = Annotated[
    list[str] | None,
    option(
        "FILE",
        "Find the heads that find passages on these files or folders, none of which is asked "
        "about. Repeatable.",
    ),
]
WindowOption = Annotated[
    int | None, option("N", "Tokens of local attention, with a memory. Default: 512.", min=1)
]
SettingsOption = Annotated[
    list[str] | None, set_option("A setting of the memory of passages, as num_passages=2.")
]
QueryOption = Annotated[
    int, option("N", "Last tokens of a prompt that BM25 and the embedder search for.", min=1)
]
WholeOption = Annotated[int, option("N", "Most tokens of whole files.", min=1)]
SeedOption = Annotated[int, option("N", "Of what is drawn.")]
ResumeOption = Annotated[
    bool,
    flag(
        "Go on with what --json has: what was asked is not asked again, and its arms are shown "
        "too.",
        "--resume",
    ),
]
ExcludeOption = Annotated[
    list[str] | None, option("PATTERN", "Leave out files and folders of such names. Repeatable.")
]


def recall(
    model: ModelArgument,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES...", help="Files, folders, or patterns in quotes: read."),
    ],
    prompts: Annotated[int, option("N", "How many.", min=1)] = 200,
    prompt_len: Annotated[int, option("N", "Tokens of a prompt.", min=1)] = 48,
    answer_len: Annotated[int, option("N", "Tokens asked for: 16, or 128 for long.", min=1)] = 16,
    rename: Annotated[
        bool, flag("Harder: names in the prompts are other than in the files.", "--rename")
    ] = False,
    absent: Annotated[
        bool, flag("Harder: a prompt's file is not in memory. Does the score show it?", "--absent")
    ] = False,
    arms: ArmsOption = None,
    embedder: EmbedderOption = None,
    layers: LayersOption = None,
    heads: HeadsOption = None,
    calibrate: CalibrateOption = None,
    window: WindowOption = None,
    settings: SettingsOption = None,
    query_len: QueryOption = 64,
    whole_len: WholeOption = 8192,
    seed: SeedOption = 0,
    exclude: ExcludeOption = None,
    adapter: AdapterOption = None,
    precision: ModelPrecisionOption = "auto",
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """Does a model say what it has read? Against retrieval that is pasted into the prompt.

    Prompts are stretches of the files; what is asked for is what stands next in the file, by greedy
    decoding. Pasted arms have as many tokens of the files in sight as a memory has at most, but not
    whole files, which no search could know. Files must be newer than the model to say anything.
    """
    wanted, chosen, notes = _prepare(
        arms, embedder, layers, heads, calibrate, window, settings, json_file, resume
    )

    from memorizing.benchmark.memory_use.places import draw_quotes, encode_package, rename_words

    texts = _load_texts(files, exclude)
    loaded, tokenizer = load_model(model, precision, device)
    _load_adapter(loaded, adapter, wanted, has_heads=calibrate is not None)
    _calibrate(loaded, tokenizer, calibrate, wanted)
    package = encode_package(tokenizer, "files", texts)
    places = draw_quotes(package, prompts, prompt_len=prompt_len, answer_len=answer_len, seed=seed)
    if rename:
        places = [rename_words(place, tokenizer, seed) for place in places]
    if absent:
        from dataclasses import replace

        places = [replace(place, left_out=True) for place in places]
    facts = {"verb": "recall", "prompt_len": prompt_len, "answer_len": answer_len, "seed": seed}
    facts |= {"rename": rename, "absent": absent, "adapter": _name(adapter)}
    setup = {"query_len": query_len, "whole_len": whole_len, "embedder": embedder}
    _measure(
        loaded, tokenizer, [package], places, chosen, wanted, setup, facts, notes, json_file, resume
    )


def completion(
    model: ModelArgument,
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDERS...", help="Folders of Python files, a package each."),
    ],
    places: Annotated[int, option("N", "Calls to complete, of all packages.", min=1)] = 200,
    prompt_len: Annotated[
        int | None, option("N", "Tokens before the call. Default: the window, less 64.", min=16)
    ] = None,
    arms: ArmsOption = None,
    embedder: EmbedderOption = None,
    layers: LayersOption = None,
    heads: HeadsOption = None,
    calibrate: CalibrateOption = None,
    window: WindowOption = None,
    settings: SettingsOption = None,
    query_len: QueryOption = 64,
    whole_len: WholeOption = 8192,
    seed: SeedOption = 0,
    exclude: ExcludeOption = None,
    adapter: AdapterOption = None,
    precision: ModelPrecisionOption = "auto",
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """Does a model use what it has read? It completes calls of what other files define.

    A package is read but for one file; the model goes on from the opening parenthesis of a call in
    that file, of a function, class or method of another file of the package. Each arm has as many
    tokens of the package in sight as the passages of the memory, but for whole files, which are
    those that define what is called.
    """
    wanted, chosen, notes = _prepare(
        arms, embedder, layers, heads, calibrate, window, settings, json_file, resume
    )

    from memorizing.benchmark.memory_use.completion import draw_calls
    from memorizing.benchmark.memory_use.places import encode_package
    from memorizing.huggingface.attaching.memory_settings import MemorySettings

    texts = {str(folder): _load_python(folder, exclude) for folder in folders}
    loaded, tokenizer = load_model(model, precision, device)
    _load_adapter(loaded, adapter, wanted, has_heads=calibrate is not None)
    _calibrate(loaded, tokenizer, calibrate, wanted)
    if prompt_len is None:
        prompt_len = max(16, wanted.get("window", MemorySettings.window) - _ANSWER_LEN)
    packages = [encode_package(tokenizer, name, found) for name, found in texts.items()]
    drawn = draw_calls(packages, places, tokenizer, prompt_len=prompt_len, seed=seed)
    facts = {"verb": "completion", "prompt_len": prompt_len, "seed": seed}
    facts["adapter"] = _name(adapter)
    setup = {"query_len": query_len, "whole_len": whole_len, "embedder": embedder}
    _measure(
        loaded, tokenizer, packages, drawn, chosen, wanted, setup, facts, notes, json_file, resume
    )


VERBS = {"recall": (recall, RECALL_EXAMPLES), "completion": (completion, COMPLETION_EXAMPLES)}
"""Below `memorizing benchmark`."""


def _prepare(
    arms: str | None,
    embedder: str | None,
    layers: str | None,
    heads: Sequence[str] | None,
    calibrate: Sequence[str] | None,
    window: int | None,
    settings: Sequence[str] | None,
    json_file: Path | None,
    resume: bool,
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Settings of the memory, names of arms and notes on those that are left out.

    Raises:
        ConfigError: what cannot be.
    """
    from memorizing.benchmark.memory_use.running import choose_arms

    if resume and json_file is None:
        raise ConfigError("--resume goes on with a file; name it with --json")
    if calibrate and (layers or heads):
        raise ConfigError("--calibrate finds layers and heads; leave out --layers and --heads")
    wanted = read_settings(layers, heads, window, settings)
    if "read" in wanted:
        raise ConfigError("--set has read, and every way is measured here; choose with --arms")
    names = None if arms is None else [name.strip() for name in arms.split(",")]
    chosen, notes = choose_arms(names, has_embedder=embedder is not None)
    prepare_files(json_file)
    return wanted, chosen, notes


def _name(path: Path | None) -> str | None:
    """For JSON."""
    return None if path is None else str(path)


def _load_adapter(
    model: Any, adapter: Path | None, wanted: dict[str, Any], *, has_heads: bool
) -> None:
    """Put what was learned for passages into a model, and its heads among the settings. In place.

    Raises:
        ConfigError: it was learned for entries.
    """
    if adapter is None:
        return
    from memorizing.huggingface.learning.adapter import load_adapter, read_adapter_settings

    read = read_adapter_settings(adapter).read
    if read != "passages":
        raise ConfigError(
            f"{adapter} was trained with read = {read!r}, and here memories are made anew, without "
            "its gates; give one that was trained with --read passages"
        )
    load_adapter(model, adapter)
    heads = _take_heads(model)
    if not (has_heads or wanted.keys() & {"layers", "heads"}):
        wanted["heads"] = heads


def _calibrate(
    model: Any, tokenizer: Any, files: Sequence[str] | None, wanted: dict[str, Any]
) -> None:
    """Put the heads that find passages of some files among the settings. In place."""
    if not files:
        return
    texts = [text for _, text in _load_texts(files, None)]
    calibrate_memory(
        model, tokenizer, texts, "files of --calibrate", {**wanted, "read": "passages"}
    )
    wanted["heads"] = _take_heads(model)


def _take_heads(model: Any) -> dict[int, list[int]]:
    """The open heads of a memory, which is taken off the model. In place."""
    from memorizing.huggingface import remove_memory
    from memorizing.huggingface.attaching.attachment import get_attachment, list_open_heads

    found = list_open_heads(get_attachment(model).dump_heads())
    remove_memory(model)
    return {int(layer): list(heads) for layer, heads in found.items()}


def _load_texts(given: Sequence[str], exclude: Sequence[str] | None) -> list[tuple[str, str]]:
    """Names and texts of files, as `memorizing read` finds them.

    Raises:
        CorpusError: there are none.
    """
    from memorizing.data.reading.files import Rules, find_text_files, load_text
    from memorizing.data.text import ReadLog

    left_out = ReadLog()
    rules = Rules(2 * 2**20, tuple(exclude or ()))
    found = find_text_files(given, rules, left_out)
    texts = [(name, load_text(path, name, left_out)) for name, path in found.items()]
    kept = [(name, text) for name, text in texts if text is not None]
    if left_out.items:
        say(f"left out: {left_out.describe()}")
    if not kept:
        raise CorpusError(f"there is no text in {', '.join(given)}; name files of text")
    return kept


def _load_python(folder: Path, exclude: Sequence[str] | None) -> list[tuple[str, str]]:
    """Names and texts of Python files.

    Raises:
        CorpusError: it is no folder, or has none.
    """
    if not folder.is_dir():
        raise CorpusError(f"{str(folder)!r} is no folder; a package is a folder of Python files")
    texts = [
        (name, text) for name, text in _load_texts([str(folder)], exclude) if name[-3:] == ".py"
    ]
    if len(texts) < 2:
        raise CorpusError(
            f"{str(folder)!r} has {len(texts)} Python files, and a call is completed by what "
            "another file defines; name a folder of two or more"
        )
    return texts


def _measure(
    model: Any,
    tokenizer: Any,
    packages: Sequence[Package],
    places: Sequence[Place],
    arms: Sequence[str],
    wanted: dict[str, Any],
    options: dict[str, Any],
    facts: dict[str, Any],
    notes: Sequence[str],
    json_file: Path | None,
    resume: bool,
) -> None:
    """Run the arms, print the tables, and write the result."""
    from memorizing.benchmark.memory_use.readers import Setup
    from memorizing.benchmark.memory_use.retrievers import SentenceEncoder
    from memorizing.benchmark.memory_use.running import (
        check_facts,
        check_kept,
        limit_whole,
        run_arms,
    )
    from memorizing.cli.benchmark.memory_use_tables import print_result

    embedder = options["embedder"]
    facts = {**facts, "embedder": embedder}
    earlier = None
    if resume and json_file is not None and json_file.exists():
        earlier = read_json(json_file, ConfigError, "begin anew without --resume")
        known = earlier.get("embedder")
        if embedder is None or known is None:  # at most one of the two has arms with one
            facts["embedder"] = earlier["embedder"] = embedder or known
        check_facts(earlier, facts)

    head = {**facts, "notes": list(notes)}

    def save(result: dict[str, Any]) -> None:
        if json_file is not None:
            write_output(json_file, encode_json({**head, **result}))

    encoder = None if embedder is None else SentenceEncoder(embedder, model.device)
    display = make_display(is_patient=True, is_transient=True)
    shown = {"done": 0, "arm": ""}

    def show_reading(name: str) -> None:
        display.update(shown["done"], {"arm": shown["arm"], "reading": name[-40:]})

    def show_place(done: int, total: int, label: str) -> None:
        shown.update(done=done, arm=label)
        display.update(done, {"arm": label}, total)

    with tempfile.TemporaryDirectory(prefix="memorizing-") as folder:
        setup = Setup(
            model,
            tokenizer,
            Path(folder),
            wanted,
            encoder,
            options["query_len"],
            on_read=show_reading,
        )
        check_kept(setup, arms)
        room_len = setup.settings.room_len
        setup.whole_len = limit_whole(model, places, room_len, options["whole_len"])
        display.start(0, len(places) * len(arms), "prompt")
        try:
            result = run_arms(
                setup,
                packages,
                places,
                arms,
                writes=facts["verb"] == "completion",
                earlier=earlier,
                on_place=show_place,
                save=save,
            )
        finally:
            display.stop()
    result = {**head, **result}
    print_result(result)
    write_result(json_file, result)
    if result["interrupted"]:
        say("interrupted; the tables show what was asked until then; --resume goes on")
        raise typer.Exit(INTERRUPTED_STATUS)
