"""What a training is evaluated on, and which evaluation was the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memorizing.data import SegmentLoader, TokenizedDocument
from memorizing.evaluation import EvaluationResult

_MIN_SEGMENTS = 4
"""Documents are read at least this far, so that there is something in memory to find."""


class HeldOut:
    """The same tokens each time, and which result on them was the best.

    Attributes:
        documents: about so many tokens from the beginnings of documents.
        max_tokens: of each document.
        start_token: precedes every document.
        best_step: of the best evaluation, which had `best_nats` per token.
        last_nats: per token, of the last evaluation.
    """

    def __init__(
        self, documents: Sequence[TokenizedDocument], loader: SegmentLoader, num_tokens: int
    ) -> None:
        """Choose about `num_tokens` tokens, to be read as `loader` reads."""
        self.start_token = loader.start_token
        self.max_tokens = max(
            num_tokens // max(len(documents), 1), _MIN_SEGMENTS * loader.segment_len
        )
        self.documents: list[TokenizedDocument] = []
        left = num_tokens
        for document in documents:
            if left > 0:
                self.documents.append(document)
                left -= min(len(document.tokens), self.max_tokens)
        self.best_step: int | None = None
        self.best_nats: float | None = None
        self.last_nats: float | None = None

    def __bool__(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.documents)

    def judge(self, step: int, result: EvaluationResult) -> bool:
        """Remember a result; whether it is the best so far."""
        self.last_nats = result.nats / result.tokens
        is_best = self.best_nats is None or self.last_nats < self.best_nats
        if is_best:
            self.best_step, self.best_nats = step, self.last_nats
        return is_best

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: getattr(self, name) for name in ("best_step", "best_nats", "last_nats")}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Put back what `to_dict` gave."""
        self.best_step, self.best_nats = values["best_step"], values["best_nats"]
        self.last_nats = values["last_nats"]
