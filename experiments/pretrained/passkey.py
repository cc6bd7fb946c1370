"""Passkey documents: a five-digit number hidden in text, and asked for at the end.

    python experiments/pretrained/passkey.py --tokens 2048      # shows one

After Mohtashami & Jaggi (Landmark Attention, 2023), with two differences: the filler is not one
repeated sentence but thousands of different ones, real sentences from the docstrings of Python's
standard library, and every sample has its own seed for key, filler and order. Sentences for
training and for tests are not the same ones. They are those of the Python that runs: its version
belongs to a result.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memorizing.errors import ConfigError
from memorizing.huggingface.sessions.texts import encode_text

INTRODUCTION = (
    "There is an important piece of information hidden inside a lot of irrelevant text. "
    "Find it and memorize it. You will be asked about it.\n\n"
)
KEY_SENTENCE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\n\nWhat is the pass key? The pass key is"
KEY_DIGITS = 5
SEPARATOR = " "

Split = Literal["train", "test"]

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s(?=[A-Z\"'(<*`])")
_SENTENCE = re.compile(r"[A-Z].*[a-z)'\"][.!?]")
_NOT_PROSE = re.compile(r">>>|[|{}\\]|--|==|\d{3}|[Pp]ass ?key")
_NUM_WORDS = range(6, 41)


@dataclass(frozen=True)
class PasskeySample:
    """A document and the key that is hidden in it."""

    tokens: list[int]
    """The document up to the end of the question, without a start token."""
    answer: list[int]
    """What follows: the key and a full stop."""
    key: str
    depth: float
    """Where the key stands in the filler, at the nearest end of a sentence: 0 is its beginning."""
    key_position: int
    """Index in `tokens` at which the sentence with the key begins."""
    seed: str

    def is_right(self, said: str) -> bool:
        """Whether a continuation begins with the key and not with a longer number."""
        return re.match(rf"\s*{self.key}(?!\d)", said) is not None


@cache
def load_sentences(split: Split, root: Path | None = None) -> tuple[str, ...]:
    """Different sentences of docstrings, in an order of their own; takes some seconds.

    They are those of the Python files under `root`, by default of the standard library. Half of
    them, by a hash of each, are for training. None has three digits in a row, so that no
    number but the key could be meant. The standard library's have some 95,000
    tokens in each half.
    """
    found: set[str] = set()
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            found.update(find_sentences(path.read_bytes()))
    marked = sorted((hashlib.sha256(s.encode()).digest(), s) for s in found)
    odd = split == "test"
    return tuple(sentence for digest, sentence in marked if digest[-1] % 2 == odd)


def find_sentences(source: bytes) -> Iterator[str]:
    """Whole sentences of the docstrings in Python source; none where it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            for paragraph in re.split(r"\n\s*\n", docstring):
                yield from filter(is_prose, _SENTENCE_END.split(" ".join(paragraph.split())))


def is_prose(sentence: str) -> bool:
    """Whether this is a plain sentence, neither very short nor very long."""
    return (
        sentence.isascii()
        and len(sentence.split()) in _NUM_WORDS
        and _SENTENCE.fullmatch(sentence) is not None
        and _NOT_PROSE.search(sentence) is None
    )


def make_sample(
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    depth: float,
    seed: str,
    split: Split = "test",
    *,
    sentences: Sequence[str] = (),
) -> PasskeySample:
    """One document of exactly `num_tokens` tokens; the same for the same arguments.

    Args:
        tokenizer: any.
        num_tokens: from the introduction to the end of the question.
        depth: share of the filler that stands before the key, 0 to 1.
        seed: of key and filler.
        split: whose sentences are drawn.
        sentences: draw from these instead.

    Raises:
        ConfigError: too few tokens for a question, or no depth.
    """
    if not 0 <= depth <= 1:
        raise ConfigError(f"depth is {depth}; give a share from 0 to 1")
    rng = random.Random(f"passkey/{split}/{seed}")
    key = "".join(rng.choices("0123456789", k=KEY_DIGITS))
    parts = [encode(tokenizer, INTRODUCTION)]
    parts.append(encode(tokenizer, f"{SEPARATOR}{KEY_SENTENCE.format(key=key)}"))
    parts.append(encode(tokenizer, QUESTION))
    num_filler = num_tokens - sum(map(len, parts))
    if num_filler < 0:
        raise ConfigError(
            f"num_tokens is {num_tokens}; introduction, key and question alone have "
            f"{num_tokens - num_filler}"
        )
    filler = draw_filler(tokenizer, sentences or load_sentences(split), num_filler, rng)
    starts = [0, *itertools.accumulate(map(len, filler))]
    place = min(range(len(starts)), key=lambda i: abs(starts[i] - depth * num_filler))
    before, after = itertools.chain(*filler[:place]), itertools.chain(*filler[place:])
    tokens = [*parts[0], *before, *parts[1], *after, *parts[2]]
    return PasskeySample(
        tokens, encode(tokenizer, f" {key}."), key, depth, len(parts[0]) + starts[place], seed
    )


def draw_filler(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    num_tokens: int,
    rng: random.Random,
) -> list[list[int]]:
    """Tokens of sentences in random order, the last one cut so that all are `num_tokens`.

    No sentence comes twice before each has come once.
    """
    drawn: list[list[int]] = []
    num_left = num_tokens
    while num_left > 0:
        order = rng.sample(sentences, len(sentences))
        step = 1 + num_left // 8  # most sentences have more than 8 tokens
        for start in range(0, len(order), step):
            texts = [SEPARATOR + sentence for sentence in order[start : start + step]]
            for tokens in (encode(tokenizer, text) for text in texts):
                drawn.append(tokens[:num_left])
                num_left -= len(drawn[-1])
                if num_left == 0:
                    return drawn
    return drawn


def make_grid(
    tokenizer: PreTrainedTokenizerBase,
    lens: Sequence[int],
    depths: Sequence[float],
    num_samples: int,
    split: Split = "test",
    *,
    sentences: Sequence[str] = (),
) -> Iterator[PasskeySample]:
    """`num_samples` documents of every length at every depth, each with a seed of its own.

    Depths take turns, so that the first documents of a length say something about all of them.
    """
    sentences = sentences or load_sentences(split)
    for num_tokens in lens:
        for i in range(num_samples):
            for depth in depths:
                seed = f"{num_tokens}/{depth}/{i}"
                yield make_sample(tokenizer, num_tokens, depth, seed, split, sentences=sentences)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return encode_text(tokenizer, text).tolist()


def main() -> None:
    """Show a sample."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--depth", type=float, default=0.5)
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    sample = make_sample(tokenizer, options.tokens, options.depth, options.seed)
    print(tokenizer.decode([*sample.tokens, *sample.answer]))


if __name__ == "__main__":
    main()
