"""Needles, a passkey and quotes that SmolLM2 finds among a million tokens it has read, untrained.

    python experiments/pretrained/convert.py
    python experiments/corpora/build.py code
    python experiments/pretrained/needles.py        # goes on where it stopped

**What is read**, once, kept as text: files of the training packages of `documents.py`, each cut at
4,096 tokens, in a drawn order, as many as make a million tokens; and the files of `--quotes`, newer
than the model. Fifty of the files have a line more, at a depth that is drawn: `The special magic
number for slow-tortoise is 4821970.`, with ten adjectives and ten nouns, so that every word of a
name stands in other needles too; one has `The pass key is 48213. Remember it.`

**What is asked.** `needle`: `What is the special magic number for slow-tortoise?`, and the answer
begun. `asked`: in other words, by the model's template of chats. `off`: the first, without memory.
Right is the number and no digit more. `passage_search.py` asks for places of the files of
`--quotes`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import add_precision_option, make_parser, run_command
from documents import NAMES
from smollm import PRECISIONS, describe_precision

from memorizing import DataConfig, MemorySession, add_memory, load_corpus, open_memory
from memorizing.benchmark.preparing import describe_machine
from memorizing.evaluation.answers import compute_wilson_interval
from memorizing.huggingface.loading import load_pretrained
from memorizing.huggingface.sessions.texts import encode_chat, encode_text
from memorizing.storage.files import write_json
from memorizing.storage.folders import count_bytes

RESULTS = Path("experiments/results/pretrained_needles.json")
MEMORY = Path("runs/pretrained/needles.memory")
TOKENS, MOST_OF_FILE, FEWEST_OF_FILE = 1_000_000, 4096, 512
HEADS = {7: [7]}
"""As `calibrate` finds them."""
SEED = 0
ADJECTIVES = [
    "slow",
    "quiet",
    "brave",
    "hollow",
    "golden",
    "bitter",
    "rapid",
    "gentle",
    "crooked",
    "frozen",
]
NOUNS = [
    "tortoise",
    "lantern",
    "harbor",
    "violin",
    "meadow",
    "compass",
    "glacier",
    "pepper",
    "anvil",
    "sparrow",
]
NEEDLES, ANSWER_LEN = 50, 12
NEWER = "newer/"
FORMS = ("needle", "asked", "off")
PASSKEY = "The pass key is {}. Remember it."
NEEDLE = "The special magic number for {} is {}."


@dataclass(frozen=True)
class Question:
    """A number that stands in a file."""

    kind: str
    about: str
    document: str
    number: str


def write_haystack(
    corpora: Path, tokenizer: Any, num_tokens: int
) -> tuple[list[tuple[str, str]], list[Question]]:
    """Files (name, text) with needles in them, and what can be asked of them.

    Raises:
        CorpusError: the corpus is not there.
    """
    texts = sorted(_list_files(corpora))
    generator = random.Random(SEED)
    generator.shuffle(texts)
    files: list[tuple[str, str]] = []
    total = 0
    for name, text in texts:
        if total >= num_tokens:
            break
        ids = encode_text(tokenizer, text)[:MOST_OF_FILE]
        if len(ids) >= FEWEST_OF_FILE:
            files.append((name, tokenizer.decode(ids)))
            total += len(ids)
    names = [f"{one}-{other}" for one, other in itertools.product(ADJECTIVES, NOUNS)]
    questions = []
    places = generator.sample(range(len(files)), NEEDLES + 1)
    for about, place in zip([*generator.sample(names, NEEDLES), None], places, strict=True):
        name, text = files[place]
        if about is None:
            number = str(generator.randrange(10_000, 100_000))
            line, kind = PASSKEY.format(number), "passkey"
        else:
            number = str(generator.randrange(1_000_000, 10_000_000))
            line, kind = NEEDLE.format(about, number), "needle"
        lines = text.splitlines(keepends=True)
        lines.insert(generator.randrange(len(lines)), f"{line}\n")
        files[place] = name, "".join(lines)
        questions.append(Question(kind, about or "", name, number))
    return files, questions


def _list_files(corpora: Path) -> Iterator[tuple[str, str]]:
    for package in NAMES["code"]["train"]:
        corpus = load_corpus(DataConfig(corpus=f"files:{corpora / 'code' / package}"))
        for document in corpus.documents():
            yield f"{package}/{document.name}", document.text


def show(form: str, found: dict[str, Any]) -> None:
    """A line."""
    low, high = found["interval"]
    print(
        f"{form}: {found['right']} of {found['of']} needles ({low:.0%} to {high:.0%}), the passkey "
        f"{'found' if all(found['passkey']) else 'missed'}"
    )


def main() -> int:
    """Read what is not read yet, ask, and write the JSON."""
    parser = make_parser(__doc__)
    add_precision_option(parser)
    parser.add_argument("--quotes", type=Path, help="a folder of files newer than the model")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--memory", type=Path, default=MEMORY)
    parser.add_argument("--json", type=Path, default=RESULTS)
    return run_command(measure, parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Read, ask, write."""
    model, tokenizer = load_pretrained(str(options.model), dtype=PRECISIONS[options.precision])
    files, questions = write_haystack(options.corpora, tokenizer, options.tokens)
    newer: list[tuple[str, str]] = []
    if options.quotes is not None:
        corpus = load_corpus(DataConfig(corpus=f"files:{options.quotes}"))
        newer = [(f"{NEWER}{one.name}", one.text) for one in corpus.documents()]
    add_memory(model, layers=sorted(HEADS), heads=HEADS, read="passages")
    memory = open_memory(model, options.memory, tokenizer=tokenizer)
    start = time.monotonic()
    report = memory.read(tokenizer, [*newer, *files])
    seconds = time.monotonic() - start
    print(
        f"read {report.num_tokens:,} tokens in {seconds:,.0f} s, {len(report.skipped)} were there"
    )
    values: dict[str, Any] = {
        "tokens": sum(one.num_tokens for one in memory.documents),
        "documents": len(memory.documents),
        "bytes": count_bytes(options.memory),
        "heads": HEADS,
        "precision": describe_precision("cpu", options.precision),
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(),
    }
    start = time.monotonic()
    with memory:
        generate(model, tokenizer, encode_text(tokenizer, "What is"), 1)
    values["first_search_s"] = time.monotonic() - start
    for form in FORMS:
        values[form] = ask_all(model, tokenizer, memory, questions, form)
        show(form, values[form])
        write_json(options.json, values)
    print(f"written: {options.json}")


