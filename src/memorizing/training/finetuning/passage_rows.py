"""Texts behind passages that a model of `transformers` is trained on.

A text and what stands before it are read at once, as the model reads any text: without memory and
window. Every row of a step is another one, and nothing is remembered from step to step.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memorizing.data import RowLoader, SegmentBatch, TokenizedDocument
from memorizing.errors import CheckpointError
from memorizing.evaluation import EvaluationResult, Progress
from memorizing.evaluation.results import DocumentResult
from memorizing.huggingface.attaching.attachment import Attachment
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.loss import compute_token_nats, sum_nats
from memorizing.model import evaluation_mode
from memorizing.ranks import ALONE, Ranks
from memorizing.training.finetuning.examples import KINDS, Example, Examples
from memorizing.training.finetuning.rows import FinetuneRows
from memorizing.training.reporting import Evaluation, HeldOut


@final
class PassageLoader(RowLoader):
    """Draws texts, of every second of which the passages hold the text itself.

    Where the capacity is 0, the same texts stand alone: the control.
    """

    def __init__(
        self,
        documents: Sequence[TokenizedDocument],
        settings: MemorySettings,
        num_rows: int,
        start_token: int,
        seed: int,
    ) -> None:
        """Take the documents; see `Examples`.

        Raises:
            CorpusError: there are no documents, or one has no tokens.
        """
        self.documents, self.num_rows, self.seed = documents, num_rows, seed
        self.start_token = start_token
        self.check_documents()
        self._examples = Examples(documents, settings, start_token)
        self.segment_len = self._examples.longest
        self._kinds = KINDS[:2] if settings.capacity else KINDS[2:]
        self._num_drawn = self._num_tokens = 0

    @property
    def epoch(self) -> int:
        """See `RowLoader`: by the tokens that were drawn, some never and others again."""
        return self._num_tokens // self.num_targets

    @property
    def starts_document(self) -> bool:
        """See `RowLoader`."""
        return True

    def __next__(self) -> SegmentBatch:
        """The next text of every row. Valid are the tokens of texts; what is before them is not."""
        drawn = []
        for _ in range(self.num_rows):
            self._num_drawn += 1
            kind = self._kinds[self._num_drawn % len(self._kinds)]
            drawn.append(self._examples.draw(kind, f"{self.seed}/{self._num_drawn}"))
        self._num_tokens += sum(len(one.text) for one in drawn)
        lengths = [len(one.before) + len(one.text) for one in drawn]
        ids = torch.full((self.num_rows, max(lengths)), self.start_token)
        valid = torch.zeros(self.num_rows, max(lengths) - 1, dtype=torch.bool)
        for row, (one, length) in enumerate(zip(drawn, lengths, strict=True)):
            ids[row, :length] = torch.cat([one.before, one.text])
            valid[row, length - len(one.text) - 1 : length - 1] = True
        return SegmentBatch(
            tokens=ids[:, :-1],
            targets=ids[:, 1:],
            valid=valid,
            doc_start=torch.ones(self.num_rows, dtype=torch.bool),
            doc_id=torch.tensor([one.document for one in drawn]),
            position=torch.tensor([one.start for one in drawn]),
        )

    def state_dict(self) -> dict[str, Any]:
        """See `RowLoader`."""
        return {**self.describe(), "drawn": self._num_drawn, "tokens": self._num_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `RowLoader`."""
        self.check_state(state)
        try:
            drawn, tokens = operator.index(state["drawn"]), operator.index(state["tokens"])
        except TypeError as error:
            raise CheckpointError(f"loader state is damaged ({error}); it was altered") from error
        if min(drawn, tokens) < 0 or drawn % self.num_rows:
            raise CheckpointError(
                f"loader state says that {drawn} texts of {tokens} tokens were drawn; it was "
                "altered"
            )
        self._num_drawn, self._num_tokens = drawn, tokens


