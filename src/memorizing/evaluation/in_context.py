"""In-context retrieval, the rival of a memory: passages found by their words, before the window.

Ram et al. 2023, "In-Context Retrieval-Augmented Language Models": every `stride` tokens the last
`query_len` ones ask BM25, and the model reads `start token, passages, last tokens` anew, to predict
the next `stride`.

**Deviation:** passages are those of the text itself that have left the window, as many and as long
as a memory of passages would show, the best one last; each begins half a passage after the one
before, and those that are shown do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memorizing.errors import ConfigError
from memorizing.evaluation.bm25 import WordScorer, choose_apart, import_bm25s
from memorizing.huggingface.attaching.attachment import get_attachment, unwrap
from memorizing.huggingface.sessions.scoring import Progress, Tokens
from memorizing.loss import compute_token_nats
from memorizing.model import evaluation_mode


@dataclass(frozen=True)
class InContext:
    """How passages are found; how many and how long they are is said by `add_memory`."""

    stride: int = 4
    """Tokens that are predicted with the same passages. Each costs reading the window again."""
    query_len: int = 32
    """Last tokens that are asked with."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("stride", "query_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


def score_in_context(
    model: Any,
    texts: Sequence[Tokens],
    tokenizer: Any,
    start_token: int,
    how: InContext,
    *,
    max_tokens: int = 0,
    progress: Progress | None = None,
) -> list[NDArray[np.float32]]:
    """Nats of every token of every text; no memory is read, whatever is open.

    Args:
        model: with `add_memory`, whose window, passages and their length are taken.
        texts: token ids, without the start token.
        tokenizer: its `decode` gives the words.
        start_token: precedes every text.
        how: passages are found.
        max_tokens: only the first tokens of each text are read; 0 reads all.
        progress: see `Progress`.

    Raises:
        ConfigError: window and passages are longer than the model, or a stride than the window.
        IndexUnavailableError: bm25s is not installed.
    """
    cut = [text[:max_tokens] if max_tokens else text for text in texts]
    total, done, scored = sum(map(len, cut)), 0, []
    for text in cut:
        reader = InContextReader(model, text, tokenizer, start_token, how)
        nats = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(text), how.stride):
            nats.append(reader.score(start, min(start + how.stride, len(text))))
            done += len(nats[-1])
            if progress is not None:
                progress(done, total)
        scored.append(np.concatenate(nats))
    return scored


class InContextReader:
    """One text, of which any part may be scored."""

    def __init__(
        self, model: Any, text: Tokens, tokenizer: Any, start_token: int, how: InContext
    ) -> None:
        """See `score_in_context`."""
        self._model = unwrap(model)
        self._attachment = get_attachment(self._model)
        settings = self._attachment.settings
        self._window, self._num_passages = settings.window, settings.num_passages
        self._passage_len = settings.passage_len
        longest = self._window + self._num_passages * self._passage_len + 1
        most = self._attachment.decoder.max_positions
        if longest > most:
            raise ConfigError(
                f"window {self._window} and {self._num_passages} passages of {self._passage_len} "
                f"with a start token are {longest} tokens, and the model reads {most}; lower "
                "window, num_passages or passage_len"
            )
        if how.stride > self._window:
            raise ConfigError(
                f"stride is {how.stride} and window {self._window}: what is predicted would not "
                "fit into the window; lower the stride"
            )
        self._inputs = np.concatenate([[start_token], text.astype(np.int64)])
        self._tokenizer, self._how = tokenizer, how
        self._texts: list[str] = []
        self._scorer: WordScorer | None = None
        self._num_indexed = 0
        import_bm25s()

    def score(self, start: int, end: int) -> NDArray[np.float32]:
        """Nats of the tokens [start, end), of which the last one is predicted from a whole window.

        What is found depends on nothing that comes after token `start - 1`.
        """
        assert end - start <= self._how.stride
        first = max(0, end - self._window)
        found = self._find(start, first)
        parts = [self._inputs[span] for span in reversed(found)]
        if first or parts:
            parts.insert(0, self._inputs[:1])
        tokens = np.concatenate([*parts, self._inputs[first:end]])
        device = self._model.get_input_embeddings().weight.device
        ids = torch.from_numpy(tokens).unsqueeze(0).to(device)
        targets = torch.from_numpy(self._inputs[start + 1 : end + 1]).unsqueeze(0).to(device)
        with evaluation_mode(self._model), self._attachment.change_mode(is_plain=True):
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=end - start).logits
        return compute_token_nats(logits, targets)[0].cpu().numpy()

    def _find(self, start: int, end: int) -> list[slice]:
        """Passages of inputs [1, end), the best first, for what is known before token `start`."""
        query = self._decode(slice(max(1, start + 1 - self._how.query_len), start + 1))
        step = max(1, self._passage_len // 2)
        count = max(0, (end - 1 - self._passage_len) // step + 1)
        if not count:
            return []
        spans = [slice(1 + n * step, 1 + n * step + self._passage_len) for n in range(count)]
        # A part that is scored before an earlier one has more passages than that one may see.
        if count != self._num_indexed:
            self._texts += map(self._decode, spans[len(self._texts) :])
            self._scorer, self._num_indexed = WordScorer(self._texts[:count]), count
        assert self._scorer is not None
        places = [("", span.start, span.stop) for span in spans]
        chosen = choose_apart(self._scorer.score(query), places, self._num_passages)
        return [spans[number] for number in chosen]

    def _decode(self, span: slice) -> str:
        return self._tokenizer.decode(self._inputs[span].tolist())
