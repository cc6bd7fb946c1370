"""Nats of every token of a document under a model that sees a sliding window of it.

Token i (the start token is token 0) attends in every layer to the tokens i - window < j <= i:
itself and the window - 1 before it, however the document is cut into calls. Keys carry absolute
rotary positions; what the model sees of them are differences, which stay below the window.

A pre-trained model rests much of its attention on its first token. Once that has left the window
the model is another, bad one (Xiao et al., StreamingLLM, 2024), and a memory that is compared with
it would be praised for bringing the first token back. So `keeps_start` holds the start token in
view, as if it stood just before the oldest token that the block can see: at its true distance, far
beyond the trained length, it is of no use.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memorizing.errors import ConfigError
from memorizing.loss import compute_token_nats

BLOCK_LEN = 512


def make_inputs(tokens: np.ndarray, start_token: int) -> tuple[Tensor, Tensor]:
    """What is read and what is predicted, (1, n) each; the start token precedes the document."""
    targets = torch.from_numpy(tokens).long().unsqueeze(0)
    return torch.cat([torch.tensor([[start_token]]), targets[:, :-1]], dim=1), targets


def make_band(num_queries: int, num_cached: int, window: int, sees_first: bool) -> Tensor:
    """What each query sees, (1, 1, Q, K) bool; the last Q of the K keys are the queries' own."""
    queries = torch.arange(num_cached, num_cached + num_queries)[:, None]
    keys = torch.arange(num_cached + num_queries)
    in_window = keys > queries - window
    return ((keys <= queries) & (in_window | (keys == 0) if sees_first else in_window))[None, None]


class WindowCache(DynamicCache):
    """Keys and values of the tokens in the window and, where it is kept, the start token's."""

    def __init__(self, window: int, keeps_start: bool) -> None:
        super().__init__()
        self.num_kept = window - 1
        self.keeps_start = keeps_start
        self._starts: list[tuple[Tensor, Tensor]] = []

    def slide(self, model: LlamaForCausalLM, position: int) -> None:
        """Drop what the block that begins at `position` does not see."""
        first = max(0, position - self.num_kept)
        if self.keeps_start and not self._starts:
            # At position 0 the rotation is none: these are the raw keys.
            self._starts = [(k[..., :1, :], v[..., :1, :]) for k, v in self._pairs()]
        for i, (keys, values) in enumerate(self._pairs()):
            keys = keys[..., max(0, keys.shape[-2] - (position - first)) :, :]
            values = values[..., max(0, values.shape[-2] - (position - first)) :, :]
            if self.keeps_start and first > 0:
                start_key, start_value = self._starts[i]
                place = torch.tensor([[first - 1]], device=keys.device)
                cos, sin = model.model.rotary_emb(keys, place)
                start_key = apply_rotary_pos_emb(start_key, start_key, cos, sin)[1]
                keys = torch.cat([start_key, keys], dim=-2)
                values = torch.cat([start_value, values], dim=-2)
            layer = self.layers[i]
            assert isinstance(layer, DynamicLayer)
            layer.keys, layer.values = keys, values

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.layers]  # type: ignore[misc]


@torch.inference_mode()
def compute_window_nats(
    model: LlamaForCausalLM,
    tokens: np.ndarray,
    start_token: int,
    window: int,
    *,
    keeps_start: bool = False,
    block_len: int = BLOCK_LEN,
    report: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Nats of each token, (n,) fp32.

    Args:
        model: in evaluation mode.
        tokens: of one document, (n,), without the start token.
        start_token: precedes them.
        window: tokens that a token sees, itself included.
        keeps_start: every token sees the start token besides.
        block_len: tokens of a call. Without `keeps_start` any gives the same; with it the start
            token stands up to this much farther than the window.
        report: called with the number of tokens done since the last call.

    Raises:
        ConfigError: a window or block below 1.
    """
    if window < 1 or block_len < 1:
        raise ConfigError(f"window is {window} and block_len {block_len}; both must be 1 or more")
    inputs, targets = make_inputs(tokens, start_token)
    device = model.device
    cache = WindowCache(window, keeps_start)
    nats = np.empty(len(tokens), dtype=np.float32)
    for start in range(0, len(tokens), block_len):
        part = slice(start, min(start + block_len, len(tokens)))
        num_cached = cache.get_seq_length()
        mask = make_band(part.stop - start, num_cached, window, keeps_start)
        output = model(
            input_ids=inputs[:, part].to(device),
            attention_mask=mask.to(device),
            position_ids=torch.arange(start, part.stop, device=device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        cache.slide(model, part.stop)
        nats[part] = compute_token_nats(output.logits, targets[:, part].to(device))[0].cpu()
        if report:
            report(part.stop - start)
    return nats
