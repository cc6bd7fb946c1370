"""The tokens where memory helped most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memorizing.errors import ConfigError
from memorizing.evaluation import EvaluationResult

if TYPE_CHECKING:
    from memorizing.data import TokenizedDocument, Tokenizer


@dataclass(frozen=True)
class HelpedToken:
    """A token that is predicted better with memory."""

    document: int
    """Index of the document in the list evaluated."""
    position: int
    """Of the token in its document, from 0."""
    nats: float
    baseline_nats: float

    @property
    def gain(self) -> float:
        """Nats that memory saved."""
        return self.baseline_nats - self.nats

    @property
    def probability(self) -> float:
        """Of the token, with memory."""
        return math.exp(-self.nats)

    @property
    def baseline_probability(self) -> float:
        """Of the token under the baseline."""
        return math.exp(-self.baseline_nats)


def find_helped_tokens(
    result: EvaluationResult,
    baseline: EvaluationResult,
    documents: Sequence[TokenizedDocument],
    tokenizer: Tokenizer,
    *,
    num_tokens: int = 5,
    min_position: int = 0,
    max_position: int | None = None,
    neighborhood: int = 64,
    max_per_document: int = 2,
) -> list[HelpedToken]:
    """Choose the tokens whose nats fell most from `baseline` to `result`, spread out.

    Left out are tokens without a letter or digit, a text that was chosen before, tokens nearer than
    `neighborhood` to one that was chosen, and more than `max_per_document` of a document (more
    where there are too few documents for that).

    Args:
        result: with memory.
        baseline: without, or of a model that has none.
        documents: those evaluated.
        tokenizer: to tell what a token says.
        num_tokens: how many to choose; there may be fewer.
        min_position: earlier tokens are left out, such as the first segment's, which has no memory.
        max_position: this and later ones are left out.
        neighborhood: tokens.
        max_per_document: tokens of one document.

    Raises:
        ConfigError: the results are not of these documents.
    """
    _check_documents(result, baseline, documents)
    max_per_document = max(max_per_document, math.ceil(num_tokens / max(1, len(documents))))
    parts = [
        (base.token_nats - mine.token_nats)[min_position:max_position]
        for mine, base in zip(result.documents, baseline.documents, strict=True)
    ]
    gains = np.concatenate(parts)
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    chosen: list[HelpedToken] = []
    texts: set[str] = set()
    counts: Counter[int] = Counter()
    for place in np.argsort(-gains, kind="stable"):
        if len(chosen) == num_tokens or gains[place] <= 0:
            break
        owner = int(owners[place])
        position = int(place - firsts[owner]) + min_position
        if counts[owner] >= max_per_document or any(
            other.document == owner and abs(other.position - position) < neighborhood
            for other in chosen
        ):
            continue
        text = tokenizer.decode([int(documents[owner].tokens[position])]).strip()
        if text in texts or not any(character.isalnum() for character in text):
            continue
        texts.add(text)
        counts[owner] += 1
        nats = (float(r.documents[owner].token_nats[position]) for r in (result, baseline))
        chosen.append(HelpedToken(owner, position, *nats))
    return chosen


def _check_documents(
    result: EvaluationResult, baseline: EvaluationResult, documents: Sequence[TokenizedDocument]
) -> None:
    read, base = ([(d.name, len(d.token_nats)) for d in r.documents] for r in (result, baseline))
    longest = [(document.name, len(document.tokens)) for document in documents]
    for found in (read, base):
        pairs = zip(found, longest, strict=False)
        if len(found) != len(longest) or any(
            name != known or count > most for (name, count), (known, most) in pairs
        ):
            raise ConfigError(
                f"a result of {len(found)} documents is not of the {len(longest)} given; evaluate "
                "with memory and without on these documents"
            )
    if read != base:
        raise ConfigError(
            "the two results hold different numbers of tokens; evaluate both with the same "
            "tokenizer and the same max_tokens"
        )
