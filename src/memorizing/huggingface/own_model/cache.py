"""The history of our own model in the place where `transformers` passes its caches."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from memorizing.errors import StateError
from memorizing.huggingface.releases import CACHE_NAME
from memorizing.model import ModelState


class MemorizingCache(Cache):
    """A `ModelState` that a model takes and returns as `past_key_values`, or `cache`.

    It holds the local caches, the memories and where every row is in its document. Like the caches
    of `transformers` it is changed in place by the calls that it is passed to. Passing it again
    goes on with the document; `copy.deepcopy` makes one that goes on by itself, so that many
    questions can be asked about one text that was read once. Nothing can be taken back from it:
    what was read is in the memory.

    Attributes:
        state: the history now.
        last_tokens: (B,) int64, the last column that was read; None before the first.
    """

    def __init__(self, state: ModelState) -> None:
        """Wrap a history; `init_cache` of a model makes one that is empty."""
        super().__init__(layers=[])
        self.state = state
        self.last_tokens: Tensor | None = None
        self._num_columns = 0

    def advance(self, state: ModelState, tokens: Tensor) -> None:
        """Take over the history after a call over tokens (B, T). In place."""
        self.state = state
        self.last_tokens = tokens[:, -1]
        self._num_columns += tokens.shape[1]

    def __repr__(self) -> str:
        positions = self.state.position.tolist()
        return f"{type(self).__name__}(position={positions}, columns={self._num_columns})"

    def __len__(self) -> int:
        """Layers of the model."""
        return len(self.state.xl_caches)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` read so far, padding included."""
        return self._num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a document has no greatest length."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows, each a document of its own."""
        return self.state.num_rows

    @property
    def is_initialized(self) -> bool:
        """Always: an empty history is one."""
        return True

    @property
    def is_linear(self) -> list[bool]:
        """No layer is a recurrence: `generate` reads only what the history has not read."""
        return [False] * len(self)

    @property
    def is_compileable(self) -> bool:
        """Never: its sizes change with every call."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Never."""
        return False

    def reset(self) -> None:
        """Start a new document in every row. In place; empties the memories."""
        self.state = self.state.start_documents(torch.ones(self.batch_size, dtype=torch.bool))
        self.last_tokens = None
        self._num_columns = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows (an index tensor), in that order. Copies the memories."""
        self.state = self.state.select_rows(indices)
        if self.last_tokens is not None:
            self.last_tokens = self.last_tokens[indices.to(self.last_tokens.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put every row `repeats` times below one another. Copies the memories."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in that order. Copies the memories."""
        self.batch_select_indices(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: what was read is in the memory.

        Raises:
            StateError: always.
        """
        raise StateError(
            "tokens cannot be taken back from a MemorizingCache: what was read is in the memory; "
            "keep a copy.deepcopy(cache) from before, and go on from it"
        )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: keys and values are written by the model's own calls.

        Raises:
            StateError: always.
        """
        raise StateError(
            "a MemorizingCache takes no keys and values from outside; pass it to a "
            f"MemorizingTransformerForCausalLM as {CACHE_NAME}"
        )
