"""What a training is evaluated on, and which evaluation was the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memorizing.data import SegmentLoader, TokenizedDocument
from memorizing.data.loader import hash_documents
from memorizing.errors import CorpusError
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
        self._read = [len(self.documents), self.max_tokens]
        self._identity = list(hash_documents(documents)) if documents else None
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
        kept = {name: getattr(self, name) for name in ("best_step", "best_nats", "last_nats")}
        return {"documents": self._identity, "read": self._read, **kept}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Put back what `to_dict` gave.

        Where other amounts of the same documents are read now, the next result counts as the best:
        it cannot be compared with those before. A run may go on without validation. What was saved
        before documents were compared is taken as it is.

        Raises:
            CorpusError: results so far are on other documents, or the same with other text.
        """
        saved, read = values.get("documents"), values.get("read", self._read)
        if self._identity is None:
            self._identity, self._read = saved, read
        elif saved not in (None, self._identity):
            raise CorpusError(
                "the run was validated on other documents, or on the same with other text, and its "
                "best result cannot be compared with theirs; resume with the same ones, without "
                "validation, or start a new run"
            )
        self.best_step, self.last_nats = values["best_step"], values["last_nats"]
        self.best_nats = values["best_nats"] if read == self._read else None
