"""Completing calls: the places, and how right an answer is."""

from __future__ import annotations

import keyword
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from memorizing.benchmark.memory_use.call_sites import CallSite, find_calls
from memorizing.benchmark.memory_use.places import Package, Place, Source
from memorizing.errors import ConfigError, CorpusError
from memorizing.huggingface.sessions.texts import encode_text

MAX_ANSWER_LEN = 64
"""Tokens of the arguments of a call; longer ones are not asked for."""
MIN_PROMPT_LEN = 16
_NAME = re.compile(r"[^\W\d]\w*")


def draw_calls(
    packages: Sequence[Package], num_places: int, tokenizer: Any, *, prompt_len: int, seed: int
) -> list[Place]:
    """Calls spread evenly over packages, drawn in each; the file of a call is left out of memory.

    Args:
        packages: of Python files.
        num_places: of all packages together.
        tokenizer: of the model.
        prompt_len: most tokens of the file before the call.
        seed: of the drawing.

    Raises:
        ConfigError: a number below 1.
        CorpusError: no package has a call that can be asked for.
    """
    for name, value, least in (("places", num_places, 1), ("prompt_len", prompt_len, 16)):
        if value < least:
            raise ConfigError(f"{name} is {value}; allowed: {least} or more")
    sites = {
        package.name: find_calls({one.name: one.text for one in package.documents}, package.name)
        for package in packages
    }
    chosen = [package for package in packages if sites[package.name]]
    places = []
    for number, package in enumerate(chosen):
        count = num_places // len(chosen) + (number < num_places % len(chosen))
        order = sites[package.name]
        random.Random(f"{seed} {package.name}").shuffle(order)
        drawn: list[Place] = []
        for site in order:
            if len(drawn) >= count:
                break
            place = _make_place(package, site, tokenizer, prompt_len)
            drawn += [] if place is None else [place]
        places += sorted(drawn, key=lambda place: place.document)
    if not places:
        raise CorpusError(
            "no call was found of what another file of the same folder defines, with arguments of "
            f"at most {MAX_ANSWER_LEN} tokens; name folders of Python files that import one another"
        )
    return places


def _make_place(package: Package, site: CallSite, tokenizer: Any, prompt_len: int) -> Place | None:
    text = package.find(site.file).text
    answer = tuple(encode_text(tokenizer, text[site.start : site.end]).tolist())
    prompt = tuple(encode_text(tokenizer, text[: site.start]).tolist()[-prompt_len:])
    if len(answer) > MAX_ANSWER_LEN or len(prompt) < MIN_PROMPT_LEN:
        return None
    sources: dict[str, Source] = {}
    for definition in site.definitions:
        document = package.find(definition.file)
        # Which token it is need not be exact: whole files are cut around it.
        token = len(document.tokens) * definition.character // max(1, len(document.text))
        sources.setdefault(definition.file, Source(definition.file, token))
    return Place(package.name, site.file, prompt, answer, tuple(sources.values()), left_out=True)


def is_exact(written: str, answer: str) -> bool:
    """Whether two texts are the same but for white space."""
    return _squeeze(written) == _squeeze(answer)


def measure_similarity(written: str, answer: str) -> float:
    """1 - d / n: d letters to insert, delete or replace (Levenshtein 1966), n of the longer text.

    White space is left out of both.
    """
    one, other = _squeeze(written), _squeeze(answer)
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            before, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, before + (letter != wanted)),
            )
    return 1 - row[-1] / max(1, len(one), len(other))


def count_names(written: str, answer: str) -> tuple[int, int]:
    """How many of the answer's names, each as often as it is there, are written; and how many."""
    wanted, there = (Counter(_list_names(text)) for text in (answer, written))
    return (wanted & there).total(), wanted.total()


def _list_names(text: str) -> list[str]:
    return [name for name in _NAME.findall(text) if not keyword.iskeyword(name)]


def _squeeze(text: str) -> str:
    return "".join(text.split())
