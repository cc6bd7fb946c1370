"""What the demo tells: for someone who has not read the paper."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from memorizing.config import Config
from memorizing.data import TokenizedDocument
from memorizing.demo.choice import Choice, cut_length
from memorizing.demo.probe import Speed
from memorizing.evaluation import EvaluationResult
from memorizing.metrics import Difference


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
    whole: Config,
    choice: Choice,
    num_train: int,
    lengths: Sequence[int],
    speed: Speed,
    minutes: float,
) -> RenderableType:
    """What the machine can do, what was chosen for it, and how long that will take.

    Args:
        whole: the recipe.
        choice: what is done of it.
        num_train: tokens of the training documents.
        lengths: tokens of the test documents.
        speed: of the machine.
        minutes: that were given; 0 is no limit.
    """
    training, limit = choice.config.training, choice.config.evaluation.max_tokens_per_document
    tokens = training.steps * training.rows * choice.config.model.segment_len
    num_test = sum(cut_length(length, limit) for length in lengths)
    steps = f"all {training.steps:,} steps of the recipe"
    if training.steps < whole.training.steps:
        steps = f"{training.steps:,} of the recipe's {whole.training.steps:,} steps"
    part = f"the first {limit:,} tokens of " if limit else ""
    aim = f"To end within {_say_minutes(minutes)}" if minutes else "As the recipe says"
    expected_s = choice.train_s + choice.evaluate_s
    late = (
        f" Less would not show anything, so it takes longer than the {_say_minutes(minutes)} that "
        "were asked for: this machine is slower than those the demo is made for."
    )
    return Group(
        Text(
            f"On this machine a step of training both models takes {speed.train_s:.2g} seconds in "
            f"{speed.precision} ({speed.reason}). {aim}, each model reads {tokens:,} of "
            f"{num_train:,} training tokens ({steps}), and is then "
            f"measured on {part}{len(lengths)} documents, {num_test:,} tokens in all: model "
            "folders of the transformers package that neither saw."
        ),
        Padding(
            Text.assemble(
                "That will take about ",
                (_say_minutes(expected_s / 60), "bold"),
                f" from now, {_say_minutes(choice.train_s / 60)} of it training.",
                "" if choice.is_in_time else late,
            ),
            (1, 0, 0, 0),
        ),
    )


def title_training(number: int, name: str) -> RenderableType:
    """Above each training."""
    what = {"cache_only": "cache only", "memory": "with memory"}[name]
    return Group(Text(), Rule(f"{number}/3  training: {what}", align="left"))


def title_evaluation(config: Config, test: Sequence[TokenizedDocument]) -> RenderableType:
    """Above the table, with what its numbers mean."""
    limit = config.evaluation.max_tokens_per_document
    lengths = sorted(cut_length(len(document.tokens), limit) for document in test)
    shortest = "" if lengths[0] == lengths[-1] else f"{lengths[0]:,} to "
    return Group(
        Text(),
        Rule("3/3  source code that neither model saw", align="left"),
        Text(
            f"{len(test)} documents of {shortest}{lengths[-1]:,} tokens, read from the "
            "first token on. Perplexity is the number of equally likely tokens that would "
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


def point_to(
    run_dir: Path, total_s: float, train_s: float, evaluate_s: float
) -> tuple[RenderableType, RenderableType]:
    """How long it took and what was written; and where to go from here.

    The second is commands, to be printed as they are (soft_wrap), so that they can be copied.
    """
    took = [_say_minutes(seconds / 60) for seconds in (total_s, train_s, evaluate_s)]
    memory, cache_only, config = (
        shlex.quote(str(run_dir / name)) for name in ("memory", "cache_only", "memory/config.toml")
    )
    said = Group(
        Rule("Where to go from here", align="left"),
        Text(
            f"This took {took[0]}: {took[1]} of training and {took[2]} of evaluation.\n\n"
            f"{run_dir}/result.json      these numbers\n"
            f"{run_dir}/perplexity.png   perplexity against the size of the memory\n"
            f"{run_dir}/memory           the run: configuration, log, metrics, checkpoint\n"
        ),
    )
    commands = Text(
        "# the same comparison on files of your own\n"
        f"memorizing evaluate {memory} \\\n    --against {cache_only} \\\n"
        "    --corpus files:PATH\n"
        "# exactly the same again, on any machine\n"
        f"memorizing demo --recipe {config} \\\n    --minutes 0 --run runs/again\n"
        "# the whole recipe, however long it takes\n"
        "memorizing demo --minutes 0\n"
        "# a longer training\n"
        "memorizing train small --run runs/small"
    )
    return said, commands


def _say_minutes(minutes: float) -> str:
    if minutes < 1.5:
        return f"{max(10, round(minutes * 6) * 10)} seconds"
    return f"{minutes:.1f}".removesuffix(".0") + " minutes"
