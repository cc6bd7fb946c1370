"""What the demo tells: for someone who has not read the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from memorizing.config import Config
from memorizing.data import TokenizedDocument
from memorizing.demo.probe import Estimate
from memorizing.evaluation import EvaluationResult
from memorizing.metrics import Difference
from memorizing.training import TokenizedCorpus


def introduce(config: Config) -> RenderableType:
    """What is compared with what."""
    model = config.model
    return Group(
        Rule("memorizing: what is a memory worth to a language model?", align="left"),
        Text(
            "A transformer reads a long document segment by segment, and what lies further back "
            "than its context is gone. A Memorizing Transformer also writes what it computed for "
            "every token into a memory, and looks there, for every token it predicts, for the "
            "entries nearest to what it is looking for. Its weights do not change while it reads."
            "\n\nThis demo trains two small models on real source code: the same weights at the "
            "start, the same tokens in the same order."
        ),
        Padding(
            Text.assemble(
                ("cache only", "bold"),
                f"   sees the last {model.window} tokens (Transformer-XL)\n",
                ("memory", "bold"),
                f"       sees them too, and in one of its {model.num_layers} layers the "
                f"{model.num_neighbors} nearest\n             of the last {model.capacity:,} "
                "entries of the document",
            ),
            (1, 0, 1, 2),
        ),
    )


def announce(
    config: Config, corpus: TokenizedCorpus, test: Sequence[TokenizedDocument], estimate: Estimate
) -> RenderableType:
    """What is read, and how long it will take."""
    training = config.training
    tokens = training.steps * training.rows * config.model.segment_len
    num_test = sum(len(document.tokens) for document in test)
    folders = sum(document.name.count("+") + 1 for document in test)
    minutes = estimate.minutes
    slow = minutes > 15
    return Group(
        Text(
            f"Each model reads {tokens:,} of {sum(len(d.tokens) for d in corpus.train):,} training "
            f"tokens ({training.steps} steps), and is then measured on {len(test)} documents of "
            f"{num_test:,} tokens: {folders} model folders of the transformers package that "
            "neither saw."
        ),
        Padding(
            Text.assemble(
                "On this machine that will take about ",
                (_say_minutes(minutes), "bold"),
                f" ({_say_minutes(estimate.train_s / 60)} of it training).",
                " It is slower than the two-core machine the demo is made for." if slow else "",
            ),
            (1, 0, 0, 0),
        ),
    )


def title_training(number: int, name: str) -> RenderableType:
    """Above each training."""
    what = {"cache_only": "cache only", "memory": "with memory"}[name]
    return Group(Text(), Rule(f"{number}/3  training: {what}", align="left"))


def title_evaluation(test: Sequence[TokenizedDocument]) -> RenderableType:
    """Above the table, with what its numbers mean."""
    lengths = sorted(len(document.tokens) for document in test)
    return Group(
        Text(),
        Rule("3/3  source code that neither model saw", align="left"),
        Text(
            f"{len(test)} documents of {lengths[0]:,} to {lengths[-1]:,} tokens, read from the "
            "first token to the last. Perplexity is the number of equally likely tokens that would "
            "be as hard to guess as the real one is for the model: lower is better."
        ),
    )


def conclude(
    cache_only: EvaluationResult,
    memory: Mapping[str, EvaluationResult],
    differences: Mapping[str, Difference],
) -> RenderableType:
    """The table in one paragraph: what it shows, whatever that is."""
    largest = [name for name, result in memory.items() if result.control is None][-1]
    low, high = differences[largest].perplexity_interval
    change = differences[largest].perplexity_change
    if not differences[largest].excludes_zero:
        verdict = (
            f"With its largest memory the model differs by {change:+.1%} in perplexity from the "
            f"one with the cache only, but the 95% interval ({low:+.1%} to {high:+.1%}) includes "
            "zero: this run does not show that memory helps."
        )
    elif change > 0:
        verdict = (
            f"Memory raises the perplexity of unseen code by {change:.1%} (95% interval {low:+.1%} "
            f"to {high:+.1%}): in this run it does harm."
        )
    else:
        verdict = (
            f"Memory lowers the perplexity of unseen code by {-change:.1%} (95% interval "
            f"{-high:.1%} to {-low:.1%}). Same size, same tokens: the difference is what the model "
            "can look up."
        )
        wrong = [
            memory[name].perplexity for name in ("other_document", "shuffled") if name in memory
        ]
        if wrong and min(wrong) > cache_only.perplexity:
            verdict += (
                " With another document's memory, or with shuffled values, it is worse than the "
                "model without: what helps is the content of this document."
            )
    return Padding(Text(verdict, "bold"), (1, 0, 0, 0))


def title_examples() -> RenderableType:
    """Above the examples."""
    return Group(
        Text(),
        Rule("Where memory helped most", align="left"),
        Text(
            "Five tokens, each with the text before it and what the memory returned for it: the "
            "entry in «», with the text around the place where it was read. ⏎ is a line break.\n"
        ),
    )


def point_to(run_dir: Path) -> RenderableType:
    """What was written, and where to go from here."""
    return Group(
        Rule("Where to go from here", align="left"),
        Text(
            f"{run_dir}/result.json      these numbers\n"
            f"{run_dir}/perplexity.png   perplexity against the size of the memory\n"
            f"{run_dir}/memory           the run: configuration, log, metrics, checkpoint\n\n"
            f"memorizing evaluate {run_dir}/memory --against {run_dir}/cache_only \\\n"
            "    --corpus files:PATH            the same comparison on files of your own\n"
            "memorizing train small --run runs/small    a longer training"
        ),
    )


def _say_minutes(minutes: float) -> str:
    if minutes < 1.5:
        return f"{max(10, round(minutes * 6) * 10)} seconds"
    return f"{round(minutes)} minutes"
