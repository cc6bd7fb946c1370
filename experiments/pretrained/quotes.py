"""What a model says of functions whose files it has read, with passages and without: a page.

    python experiments/pretrained/convert.py
    python experiments/pretrained/quotes.py     # writes docs/quotes.md

The prompts are drawn with a seed from all functions of the folder whose `def` fits on a line that
stands there once, and that have a docstring: this line, and the quotes that open the docstring. The
answer is its first line, greedy. The text that was read is newer than the model.
"""

from __future__ import annotations

import argparse
import ast
import random
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import run_command
from smollm import FOLDER

from memorizing import DataConfig, add_memory, load_corpus, open_memory
from memorizing.benchmark.preparing import describe_machine
from memorizing.cli.generate import encode
from memorizing.cli.options import parse_heads
from memorizing.huggingface.loading import load_pretrained
from memorizing.huggingface.sessions.sources import Source
from memorizing.storage.files import write_output

MOST_TOKENS = 40
"""Of an answer, whose line is rarely as long."""


@dataclass(frozen=True)
class Question:
    """A function, and what its docstring says first."""

    document: str
    line: int
    """Of the `def`."""
    prompt: str
    answer: str


@dataclass(frozen=True)
class Quote:
    """What a model made of a question."""

    question: Question
    found: str
    sources: Sequence[Source]
    alone: str

    @property
    def has_place(self) -> bool:
        """Whether the lines that were asked for were in sight from the start."""
        return any(self._is_place(source) for source in self.sources)

    @property
    def is_first(self) -> bool:
        """Whether the best passage had them."""
        return self._is_place(self.sources[0]) if self.sources else False

    def _is_place(self, source: Source) -> bool:
        first, last = source.first_line or 0, source.last_line or 0
        asked = self.question
        return source.document == asked.document and first <= asked.line + 1 <= last


def main() -> int:
    """Ask, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(FOLDER))
    parser.add_argument("--heads", action="append", help="that find, LAYER:HEAD,...")
    parser.add_argument("--folder", default="src/memorizing", help="what is read")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/quotes.md"))
    return run_command(ask, parser.parse_args())


def ask(options: argparse.Namespace) -> None:
    """Read the folder, ask all questions, write the page.

    Raises:
        MemorizingError: no model, no folder, or one without such functions.
    """
    model, tokenizer = load_pretrained(options.model)
    corpus = load_corpus(DataConfig(corpus=f"files:{options.folder}"))
    texts = {document.name: document.text for document in corpus.documents()}
    questions = draw_questions(texts, options.questions, options.seed)
    heads = parse_heads(options.heads or ["18:6,7"]) or {}
    add_memory(model, layers=sorted(heads), heads=heads, read="passages")
    quotes = []
    with tempfile.TemporaryDirectory() as place:
        memory = open_memory(model, Path(place) / "memory", tokenizer=tokenizer)
        report = memory.read(tokenizer, texts)
        for question in questions:
            alone = answer(model, tokenizer, question)
            with memory, memory.record() as sources:
                found = answer(model, tokenizer, question)
            quotes.append(Quote(question, found, sources.passages, alone))
            print(f"{question.document}:{question.line} {found!r}", flush=True)
    what = f"{report.num_documents:,} files of `{options.folder}`, {report.num_tokens:,} tokens"
    write_output(options.out, make_page(quotes, what, options).encode())
    print(f"written: {options.out}")


def draw_questions(texts: dict[str, str], count: int, seed: int) -> list[Question]:
    """Functions of these files, drawn without replacement."""
    lines = Counter(line for text in texts.values() for line in text.splitlines())
    found = []
    for name, text in texts.items():
        numbered = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
                continue
            line = numbered[node.lineno - 1]
            first = numbered[node.body[0].lineno - 1]
            indent, quotes, said = first.partition('"""')
            is_short = node.body[0].lineno == node.lineno + 1
            if is_short and quotes and lines[line] == 1:
                prompt = f"{line}\n{indent}{quotes}"
                found.append(Question(name, node.lineno, prompt, said.partition('"""')[0]))
    return random.Random(seed).sample(found, min(count, len(found)))


def answer(model: Any, tokenizer: Any, question: Question) -> str:
    """The model's own continuation of a prompt, to the end of its line or docstring."""
    inputs = encode(tokenizer, question.prompt, chat=False)
    words = {"max_new_tokens": MOST_TOKENS, "do_sample": False}
    tokens = model.generate(**inputs, **words, pad_token_id=tokenizer.pad_token_id)
    said = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    return said.partition("\n")[0].partition('"""')[0]


def make_page(quotes: Sequence[Quote], what: str, options: argparse.Namespace) -> str:
    """Markdown: what was done, how often it was right, and every question."""
    command = shlex.join(["python", "experiments/pretrained/quotes.py", *sys.argv[1:]])
    count, machine = len(quotes), describe_machine()
    right, alone = (
        sum(said == one.question.answer for one, said in pairs)
        for pairs in ([(q, q.found) for q in quotes], [(q, q.alone) for q in quotes])
    )
    parts = [
        "# What a model quotes of what it has read",
        "",
        f"`{command}`, seed {options.seed}; {machine['processor']}, fp32.",
        "",
        f"SmolLM2-135M-Instruct, nothing trained, has read {what}, all newer than the model. Asked "
        f"for the first line of the docstring of {count} functions, drawn with a seed, given the "
        f"line of the `def` alone, it says exactly what stands there {right} times with passages "
        f"and {alone} times without; the place itself was the best passage "
        f"{sum(one.is_first for one in quotes)} times, and among those in sight "
        f"{sum(one.has_place for one in quotes)} times. Every question that was drawn is here, in "
        "the order of the draw.",
    ]
    for number, one in enumerate(quotes, 1):
        asked = one.question
        parts += [
            "",
            f"## {number}. {asked.document}, line {asked.line}",
            "",
            "```python",
            asked.prompt,
            "```",
            "",
            "| | |",
            "| --- | --- |",
            f"| stands there | {escape(asked.answer)} |",
            f"| with passages | {escape(one.found)} |",
            f"| without | {escape(one.alone)} |",
            f"| in sight | {'; '.join(map(name_source, one.sources))} |",
        ]
    return "\n".join(parts) + "\n"


def name_source(source: Source) -> str:
    """Document, lines and weight."""
    if source.document is None:
        return f"the text itself ({source.weight:.0%})"
    lines = f"{source.first_line}-{source.last_line}"
    return f"{source.document}:{lines} ({source.weight:.0%})"


def escape(text: str) -> str:
    """As code in a cell of a table."""
    quotes = "``" if "`" in text else "`"
    inner = f" {text} " if "`" in text else text
    return f"{quotes}{inner}{quotes}".replace("|", "\\|") if text else "(nothing)"


if __name__ == "__main__":
    sys.exit(main())
