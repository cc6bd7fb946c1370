"""The demo for people who have a model: it reads the source of this package, and is asked for it.

The same prompts are gone on from with a memory of what was read, without it, and with passages that
BM25 finds pasted before the prompt, by the code of `memorizing benchmark recall` and `completion`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from memorizing.benchmark.memory_use.completion import draw_calls
from memorizing.benchmark.memory_use.places import Package, draw_quotes, encode_package
from memorizing.benchmark.memory_use.readers import Setup
from memorizing.benchmark.memory_use.running import choose_arms, limit_whole, run_arms
from memorizing.data.text import shuffle_names
from memorizing.demo import pretrained_story as story
from memorizing.demo.run import check_folder, clear_folder
from memorizing.errors import ConfigError
from memorizing.huggingface import add_memory, open_memory, remove_memory
from memorizing.storage.files import write_json
from memorizing.terminal import make_console, make_display, show_progress

SOURCE = Path(__file__).parents[1]
"""Of this package, as it is installed."""
MEMORY = "source.memory"
"""In the folder of the demo."""
PACKAGE = "memorizing"
ARMS = ("nothing", "passages", "bm25")
_NUM_SHOWN = 3
PROMPT_LEN, ANSWER_LEN = 48, 16
CALL_PROMPT_LEN = 128


def run_pretrained_demo(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    is_older: bool = False,
    seed: int = 0,
    run_dir: Path | str = Path("runs/demo-pretrained"),
    source: Path = SOURCE,
    num_tokens: int = 20_000,
    num_quotes: int = 10,
    num_calls: int = 4,
    num_shown: int | None = None,
    settings: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Show what a model quotes and completes of files it has read once. Nothing is trained.

    Args:
        model: of `transformers`, without a memory. As it was afterwards.
        tokenizer: of the model.
        name: folder of the model, or its name on the hub.
        is_older: than the files, which it cannot know by heart.
        seed: of the files that are read, of the prompts and the calls.
        run_dir: replaced if an earlier demo made it; keeps the memory.
        source: folder of Python files.
        num_tokens: of files that are read, at least.
        num_quotes: prompts whose next 16 tokens are asked for.
        num_calls: calls to complete, each of a file that is left out of the memory then.
        num_shown: prompts that are shown whole, the first ones; None is 3. Of the calls one.
        settings: of the memory besides, as `add_memory` takes them.
        console: where the story is told; by default standard output.

    Returns:
        What `result.json` holds: `quotes` and `calls`, each as `run_arms` gives it; `memory`, its
        folder; `source`, what was read; `seconds` of the parts; `interrupted`.

    Raises:
        RunFolderError: the folder holds something else than a demo.
        ConfigError: the model cannot read passages.
    """
    run_dir, console = Path(run_dir), console or make_console()
    check_folder(run_dir)
    num_weights = sum(weight.numel() for weight in model.parameters())
    console.print(story.introduce(name, num_weights, is_older=is_older))
    package, rest = draw_files(tokenizer, source, num_tokens, seed)
    given, memory = dict(settings or {}), run_dir / MEMORY
    try:
        setup = Setup(model, tokenizer, run_dir, given, memories={PACKAGE: memory})
        quotes = draw_quotes(
            package, num_quotes, prompt_len=PROMPT_LEN, answer_len=ANSWER_LEN, seed=seed
        )
        calls = draw_calls([package], num_calls, tokenizer, prompt_len=CALL_PROMPT_LEN, seed=seed)
        limit_whole(model, [*quotes, *calls], setup.settings.room_len, setup.whole_len)
    except ConfigError as error:
        raise ConfigError(
            f"{name} cannot be shown with passages as they are by default: {error}. Give another "
            f"model, or try other settings: memorizing benchmark recall {name} FILES --window N "
            "--set segment_len=N --set num_passages=N"
        ) from error
    names, notes = choose_arms(None, has_embedder=False)
    names = [arm for arm in names if arm in ARMS]

    clear_folder(run_dir)
    seconds = {"reading": read_files(setup, package, memory)}
    result: dict[str, Any] = {
        "model": name,
        "memory": str(memory),
        "source": {
            "folder": str(source),
            "documents": len(package.documents),
            "of_documents": len(rest) + len(package.documents),
            "tokens": package.num_tokens,
            "tokens_left": sum(len(one.tokens) for one in rest),
        },
        "seed": seed,
        "seconds": seconds,
        "interrupted": False,
    }
    console.print(story.tell_reading(result, memory))
    for part, places in (("quotes", quotes), ("calls", calls)):
        start = time.perf_counter()
        most = _NUM_SHOWN if num_shown is None else num_shown
        shown = min(most, len(places)) if part == "quotes" else 1
        with show_progress(f"{part}: prompts") as progress:
            found = run_arms(
                setup,
                [package],
                places,
                names,
                writes=part == "calls",
                num_written=shown,
                on_place=lambda done, total, _, progress=progress: progress(done, total),
            )
        seconds[part] = time.perf_counter() - start
        result |= {part: found, "interrupted": found["interrupted"]}
        told = story.tell_part(part, found, places, package, tokenizer, shown)
        console.print(told, highlight=False)
        if found["interrupted"]:
            console.print("Stopped: the tables show what was asked until then.")
            break
    else:
        missing = [note for note in notes if "BM25" in note]
        console.print(story.conclude(result, missing, is_older=is_older))
        for number, block in enumerate(story.point_to(result, package)):
            console.print(block, soft_wrap=bool(number % 2))
    write_json(run_dir / "result.json", result)
    return result


def draw_files(
    tokenizer: Any, source: Path, num_tokens: int, seed: int
) -> tuple[Package, list[Any]]:
    """Files in the order of the draw: those that are read, and the others."""
    texts = {
        path.relative_to(source).as_posix(): path.read_text(encoding="utf-8")
        for path in source.rglob("*.py")
    }
    drawn = [(name, texts[name]) for name in shuffle_names(texts, seed)]
    documents = encode_package(tokenizer, PACKAGE, drawn).documents
    count, total = 0, 0
    while count < len(documents) and total < num_tokens:
        total += len(documents[count].tokens)
        count += 1
    return Package(PACKAGE, documents[:count]), list(documents[count:])


def read_files(setup: Setup, package: Package, memory: Path) -> float:
    """Read a package into a new memory, and say how many seconds it took."""
    add_memory(setup.model, **setup.given, read="passages")
    texts = {document.name: document.text for document in package.documents}
    display, num_read = make_display(is_patient=True, is_transient=True), 0

    def count(name: str, num_tokens: int) -> None:
        nonlocal num_read
        num_read += num_tokens
        display.update(num_read, {"reading": name[-40:]})

    start = time.perf_counter()
    display.start(0, package.num_tokens, "tokens")
    try:
        session = open_memory(setup.model, memory, tokenizer=setup.tokenizer)
        session.read(setup.tokenizer, texts, progress=count)
    finally:
        display.stop()
        remove_memory(setup.model)
    return time.perf_counter() - start
