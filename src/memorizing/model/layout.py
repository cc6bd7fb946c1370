"""Where the tokens of a call stand: which keys exist, how far they are, what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.devices import send
from memorizing.errors import ConfigError, StateError
from memorizing.model.state import ModelState


@dataclass(frozen=True)
class Layout:
    """The geometry of a call, for all layers. B rows, T tokens, C cached, S = C + T keys."""

    num_cached: int
    """C: columns of the cache, aligned on the right."""
    num_hidden_keys: tuple[int, ...]
    """Per row: the first columns of the cache, which hold nothing of this document (or segment)."""
    valid: Tensor
    """(B, T) bool on the CPU: tokens that are not padding."""
    num_new: Tensor
    """(B,) int64 on the CPU: valid tokens per row."""
    next_position: Tensor
    """(B,) int64 on the CPU."""
    num_kept: int
    """Columns of the next cache."""
    query_position: Tensor
    """(B, T) int64 on the CPU: position in the document of every valid token."""
    is_whole: bool
    """Whether every token is valid."""
    columns: Tensor | None
    """(B, S) int64: for calls that are not whole, the S keys with pads moved to the front."""
    distances: Tensor | None
    """(B, T, S) int64 for calls with padding on the left; -1 where a query must not look. None:
    distances follow from the columns."""
    first_valid: Tensor | None
    """(B,) int64 for calls with padding on the left: index of the first valid token."""
    at_start: Tensor
    """(B,) bool on the tokens' device: rows whose first token is their document's first."""
    is_first: Tensor
    """(B, T) bool on the tokens' device: valid tokens that are their document's first."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        state: ModelState,
        tokens: Tensor,
        valid: Tensor | None,
        *,
        may_wait: bool = False,
    ) -> Layout:
        """Work out the geometry of a call, and refuse one that breaks the memory's clock.

        `may_wait`: the entries of earlier segments may be uncommitted.

        Raises:
            ConfigError: no token at all, or a mask that is not one stretch of tokens per row.
            StateError: other rows than the state's, a crossed segment boundary, uncommitted
            entries, a void state.
        """
        if tokens.dim() != 2 or not tokens.numel():
            raise ConfigError(
                f"tokens are {tuple(tokens.shape)}; they must be (rows, tokens), at least one of "
                "each; skip calls that read nothing"
            )
        num_rows, num_tokens = tokens.shape
        if num_rows != state.num_rows:
            raise StateError(
                f"tokens have {num_rows} rows and the state {state.num_rows}; make a state with "
                f"init_state({num_rows})"
            )
        mask = (
            torch.ones(num_rows, num_tokens, dtype=torch.bool)
            if valid is None
            else _check_valid(valid.cpu(), tokens)
        )
        num_new = mask.sum(1)
        state.check_step(num_new, may_wait=may_wait)
        num_cached = state.xl_caches[0].keys.shape[2]
        count = _count_context(config, state.position)
        next_position = state.position + num_new
        is_whole = bool((num_new == num_tokens).all())
        left_padded = not is_whole and bool((mask[:, 1:] & ~mask[:, :-1]).any())
        query_position = state.position.unsqueeze(1) + (mask.cumsum(1) - 1).clamp(min=0)
        columns = distances = first_valid = None
        device = tokens.device
        if not is_whole:
            new = torch.arange(num_tokens) + num_cached
            old = torch.arange(num_cached).expand(num_rows, -1)
            # Stable sort by validity: pads first, then the cache, then the valid tokens, each in
            # order.
            order = torch.cat([torch.ones(num_rows, num_cached, dtype=torch.bool), mask], 1).to(
                torch.int8
            )
            both = torch.cat([old, new.expand(num_rows, -1)], 1)
            columns = send(both.gather(1, order.sort(dim=1, stable=True).indices), device)
        if left_padded:
            cached_position = state.position.unsqueeze(1) - num_cached + torch.arange(num_cached)
            lowest = (state.position - count).unsqueeze(1)
            key_position = torch.cat([cached_position, query_position], 1)
            exists = torch.cat([cached_position >= lowest, mask], 1)
            distances = query_position.unsqueeze(2) - key_position.unsqueeze(1)
            distances = distances.masked_fill(~exists.unsqueeze(1), -1)
            # A pad looks at itself only: its output is never used, but must be a number.
            own = torch.zeros_like(distances, dtype=torch.bool)
            own[:, :, num_cached:] = torch.eye(num_tokens, dtype=torch.bool)
            distances = torch.where(mask.unsqueeze(2), distances, torch.where(own, 0, -1))
            distances = send(distances, device)
            first_valid = send(mask.to(torch.int8).argmax(1), device)
        hidden = (num_cached - count.clamp(max=num_cached)).tolist()
        kept = min(num_cached + num_tokens, int(_count_context(config, next_position).max()))
        return cls(
            num_cached,
            tuple(hidden),
            mask,
            num_new,
            next_position,
            kept,
            query_position,
            is_whole,
            columns,
            distances,
            first_valid,
            send(query_position[:, 0] == 0, device),
            send((query_position == 0) & mask, device),
        )

    def keep(self, keys: Tensor) -> Tensor:
        """The columns of (B, H, S, D) that the next call needs, detached."""
        keys = keys.detach()
        if self.columns is None:
            kept = keys[:, :, keys.shape[2] - self.num_kept :]
            # A view keeps all S columns in memory: copy it where that would be twice as many.
            return kept.clone() if 2 * self.num_kept <= keys.shape[2] else kept
        chosen = self.columns[:, self.columns.shape[1] - self.num_kept :]
        return keys.gather(2, chosen[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))


def _check_valid(valid: Tensor, tokens: Tensor) -> Tensor:
    """The mask itself, if it is one: padding stands on the left and right of a row's tokens."""
    if valid.dtype != torch.bool or valid.shape != tokens.shape:
        raise ConfigError(
            f"valid is {tuple(valid.shape)} {valid.dtype}; it must be bool and as large as tokens, "
            f"{tuple(tokens.shape)}"
        )
    num_stretches = valid[:, :1].sum(1) + (valid[:, 1:] & ~valid[:, :-1]).sum(1)
    if bool((num_stretches > 1).any()):
        row = int((num_stretches > 1).nonzero()[0])
        raise ConfigError(
            f"row {row} of valid has padding between its tokens; pad on the left or on the right"
        )
    return valid


def _count_context(config: ModelConfig, position: Tensor) -> Tensor:
    """How many tokens before `position` local attention may need: at most the window."""
    context = position if config.xl_cache else position % config.segment_len
    return context.clamp(max=config.window)
