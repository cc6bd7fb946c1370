"""Performer (Choromanski et al. 2021, arXiv 2009.14794): softmax's kernel by random features.

With x = sqrt(s) times a normalized query or key, s the learned scale of the scores, and m random
directions w_i, positive features estimate without bias (FAVOR+)

    exp(s q.k) = E[phi(q).phi(k)],  phi(x)_i = exp(w_i.x - |x|^2 / 2) / sqrt(m)

so that attention to all tokens before a query is two sums over them, whatever their number:

    V_t = phi(q_t)^T S_t / phi(q_t)^T z_t
    S_t = sum over j <= t of phi(k_j) v_j^T,  z_t = sum over j <= t of phi(k_j)

The directions are orthogonal in blocks of D (the paper's section 2.3), with the norms of Gaussian
vectors, the same in all layers, fixed by a seed and saved with the weights. S and z go from call to
call without gradient, in fp32. Features are exponentials that bf16 would spoil: they are computed
in fp32, and multiplied in the dtype of the model; their sums have no cancellation. A query's
features are divided by the largest, which leaves V_t as it is; a key's are at most
exp(|w_i|^2 / 2), far from overflow. Within a call tokens go in chunks: a query sees the sums of the
chunks before it and, by products under a causal mask, the tokens of its own.

Two attentions: `Performer` sees all tokens in this way, the query's own too, without any position
bias; `PerformerBeyond` sees the window exactly, as the model does, and in one softmax with it the
tokens before the window, j <= t - W, by their features and with a learned bias per head.

**Deviations**: queries and keys are normalized, as all of this model (`docs/log.md` has what that
and positions gave); features are not drawn again while training.

Shapes: B rows, H heads, T tokens of a call, W tokens of the window, N chunks of c, m features,
D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attentions.slots import attend_window, join_far, make_far_bias
from memorizing.config import ModelConfig
from memorizing.memory import Entries
from memorizing.model.block import AttentionLayer, AttentionResult, Reading
from memorizing.model.layout import Layout
from memorizing.model.mixing import keep_recent

_CHUNK_LEN = 64
_LEAST = 1e-30
"""A sum of features is not divided by less."""


def draw_directions(num_heads: int, num_features: int, dim: int, seed: int) -> Tensor:
    """(H, m, D) fp32: orthogonal in blocks of D, with the norms of Gaussian vectors."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-num_features // dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    bases, triangles = torch.linalg.qr(draw(num_heads, num_blocks, dim, dim))
    # Without the signs the bases are not uniform, and the estimate is biased (Mezzadri 2007).
    signs = triangles.diagonal(dim1=-2, dim2=-1).sign()
    bases = (bases * signs.unsqueeze(-2)).flatten(1, 2)
    norms = draw(num_heads, num_features, dim).norm(dim=-1, keepdim=True)
    return bases[:, :num_features] * norms


def compute_features(
    x: Tensor, directions: Tensor, scale: Tensor, *, is_query: bool
) -> tuple[Tensor, Tensor]:
    """Phi of normalized x (B, H, T, D): (B, H, T, m) in fp32, and what was divided out of it.

    Args:
        x: queries or keys.
        directions: (H, m, D).
        scale: s (H,), above 0.
        is_query: then the largest feature of every token is 1, and the second result the logarithm
            (B, H, T) of the factor; otherwise that is 0.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    s = scale.to(wide).view(-1, 1, 1)
    exponents = torch.matmul(x.to(wide) * s.sqrt(), directions.to(wide).transpose(-1, -2))
    exponents = exponents - s / 2
    if not is_query:
        return torch.exp(exponents) / directions.shape[1] ** 0.5, exponents.new_zeros(())
    largest = exponents.detach().amax(-1, keepdim=True)
    return torch.exp(exponents - largest) / directions.shape[1] ** 0.5, largest.squeeze(-1)


def sum_causally(
    queries: Tensor, keys: Tensor, values: Tensor, total: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each query sees of the keys up to its own place, and of what is summed already.

    Args:
        queries: phi(q) (B, H, T, m) fp32.
        keys: phi(k) (B, H, T, m) fp32, 0 where there is none.
        values: (B, H, T, D); products are in its dtype.
        total: S (B, H, m, D) fp32, of the tokens before.
        weight: z (B, H, m) fp32.

    Returns:
        phi(q)^T S (B, H, T, D) and phi(q)^T z (B, H, T), both fp32; the next S and z.
    """
    num_tokens, dtype = queries.shape[2], values.dtype
    chunk_len = min(_CHUNK_LEN, num_tokens)
    missing = -num_tokens % chunk_len
    # (B, H, N, c, .)
    q, k, v = (
        pad(part.to(dtype), (0, 0, 0, missing)).unflatten(2, (-1, chunk_len))
        for part in (queries, keys, values)
    )
    of_chunk = torch.matmul(k.transpose(-1, -2), v).to(total.dtype)
    weight_of_chunk = k.sum(3, dtype=weight.dtype)
    # Including a chunk, and before it.
    totals, weights = (
        part.cumsum(2) + start.unsqueeze(2)
        for part, start in ((of_chunk, total), (weight_of_chunk, weight))
    )
    before, weight_before = totals - of_chunk, weights - weight_of_chunk
    near = torch.matmul(q, k.transpose(-1, -2)).tril()
    sums = torch.matmul(q, before.to(dtype)).to(total.dtype) + torch.matmul(near, v)
    norms = torch.matmul(q, weight_before.to(dtype).unsqueeze(-1)).squeeze(-1)
    norms = norms.to(total.dtype) + near.sum(-1, dtype=total.dtype)
    return (
        sums.flatten(2, 3)[:, :, :num_tokens],
        norms.flatten(2, 3)[:, :, :num_tokens],
        totals[:, :, -1].detach(),
        weights[:, :, -1].detach(),
    )


