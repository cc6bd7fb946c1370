"""All arms at all places, one arm after another, and a report of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from memorizing.benchmark.memory_use.arms import ARMS
from memorizing.benchmark.memory_use.asking import NUM_TIMED, PIECE, Asked, ask
from memorizing.benchmark.memory_use.places import Package, Place
from memorizing.benchmark.memory_use.readers import Setup
from memorizing.benchmark.memory_use.summary import measure_call, measure_quote, summarize
from memorizing.benchmark.preparing import describe_machine
from memorizing.errors import ConfigError, IndexUnavailableError
from memorizing.evaluation.bm25 import import_bm25s
from memorizing.huggingface import add_memory, remove_memory
from memorizing.huggingface.attaching.attachment import unwrap
from memorizing.settings import describe_unknown

KEPT = "-entries"
"""Ends the names of arms that keep entries of all layers."""
OnPlace = Callable[[int, int, str], None]
"""Called before every place: done and all places of all arms, and the label of the arm."""


def choose_arms(wanted: Sequence[str] | None, *, has_embedder: bool) -> tuple[list[str], list[str]]:
    """Names of arms in the order of the tables, and sentences about those that are left out.

    Args:
        wanted: names; None takes all that can be had, but those that keep entries of all layers:
            these are read anew, and may fill a disk.
        has_embedder: whether an embedder is given.

    Raises:
        ConfigError: an unknown name, or an embedder is wanted and none given.
        IndexUnavailableError: BM25 is wanted, and bm25s is not installed.
    """
    for name in wanted or ():
        if name not in ARMS:
            raise ConfigError(describe_unknown("arm", name, list(ARMS)))
    usual = [name for name in ARMS if not name.endswith(KEPT)]
    names, notes = [name for name in ARMS if name in (usual if wanted is None else wanted)], []
    if not has_embedder and any(name.startswith("embedder") for name in names):
        if wanted is not None:
            raise ConfigError("the arm embedder needs an encoder; add --embedder FOLDER_OR_NAME")
        names = [name for name in names if not name.startswith("embedder")]
        notes.append("an embedder is left out: none was given with --embedder")
    if any(name.startswith("bm25") for name in names):
        try:
            import_bm25s()
        except IndexUnavailableError as error:
            if wanted is not None:
                raise
            names = [name for name in names if not name.startswith("bm25")]
            notes.append(f"BM25 is left out: {error}")
    return names, notes


def check_kept(setup: Setup, names: Sequence[str]) -> None:
    """Refuse arms that keep entries where the model cannot.

    Args:
        setup: of the model.
        names: of arms.

    Raises:
        ConfigError: with the reason.
    """
    kept = [name for name in names if name.endswith(KEPT)]
    if not kept:
        return
    try:
        add_memory(setup.model, **{**setup.given, "read": "passages", "keep": "entries"})
    except ConfigError as error:
        raise ConfigError(f"the arm {kept[0]} cannot be had: {error}") from error
    remove_memory(setup.model)


def limit_whole(model: Any, places: Sequence[Place], room_len: int, most: int) -> int:
    """Tokens of whole files that the model can read before any prompt, at most `most`.

    Args:
        model: its positions count.
        places: all prompts and answers.
        room_len: tokens of passages and their start token.
        most: what is wanted.

    Raises:
        ConfigError: not even passages fit.
    """
    positions = getattr(unwrap(model).config, "max_position_embeddings", None)
    # A start token, and what is written after an answer.
    longest = 1 + max(len(one.prompt) + 2 * max(PIECE, len(one.answer)) for one in places)
    if positions is None:
        return most
    if positions < longest + room_len:
        raise ConfigError(
            f"passages of {room_len} tokens, a prompt and what is written after it are up to "
            f"{longest + room_len} tokens, and the model reads {positions}; ask for shorter "
            "prompts and answers, or set num_passages or passage_len lower"
        )
    return min(most, positions - longest)


def run_arms(
    setup: Setup,
    packages: Sequence[Package],
    places: Sequence[Place],
    names: Sequence[str],
    *,
    writes: bool,
    num_written: int = 0,
    on_place: OnPlace = lambda done, total, label: None,
) -> dict[str, Any]:
    """Ask at all places in every arm. An interrupt ends it with what is there.

    Args:
        setup: what arms have in common.
        packages: read into a memory each.
        places: in the order of the packages.
        names: of arms.
        writes: the answers are calls, which are also written freely.
        num_written: of quotes, so many are also written freely, the first ones.
        on_place: called before every place.

    Returns:
        `arms`, a row for each as `summarize` has them; `places`, with what came of each in every
        arm; `interrupted`; and the set-up.
    """
    asked: dict[str, list[Asked]] = {}
    num_bytes: dict[str, int] = {}
    tokenizer = setup.tokenizer
    is_interrupted, total = False, len(places) * len(names)
    try:
        for name in names:
            asked[name], num_bytes[name] = [], 0
            for package in packages:
                numbers = [n for n, place in enumerate(places) if place.package == package.name]
                if not numbers:
                    continue
                with ARMS[name].open(setup, package) as reader:
                    num_bytes[name] += reader.num_bytes
                    for number in numbers:
                        on_place(sum(map(len, asked.values())), total, ARMS[name].label.strip())
                        place = places[number]
                        reader.leave_out(place.document if place.left_out else None)
                        found = ask(
                            reader,
                            number,
                            place,
                            is_timed=len(asked[name]) < NUM_TIMED,
                            is_ranked=not writes,
                            tokenizer=tokenizer if writes or number < num_written else None,
                            is_call=writes,
                        )
                        asked[name].append(found)
    except KeyboardInterrupt:
        is_interrupted = True
    groups = [place.document if len(packages) == 1 else place.package for place in places]
    answers = [tokenizer.decode(list(place.answer)) for place in places]
    ratios = {
        name: [
            measure_call(one, answers[one.place]) if writes else measure_quote(one) for one in found
        ]
        for name, found in asked.items()
    }
    return {
        "model": str(unwrap(setup.model).config._name_or_path),
        "packages": [
            {
                "name": package.name,
                "documents": len(package.documents),
                "tokens": package.num_tokens,
                "bytes": sum(len(one.text.encode()) for one in package.documents),
            }
            for package in packages
        ],
        "memory": {**setup.settings.to_dict(), "heads": setup.given.get("heads")},
        "query_len": setup.query_len,
        "whole_len": setup.whole_len,
        "num_places": len(places),
        "drawn": "packages" if len(packages) > 1 else "files",
        "num_drawn": len(set(groups)),
        "arms": summarize(asked, ratios, groups, num_bytes),
        "places": [
            {
                "package": place.package,
                "document": place.document,
                "prompt": tokenizer.decode(list(place.prompt)),
                "answer": answer,
                "arms": {
                    name: one.to_dict()
                    for name, found in asked.items()
                    for one in found
                    if one.place == number
                },
            }
            for number, (place, answer) in enumerate(zip(places, answers, strict=True))
        ],
        "interrupted": is_interrupted,
        **describe_machine(),
    }
