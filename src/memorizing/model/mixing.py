"""Queries and keys that know the tokens before them, so that one layer can find what followed.

To retrieve what came after an earlier occurrence of the present token, a key must tell which token
precedes it, which otherwise takes another layer to learn. Two ways, both before normalization:

- smeared keys (Olsson et al. 2022): k_t := s k_t + (1 - s) k_(t-1), one learned share per head;
- a short convolution (So et al. 2021, Primer): q_t := sum_j c_j * q_(t-j) over the last tokens, one
  learned coefficient per tap, head and channel; keys likewise, with coefficients of their own.

Shapes: B rows, H heads, T tokens, P tokens before them, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memorizing.devices import send
from memorizing.model.layout import Layout

_INDUCTION_SHARE = 0.12
"""An induction head's key is mostly that of the token before; so much is of its own."""


class ShortConvolution(nn.Module):
    """x_t := sum over j < length of c_j * x_(t-j); what is before a document counts as 0."""

    def __init__(self, length: int, num_heads: int, head_dim: int, shares: tuple[float, ...]):
        """Start with the coefficients `shares` for the first taps, in all channels."""
        super().__init__()
        coefficients = torch.zeros(length, num_heads, head_dim)
        for tap, share in enumerate(shares):
            coefficients[tap] = share
        self.coefficients = nn.Parameter(coefficients)

    def forward(self, extended: Tensor) -> Tensor:
        """Convolve (B, H, length - 1 + T, D), which begins with the tokens before: (B, H, T, D)."""
        taps = self.coefficients.to(extended.dtype).unsqueeze(2)
        num_tokens = extended.shape[2] - len(taps) + 1
        first = len(taps) - 1
        mixed = extended[:, :, first:] * taps[0]
        for tap in range(1, len(taps)):
            mixed = torch.addcmul(
                mixed, extended[:, :, first - tap : first - tap + num_tokens], taps[tap]
            )
        return mixed


def start_as_induction(queries: ShortConvolution, keys: ShortConvolution) -> None:
    """Let every channel compare a token before the query with the one before that of the key.

    Half of the channels look at the query's own token, the rest at the tokens before it in equal
    parts; keys look one token further back: an entry is found whose *preceding* tokens are like the
    query's last ones, the more of them the nearer. In place.
    """
    length, _, head_dim = queries.coefficients.shape
    num_offsets = length - 1
    share = torch.arange(head_dim) / head_dim
    offset = ((share * 2 - 1) * (num_offsets - 1)).floor().long() + 1
    offset = torch.where(share < 0.5, 0, offset).clamp(0, num_offsets - 1)
    channels = torch.arange(head_dim)
    with torch.no_grad():
        queries.coefficients.zero_()
        queries.coefficients[offset, :, channels] = 1.0
        keys.coefficients.zero_()
        keys.coefficients[0] = _INDUCTION_SHARE
        keys.coefficients[offset + 1, :, channels] = 1.0 - _INDUCTION_SHARE


def smear(extended: Tensor, share: Tensor, layout: Layout) -> Tensor:
    """k_t := s k_t + (1 - s) k_(t-1); the first key of a document stays as it is.

    Args:
        extended: keys with the one before them (B, H, 1 + T, D), as `extend_back` gives them.
        share: s (H,).
        layout: of the call.
    """
    previous, keys = extended[:, :, :-1], extended[:, :, 1:]
    is_first = layout.at_start.view(-1, 1, 1, 1)
    previous = torch.cat(
        [torch.where(is_first, keys[:, :, :1], previous[:, :, :1]), previous[:, :, 1:]], 2
    )
    return torch.lerp(previous, keys, share.to(keys.dtype).view(-1, 1, 1))


def extend_back(x: Tensor, recent: Tensor, layout: Layout) -> Tensor:
    """(B, H, P + T, D): x with the P tokens before it in front.

    What is before the beginning of a document is 0.

    Args:
        x: (B, H, T, D).
        recent: (B, H, P, D), the last tokens of the calls before.
        layout: of the call.
    """
    return torch.cat([recent.masked_fill(layout.at_start.view(-1, 1, 1, 1), 0.0), x], 2)


def keep_recent(extended: Tensor, num_before: int, layout: Layout) -> Tensor:
    """The last P valid tokens (B, H, P, D) of what `extend_back` gave, detached."""
    extended = extended.detach()
    if layout.is_whole:
        return extended[:, :, extended.shape[2] - num_before :].clone()
    places = send(layout.num_new.view(-1, 1) + torch.arange(num_before), extended.device)
    num_heads, head_dim = extended.shape[1], extended.shape[3]
    return extended.gather(2, places[:, None, :, None].expand(-1, num_heads, -1, head_dim))
