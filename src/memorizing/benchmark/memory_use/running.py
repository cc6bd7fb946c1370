"""All arms at all places, one arm after another, and a report of what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, get_args, get_origin

from memorizing.benchmark.memory_use.arms import ARMS
from memorizing.benchmark.memory_use.asking import NUM_TIMED, PIECE, Asked, ask
from memorizing.benchmark.memory_use.places import Package, Place
from memorizing.benchmark.memory_use.readers import Setup
from memorizing.benchmark.memory_use.retrievers import Found
from memorizing.benchmark.memory_use.summary import measure_call, measure_quote, summarize
from memorizing.benchmark.preparing import describe_machine
from memorizing.errors import ConfigError, IndexUnavailableError
from memorizing.evaluation.bm25 import import_bm25s
from memorizing.huggingface import add_memory, remove_memory
from memorizing.huggingface.attaching.attachment import unwrap
from memorizing.settings import describe_unknown, read_hints
from memorizing.storage.files import encode_json, parse_json

KEPT = "-entries"
"""Ends the names of arms that keep entries of all layers."""
OnPlace = Callable[[int, int, str], None]
"""Called before every place: done and all places of all arms, and the label of the arm."""
Save = Callable[[dict[str, Any]], None]
"""Called now and then with what is there until then."""
_SAVE_S = 60


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
    earlier: Mapping[str, Any] | None = None,
    on_place: OnPlace = lambda done, total, label: None,
    save: Save = lambda report: None,
) -> dict[str, Any]:
    """Ask at all places in every arm. An interrupt ends it with what is there.

    Args:
        setup: what arms have in common.
        packages: read into a memory each.
        places: in the order of the packages.
        names: of arms.
        writes: the answers are calls, which are also written freely.
        num_written: of quotes, so many are also written freely, the first ones.
        earlier: what this returned, or saved, before: nothing of it is asked again, and its other
            arms are reported too.
        on_place: called before every place.
        save: called with what is returned, as if it had been interrupted, at most once a minute.

    Returns:
        `arms`, a row for each as `summarize` has them; `places`, with what came of each in every
        arm; `interrupted`; and the set-up.

    Raises:
        ConfigError: what is there already is of other places, or is damaged.
    """
    tokenizer, about = setup.tokenizer, describe_places(setup, packages, places)
    asked, stored = ({}, {}) if earlier is None else restore_asked(earlier, about)
    total, saved_s = len(places) * len(names), time.monotonic()

    def report(*, is_interrupted: bool) -> dict[str, Any]:
        found = {name: asked[name] for name in ARMS if name in asked}
        return _report(about, packages, places, found, stored, writes, is_interrupted)

    is_interrupted = False
    try:
        for name in names:
            known = asked.setdefault(name, [])
            of_arm = stored.setdefault(name, {})
            for package in packages:
                there = {one.place for one in known}
                numbers = [
                    number
                    for number, place in enumerate(places)
                    if place.package == package.name and number not in there
                ]
                if not numbers:
                    continue
                with ARMS[name].open(setup, package) as reader:
                    of_arm[package.name] = reader.num_bytes
                    for number in numbers:
                        done = sum(len(asked.get(one, ())) for one in names)
                        on_place(done, total, ARMS[name].label.strip())
                        place = places[number]
                        reader.leave_out(place.document if place.left_out else None)
                        found = ask(
                            reader,
                            number,
                            place,
                            is_timed=len(known) < NUM_TIMED,
                            is_ranked=not writes,
                            tokenizer=tokenizer if writes or number < num_written else None,
                            is_call=writes,
                        )
                        known.append(found)
                        if time.monotonic() - saved_s > _SAVE_S:
                            save(report(is_interrupted=True))
                            saved_s = time.monotonic()
    except KeyboardInterrupt:
        is_interrupted = True
    return report(is_interrupted=is_interrupted)


def describe_places(
    setup: Setup, packages: Sequence[Package], places: Sequence[Place]
) -> dict[str, Any]:
    """What is asked, of which model: the set-up of a report, and its `places` without answers."""
    decode = setup.tokenizer.decode
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
        "num_drawn": len(set(_name_groups(packages, places))),
        "places": [
            {
                "package": one.package,
                "document": one.document,
                "prompt": decode(list(one.prompt)),
                "answer": decode(list(one.answer)),
            }
            for one in places
        ],
    }


def _name_groups(packages: Sequence[Package], places: Sequence[Place]) -> list[str]:
    """What intervals draw again: the package of every place, or of one package the file."""
    return [place.document if len(packages) == 1 else place.package for place in places]


def _report(
    about: Mapping[str, Any],
    packages: Sequence[Package],
    places: Sequence[Place],
    asked: Mapping[str, Sequence[Asked]],
    stored: Mapping[str, Mapping[str, int]],
    writes: bool,
    is_interrupted: bool,
) -> dict[str, Any]:
    groups, described = _name_groups(packages, places), about["places"]
    ratios = {
        name: [
            measure_call(one, described[one.place]["answer"]) if writes else measure_quote(one)
            for one in found
        ]
        for name, found in asked.items()
    }
    num_bytes = {name: sum(of_arm.values()) for name, of_arm in stored.items()}
    by_place: list[dict[str, Any]] = [{} for _ in places]
    for name, found in asked.items():
        for one in found:
            by_place[one.place][name] = one.to_dict()
    return {
        **about,
        "arms": summarize(asked, ratios, groups, num_bytes),
        "stored": {name: dict(of_arm) for name, of_arm in stored.items()},
        "places": [{**one, "arms": arms} for one, arms in zip(described, by_place, strict=True)],
        "interrupted": is_interrupted,
        **describe_machine(),
    }


def restore_asked(
    earlier: Mapping[str, Any], about: Mapping[str, Any]
) -> tuple[dict[str, list[Asked]], dict[str, dict[str, int]]]:
    """What came of places, per arm, and the bytes that each arm stores of each package.

    Args:
        earlier: a report, which somebody else may have written.
        about: of what is asked now.

    Raises:
        ConfigError: it is a report on something else, or is damaged.
    """
    now = parse_json(encode_json(about))
    check_facts(earlier, {key: value for key, value in now.items() if key != "places"})
    asked: dict[str, list[Asked]] = {name: [] for name in ARMS}
    try:
        for number, was in enumerate(earlier["places"]):
            place = now["places"][number]
            if {key: was[key] for key in place} != place:
                raise ConfigError(
                    f"place {number} was in {was['document']!r}, and is another one now; the files "
                    "have changed: begin anew without --resume"
                )
            for name, values in was["arms"].items():
                asked[name].append(_restore(values, number))
        stored = {
            name: {package: _check(int, size) for package, size in earlier["stored"][name].items()}
            for name, found in asked.items()
            if found
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ConfigError(
            f"what was asked before is damaged ({error!r}); begin anew without --resume"
        ) from error
    return asked, stored


def check_facts(earlier: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse to go on with what was asked in another way.

    Raises:
        ConfigError: the first fact that is another one.
    """
    for key, value in facts.items():
        if earlier.get(key) != value:
            raise ConfigError(
                f"{key} was {earlier.get(key)!r}, and is {value!r} now; go on with what it was, or "
                "begin anew without --resume"
            )


def _restore(values: Mapping[str, Any], place: int) -> Asked:
    """What `Asked.to_dict` gave.

    Raises:
        TypeError: it is something else.
    """
    found = tuple(Found(**_check_fields(Found, one)) for one in values["found"])
    return Asked(**{**_check_fields(Asked, {**values, "found": found}), "place": place})


def _check_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    hints = read_hints(cls)
    return {key: _check(hints[key], value) for key, value in values.items()}


def _check(hint: Any, value: Any) -> Any:
    """A value of one of the types.

    Raises:
        TypeError: it is of none of them.
    """
    allowed = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        raise TypeError(f"{value!r} is no {hint}")
    return value
