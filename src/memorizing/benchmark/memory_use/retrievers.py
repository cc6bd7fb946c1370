"""Passages found from outside of a model: by their words, or by an encoder of sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from memorizing.benchmark.memory_use.places import Package
from memorizing.errors import ConfigError
from memorizing.evaluation.bm25 import choose_apart

_BATCH = 16


@dataclass(frozen=True)
class Found:
    """A passage of a document that was found."""

    document: str
    start: int
    """Its first token, counted from the beginning of the document."""
    end: int
    score: float


class Scorer(Protocol):
    """What gives every passage a score for a query."""

    num_bytes: int
    """Of what it keeps of the passages."""

    def score(self, query: str) -> NDArray[np.floating[Any]]:
        """(passages,): larger is better; -inf is not found at all."""
        ...


class Finder:
    """The passages of a package, of equal length, each half a passage after the one before."""

    def __init__(
        self,
        package: Package,
        passage_len: int,
        tokenizer: Any,
        make_scorer: Callable[[list[str]], Scorer],
    ) -> None:
        """Cut the documents, and let the scorer see what was cut."""
        self.spans = [
            (document.name, start, end)
            for document in package.documents
            for start, end in cut_spans(len(document.tokens), passage_len)
        ]
        tokens = {document.name: document.tokens for document in package.documents}
        self._scorer = make_scorer(
            [tokenizer.decode(list(tokens[name][start:end])) for name, start, end in self.spans]
        )
        self._tokenizer = tokenizer
        self.index_bytes = self._scorer.num_bytes
        """Of what the scorer keeps."""
        self.num_bytes = self.index_bytes + sum(
            len(document.text.encode()) for document in package.documents
        )
        """Of that and the texts."""

    def find(
        self, query: Sequence[int], num_passages: int, *, without: str | None = None
    ) -> list[Found]:
        """The best passages of all documents but one, best first; none overlap."""
        scores = self._scorer.score(self._tokenizer.decode(list(query)))
        is_left_out = [name == without for name, _, _ in self.spans]
        chosen = choose_apart(np.where(is_left_out, -np.inf, scores), self.spans, num_passages)
        return [Found(*self.spans[number], float(scores[number])) for number in chosen]


def cut_spans(num_tokens: int, length: int) -> Iterator[tuple[int, int]]:
    """Stretches of a text, each half a length after the one before; the last ones may be short."""
    step = max(1, length // 2)
    for start in range(0, max(1, num_tokens - step), step):
        if num_tokens:
            yield start, min(num_tokens, start + length)


class SentenceEncoder:
    """An encoder of `transformers`; a text is the mean of its tokens, as long as 1."""

    def __init__(self, name: str, device: Any) -> None:
        """Load it: a folder, or a name on the hub.

        Raises:
            ConfigError: there is none.
        """
        from transformers import AutoModel, AutoTokenizer

        from memorizing.huggingface.loading import check_place, explain_failure, keep_quiet

        place = check_place(name)
        try:
            with keep_quiet():
                self._tokenizer = AutoTokenizer.from_pretrained(place)
                self._model = AutoModel.from_pretrained(place).eval().to(device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(explain_failure("embedder", name, error)) from error
        positions = getattr(self._model.config, "max_position_embeddings", 512)
        self._max_len = min(positions, self._tokenizer.model_max_length)

    def make_scorer(self, texts: list[str]) -> _VectorScorer:
        """A scorer by cosine."""
        return _VectorScorer(self, self.encode(texts))

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """(texts, D) fp32."""
        parts = [np.zeros((0, int(self._model.config.hidden_size)), dtype=np.float32)]
        for first in range(0, len(texts), _BATCH):
            given = self._tokenizer(
                texts[first : first + _BATCH],
                padding=True,
                truncation=True,
                max_length=self._max_len,
                return_tensors="pt",
            ).to(self._model.device)
            states = self._model(**given).last_hidden_state.float()
            mask = given["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            parts.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
        return np.concatenate(parts)


class _VectorScorer:
    def __init__(self, encoder: SentenceEncoder, vectors: NDArray[np.float32]) -> None:
        self._encoder, self._vectors = encoder, vectors
        self.num_bytes = vectors.nbytes

    def score(self, query: str) -> NDArray[np.floating[Any]]:
        """See `Scorer`: the cosine."""
        return self._vectors @ self._encoder.encode([query])[0]
