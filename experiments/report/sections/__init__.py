"""The parts of the page, in their order."""

from __future__ import annotations

from results import Results

from sections import (
    ablations,
    adopting,
    amounts,
    attentions,
    beyond,
    capacities,
    copying,
    families,
    finetuning,
    learning,
    open_questions,
    pretrained,
    recipes,
    repeating,
    scale,
    search,
    standard,
    synthetic,
    table4,
    window,
)

_KNOWN = (
    families,
    capacities,
    learning,
    recipes,
    table4,
    finetuning,
    scale,
    ablations,
    adopting,
    window,
    attentions,
    amounts,
    search,
)
"""Parts with runs of their own; each says by `covers` which runs it shows."""

_OF_MAIN = (families, capacities, learning)
"""Parts that show the main runs and nothing else: by the present recipe where there are any."""

_INTRODUCTION = """\
# Results

Every table and plot on this page is made by `python experiments/report` from the JSON files in
`experiments/results/`; none is written by hand. A file holds a run's settings, command, commit,
seed and machine, and the nats of every block of 1,024 held-out tokens.

How to read the numbers:

- **Perplexity** is per token of our own vocabularies, so that only changes can be set beside the
  paper's. Over several seeds it is exp of the mean of their nats per token.
- **Change** is the relative change of perplexity on the same tokens: -5.0% is 5% lower, which is
  better.
- **(-6.0 to -4.0)** is the 95% interval of a change, by bootstrap: 10,000 times documents are drawn
  with replacement, and in each its blocks of 4,096 tokens, in both models and all seeds at once. It
  covers what other documents of this kind would change, as far as the few that are held out tell,
  not what another seed would: where there are several seeds, each is shown. Where a single document
  is read, only its blocks are drawn.
- **The paper's numbers** are of other corpora, models of 200M weights or more, and 65 billion
  training tokens; its datasets stand beside the nearest of our families."""


def write_report(results: Results) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by file name."""
    rest = [run for run in results.runs if not any(part.covers(run) for part in _KNOWN)]
    newest = results.keep_newest("main", ("memory", "cache"))
    sections = [part.write(newest if part in _OF_MAIN else results) for part in _KNOWN]
    for part in (copying, open_questions):
        if (section := part.write(results)) is not None:
            sections.append(section)
    sections += [
        beyond.write(results, rest),
        synthetic.write(results),
        pretrained.write(results),
        standard.write(results),
        repeating.write(results),
    ]
    titled = [s.to_markdown().replace("## ", f"## {n}. ", 1) for n, s in enumerate(sections, 1)]
    pictures = {name: png for section in sections for name, png in section.pictures.items()}
    return "\n\n".join([_INTRODUCTION, *titled]) + "\n", pictures