@final
class PassageRows(FinetuneRows):
    """Rows that have no history: passages stand before each text."""

    def __init__(
        self, model: Any, attachment: Attachment, loader: PassageLoader, evaluate_tokens: int
    ) -> None:
        """Read what a loader gives; in an evaluation about so many tokens, passages counted too."""
        self._model, self._attachment, self.loader = model, attachment, loader
        self._evaluate_tokens = evaluate_tokens

    @contextmanager
    def open(self) -> Iterator[None]:
        """See `FinetuneRows`."""
        with self._attachment.change_mode(is_plain=True):
            yield

    def read(self, batch: SegmentBatch, num_targets: int) -> float:
        """See `FinetuneRows`."""
        device = self._model.get_input_embeddings().weight.device
        total = 0.0
        for tokens, targets, valid in zip(batch.tokens, batch.targets, batch.valid, strict=True):
            length = int(valid.nonzero()[-1]) + 1
            wanted = targets[valid].unsqueeze(0).to(device)
            logits = self._model(
                input_ids=tokens[:length].unsqueeze(0).to(device),
                logits_to_keep=wanted.shape[1],
                use_cache=False,
            ).logits
            nats = sum_nats(logits, wanted, torch.ones_like(wanted, dtype=torch.bool))
            (nats / num_targets).backward()
            total += nats.item()
        return total

    def evaluate(self, held_out: HeldOut, progress: Progress, ranks: Ranks) -> Evaluation:
        """See `FinetuneRows`: texts of which passages have the text, or have not, and alone."""
        settings = self._attachment.settings
        cut = [
            replace(document, tokens=document.tokens[: held_out.max_tokens])
            for document in held_out.documents
        ]
        drawn = draw_in_turn(
            Examples(cut, settings, held_out.start_token), self._evaluate_tokens, "held out"
        )
        with self.open():
            nats = score_examples(self._model, drawn, progress, ranks)
        results = [
            DocumentResult(cut[one.document].name, scored, None)
            for one, scored in zip(drawn, nats, strict=True)
        ]
        step = len(KINDS)
        parts = {
            kind: EvaluationResult(tuple(results[place::step]), settings.capacity)
            for place, kind in enumerate(KINDS)
        }
        alone = parts["alone"]
        if not settings.capacity:
            return Evaluation(alone, None, parts)
        both = (*parts["quoted"].documents, *parts["other"].documents)
        return Evaluation(EvaluationResult(both, settings.capacity), alone, parts)

    def commit(self) -> None:
        """See `Histories`."""

    def measure_fill(self) -> dict[int, float]:
        """See `Histories`."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Histories`."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Histories`."""
        if tensors:
            raise CheckpointError(
                f"the checkpoint holds histories, such as {min(tensors)}, and texts behind "
                "passages have none; it was altered"
            )


def draw_in_turn(examples: Examples, num_tokens: int, seed: str) -> list[Example]:
    """Texts of all kinds, each text in each kind in the order of `KINDS`.

    Args:
        examples: draws them.
        num_tokens: as many texts as have about so many tokens with all that is before them.
        seed: of what is drawn.
    """
    drawn: list[Example] = []
    left = num_tokens
    while left > 0:
        drawn += [examples.draw(kind, f"{seed}/{len(drawn) // len(KINDS)}") for kind in KINDS]
        left -= sum(len(one.before) + len(one.text) for one in drawn[-len(KINDS) :])
    return drawn


def score_examples(
    model: Any,
    examples: Sequence[Example],
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> list[NDArray[np.float32]]:
    """Nats of every token of every text, read as the model reads any text.

    Args:
        model: in evaluation mode during the call.
        examples: what is scored.
        progress: called after every text with those done, and all.
        ranks: processes that read these texts together; each has all nats.
    """
    device = model.get_input_embeddings().weight.device
    lengths = [len(one.text) for one in examples]
    scored: dict[int, NDArray[np.float32]] = {}
    mine = range(ranks.rank, len(examples), ranks.size)
    with evaluation_mode(model):
        for done, number in enumerate(mine, 1):
            one = examples[number]
            tokens = torch.cat([one.before, one.text]).unsqueeze(0).to(device)
            logits = model(
                input_ids=tokens[:, :-1], logits_to_keep=lengths[number], use_cache=False
            ).logits
            targets = tokens[:, -lengths[number] :]
            scored[number] = compute_token_nats(logits, targets)[0].cpu().numpy()
            if progress is not None:
                progress(done, len(mine))
    return ranks.join_arrays(scored, lengths)