def put_question(question: Question, form: str, tokenizer: Any) -> np.ndarray:
    """The tokens that the model goes on from."""
    if question.kind == "passkey":
        return encode_text(tokenizer, "What is the pass key? The pass key is", is_whole=True)
    if form == "asked":
        said = f"Which number is the magic one of the {question.about}? Say only the number."
        return encode_chat(tokenizer, [{"role": "user", "content": said}])
    about = f"the special magic number for {question.about}"
    said = f"What is {about}? T{about[1:]} is"
    return encode_text(tokenizer, said, is_whole=True)


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, tokens: np.ndarray, count: int) -> str:
    """What greedy decoding writes."""
    ids = torch.from_numpy(tokens).long().unsqueeze(0)
    arguments = {"max_new_tokens": count, "do_sample": False}
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **arguments
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def ask_all(
    model: Any, tokenizer: Any, memory: MemorySession, questions: Sequence[Question], form: str
) -> dict[str, Any]:
    """Every question once: how many answers are right, and each of them."""
    answers = []
    for question in questions:
        tokens = put_question(question, form, tokenizer)
        count = ANSWER_LEN if form != "asked" else 2 * ANSWER_LEN
        start = time.monotonic()
        if form == "off":
            written, places = generate(model, tokenizer, tokens, count), []
        else:
            with memory, memory.record() as sources:
                written = generate(model, tokenizer, tokens, count)
            places = [one.document for one in sources.passages if not one.since]
        found = re.search(r"\d+", written)
        answers.append(
            {
                "about": question.about or question.kind,
                "number": question.number,
                "written": written,
                "is_right": found is not None and found[0] == question.number,
                "rank": places.index(question.document) + 1 if question.document in places else 0,
                "seconds": time.monotonic() - start,
            }
        )
        print(form, answers[-1], flush=True)
    needles = [one["is_right"] for one in answers if one["about"] != "passkey"]
    return {
        "right": sum(needles),
        "of": len(needles),
        "interval": list(compute_wilson_interval(sum(needles), len(needles))),
        "passkey": [one["is_right"] for one in answers if one["about"] == "passkey"],
        "answers": answers,
    }


if __name__ == "__main__":
    sys.exit(main())
