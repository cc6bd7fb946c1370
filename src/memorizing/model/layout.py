"""The history of our own model, where the tokens of a call stand in it, and what else they see.

Crossbatch: a memory layer sees keys and values of earlier segments *with* gradient, and others'
(Focused Transformer, Tworkowski et al. 2023, section 3.2). Entries of a memory take no gradient, so
nothing but local attention teaches keys to be found from far away. In training, the entries of the
previous segments of the same step can be shown to the memory layer directly: then queries, keys
and values learn to meet across segments. Those of other rows are shown beside them as negatives:
then keys learn not to be mistaken for another document's.

Shapes: B rows, H heads, T queries, n entries of a row, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.devices import send
from memorizing.errors import ConfigError, StateError
from memorizing.memory.history import Entries, History


@dataclass(frozen=True, kw_only=True)
class ModelState(History):
    """Where every row is in its document, and what the model keeps of what it read."""

    xl_caches: tuple[Entries, ...]
    """Per layer, the last tokens' keys and values, aligned on the right; how many count follows
    from `position`. Of another attention, what it keeps."""


@dataclass(frozen=True)
class Layout:
    """The geometry of a call, for all layers. B rows, T tokens, C cached, S = C + T keys."""

    num_hidden_keys: tuple[int, ...]
    """Per row: the first columns of the cache, which hold nothing of this document (or segment)."""
    valid: Tensor
    """(B, T) bool on the CPU: tokens that are not padding, which stands on their right."""
    num_new: Tensor
    """(B,) int64 on the CPU: valid tokens per row."""
    num_kept: int
    """Columns of the next cache."""
    position: Tensor
    """(B, T) int64 on the CPU: position in the document of every valid token; in the call, where a
    row restarts."""
    is_whole: bool
    """Whether every token is valid."""
    columns: Tensor | None
    """(B, num_kept) int64: which of the S keys are kept; None is the last."""
    at_start: Tensor
    """(B,) bool on the tokens' device: rows whose first token is their document's first, or is read
    as if it were."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        state: ModelState,
        tokens: Tensor,
        valid: Tensor | None,
        *,
        restart: Tensor | None = None,
        may_wait: bool = False,
    ) -> Layout:
        """Work out the geometry of a call, and refuse one that breaks the memory's clock.

        `restart` (B,) bool on the CPU: rows that see nothing of before this call. `may_wait`: the
        entries of earlier segments may be uncommitted.

        Raises:
            ConfigError: no token at all, or a mask with padding before a token.
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
        is_whole = bool((num_new == num_tokens).all())
        num_kept = int(_count_context(config, state.position + num_new).max())
        num_kept = min(num_cached + num_tokens, num_kept)
        columns = None
        if not is_whole:
            last = num_cached + num_new.view(-1, 1) - num_kept + torch.arange(num_kept)
            columns = send(last.clamp(min=0), tokens.device)
        position = state.position if restart is None else state.position.masked_fill(restart, 0)
        hidden = num_cached - _count_context(config, position).clamp(max=num_cached)
        return cls(
            tuple(hidden.tolist()),
            mask,
            num_new,
            num_kept,
            position.unsqueeze(1) + torch.arange(num_tokens),
            is_whole,
            columns,
            send(position == 0, tokens.device),
        )

    def keep(self, keys: Tensor) -> Tensor:
        """The columns of (B, H, S, D) that the next call needs, detached."""
        keys = keys.detach()
        if self.columns is None:
            kept = keys[:, :, keys.shape[2] - self.num_kept :]
            # A view keeps all S columns in memory: copy it where that would be twice as many.
            return kept.clone() if 2 * self.num_kept <= keys.shape[2] else kept
        num_heads, head_dim = keys.shape[1], keys.shape[3]
        return keys.gather(2, self.columns[:, None, :, None].expand(-1, num_heads, -1, head_dim))


def _check_valid(valid: Tensor, tokens: Tensor) -> Tensor:
    """The mask itself, if it is one: padding stands on the right of a row's tokens."""
    if valid.dtype != torch.bool or valid.shape != tokens.shape:
        raise ConfigError(
            f"valid is {tuple(valid.shape)} {valid.dtype}; it must be bool and as large as tokens, "
            f"{tuple(tokens.shape)}"
        )
    padded = (valid[:, 1:] & ~valid[:, :-1]).any(1)
    if bool(padded.any()):
        raise ConfigError(
            f"row {int(padded.nonzero()[0])} of valid has padding before a token; let the tokens "
            "of every row begin in column 0, and pad on the right"
        )
    return valid


def _count_context(config: ModelConfig, position: Tensor) -> Tensor:
    """How many tokens before `position` local attention may need: at most the window."""
    context = position if config.xl_cache else position % config.segment_len
    return context.clamp(max=config.window)


@dataclass(frozen=True)
class Exposed:
    """Entries of earlier segments of this step, which are not in the memory yet."""

    keys: Tensor
    """(B, H, n, D), with gradient."""
    values: Tensor
    valid: Tensor
    """(B, n) bool on the CPU: entries that are not padding."""
    num_rows: int = 1
    """Rows whose entries each row sees: its own, and of the `num_rows` - 1 rows after it."""

    def __post_init__(self) -> None:
        """Refuse more rows than there are."""
        assert 1 <= self.num_rows <= self.keys.shape[0]


def join_exposed(parts: Sequence[Exposed], num_rows: int) -> Exposed:
    """The entries of several segments, oldest first, seen from `num_rows` rows."""
    return Exposed(
        torch.cat([part.keys for part in parts], 2),
        torch.cat([part.values for part in parts], 2),
        torch.cat([part.valid for part in parts], 1),
        num_rows,
    )


def attend_to_exposed(
    queries: Tensor, exposed: Exposed, num_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T) V over all exposed entries of a row and of the rows after it.

    Args:
        queries: (B, H, T, D), scaled.
        exposed: what is seen; each row has one valid entry at least.
        num_hidden: (B, T) on the CPU: how many of the newest *own* entries a query must not see.

    Returns:
        (B, H, T, D), and the log-sum-exp of the scores (B, H, T). Gradients flow into everything.
    """
    shifts = range(exposed.num_rows)
    keys, values = (
        torch.cat([part.roll(-shift, 0) for shift in shifts], 2)
        for part in (exposed.keys, exposed.values)
    )
    num_own = exposed.keys.shape[2]
    device = queries.device
    seen = send(torch.cat([exposed.valid.roll(-shift, 0) for shift in shifts], 1), device)
    mask = seen[:, None, None, :].expand(-1, 1, queries.shape[2], -1)
    if num_hidden is not None:
        # 1 is the newest; padding is as old as what follows it, and masked already.
        age = exposed.valid.flip(1).cumsum(1).flip(1).unsqueeze(1)
        own = send(age > num_hidden.unsqueeze(-1), device)
        mask = torch.cat([mask[..., :num_own] & own.unsqueeze(1), mask[..., num_own:]], -1)
    scores = torch.matmul(queries, keys.transpose(-1, -2))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    # Finite, so that a query that sees nothing has no NaN; its log-sum-exp is -inf nearly.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1).to(values.dtype)
    return torch.matmul(weights, values), torch.logsumexp(scores, -1)