class _WithFeatures(AttentionLayer):
    """An attention with directions of random features."""

    directions: Tensor

    def __init__(
        self, config: ModelConfig, has_memory: bool, num_features: int = 128, seed: int = 0
    ) -> None:
        """Draw m directions, a multiple of head_dim."""
        super().__init__(config, has_memory)
        assert self.scale is not None
        assert num_features % config.head_dim == 0
        self.register_buffer(
            "directions", draw_directions(config.num_heads, num_features, config.head_dim, seed)
        )


class Performer(_WithFeatures):
    """Attention to all tokens of the document by random features."""

    def __init__(
        self, config: ModelConfig, has_memory: bool, num_features: int = 128, seed: int = 0
    ) -> None:
        """Draw m directions, a multiple of head_dim."""
        super().__init__(config, has_memory, num_features, seed)
        self.position_bias.table.requires_grad_(False)  # of no use here

    def init_cache(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> Entries:
        """S and z of no token, in fp32, and no keys and values."""
        return _make_cache(self.directions, num_rows, 0, dtype, device)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: Entries,
        recent: Tensor | None,
        reading: Reading | None,
    ) -> AttentionResult:
        """See `AttentionLayer`."""
        assert reading is None
        assert self.scale is not None
        new = self.project(x, layout, recent)
        scale = self.scale.abs()
        queries, _ = compute_features(new.queries, self.directions, scale, is_query=True)
        keys, _ = compute_features(new.keys, self.directions, scale, is_query=False)
        if not layout.is_whole:
            keys = keys * layout.valid.to(x.device)[:, None, :, None]
        sums, norms, *kept = sum_causally(queries, keys, new.values, *_read_sums(cache, layout))
        attended = (sums / norms.clamp(min=_LEAST).unsqueeze(-1)).to(x.dtype)
        output = self.project_output(attended)
        cache = Entries(_pack_sums(*kept), cache.values)
        return AttentionResult(output, cache, None, new.recent, None, None)


class PerformerBeyond(_WithFeatures):
    """Exact attention to the window, and by random features to all tokens before it."""

    def __init__(
        self, config: ModelConfig, has_memory: bool, num_features: int = 128, seed: int = 0
    ) -> None:
        """Draw m directions, a multiple of head_dim."""
        super().__init__(config, has_memory, num_features, seed)
        self.far_bias = make_far_bias(config.num_heads)

    def init_cache(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> Entries:
        """S and z of no token, in fp32, and W keys and values."""
        return _make_cache(self.directions, num_rows, self.config.window, dtype, device)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        cache: Entries,
        recent: Tensor | None,
        reading: Reading | None,
    ) -> AttentionResult:
        """See `AttentionLayer`."""
        assert reading is None
        assert self.scale is not None
        new, window, num_tokens = self.project(x, layout, recent), self.config.window, x.shape[1]
        old_keys, old_values = cache.values.chunk(2, 2)
        keys = torch.cat([old_keys, new.keys], 2)
        values = torch.cat([old_values, new.values], 2)
        attended, log_sum = attend_window(self, new, keys, values, layout)
        # As token i comes, column i leaves the window.
        leaves = layout.valid & (layout.position >= window)
        scale = self.scale.abs()
        queries, log_factor = compute_features(new.queries, self.directions, scale, is_query=True)
        far_keys, _ = compute_features(
            keys[:, :, :num_tokens].detach(), self.directions, scale, is_query=False
        )
        far_keys = far_keys * leaves.to(x.device)[:, None, :, None]
        far_values = values[:, :, :num_tokens].detach()
        before = _read_sums(cache, layout)
        sums, norms, *kept = sum_causally(queries, far_keys, far_values, *before)
        norms = norms.clamp(min=_LEAST)
        far = (sums / norms.unsqueeze(-1)).to(x.dtype)
        is_beyond = layout.position >= window
        attended = join_far(
            (attended, log_sum), (far, norms.log() + log_factor), self.far_bias, is_beyond
        )
        raw = torch.cat([keep_recent(part, window, layout) for part in (keys, values)], 2)
        cache = Entries(_pack_sums(*kept), raw)
        output = self.project_output(attended)
        return AttentionResult(output, cache, None, new.recent, None, None)


def _make_cache(
    directions: Tensor, num_rows: int, num_kept: int, dtype: torch.dtype, device: torch.device
) -> Entries:
    """Of no token: S and z in fp32 as keys, and so many keys, then values, as values."""
    num_heads, num_features, dim = directions.shape
    wide = torch.promote_types(dtype, torch.float32)
    shapes = ((num_features + num_features // dim, wide), (2 * num_kept, dtype))
    return Entries(
        *(torch.zeros((num_rows, num_heads, n, dim), dtype=d, device=device) for n, d in shapes)
    )


def _pack_sums(total: Tensor, weight: Tensor) -> Tensor:
    """S (B, H, m, D), and z in m / D lines behind it."""
    return torch.cat([total, weight.unflatten(-1, (-1, total.shape[-1]))], 2)


def _read_sums(cache: Entries, layout: Layout) -> tuple[Tensor, Tensor]:
    """S and z; 0 in rows that begin a document."""
    packed = cache.keys.masked_fill(layout.at_start.view(-1, 1, 1, 1), 0.0)
    dim = packed.shape[-1]
    num_features = packed.shape[2] * dim // (dim + 1)
    return packed[:, :, :num_features], packed[:, :, num_features:].flatten(2)
