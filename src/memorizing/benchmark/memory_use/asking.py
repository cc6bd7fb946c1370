"""One prompt in one arm: what the model makes of the true answer, what it writes, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from memorizing.benchmark.memory_use.call_sites import cut_at_close
from memorizing.benchmark.memory_use.places import Place, Source
from memorizing.benchmark.memory_use.readers import Begun, Reader, copy_begun
from memorizing.benchmark.memory_use.retrievers import Found
from memorizing.loss import compute_token_nats

MOST_RANKS = 8
"""Passages among which the right place is looked for."""
NEAR = 32
"""Tokens that a passage may end before, or begin after, the right place."""
PIECE = 32
"""Tokens of an answer that are read in one call: a memory finds passages anew at the beginning of
each, which is as often as it does where it writes."""
NUM_TIMED = 3
"""Prompts of an arm after which tokens are timed."""
_TIMED_TOKENS = 32


@dataclass(frozen=True)
class Asked:
    """What came of a place in an arm."""

    place: int
    """Its number."""
    num_right: int
    """Tokens of the true answer that greedy decoding writes before its first error."""
    num_tokens: int
    """Of the true answer."""
    nats: float
    """Of the true answer, summed."""
    num_given: int
    found: tuple[Found, ...]
    """The passages that were given, best first."""
    first_s: float
    """From the prompt to the first token of the answer, what is found for it included."""
    rank: int | None
    """Which of the best passages is the first at the right place, from 1; 0 is none of them; None
    where none are found or looked at."""
    score: float | None
    """Of the best passage."""
    is_in_sight: bool | None
    """The whole answer stands in what was given; None where no passages are found."""
    token_s: float | None
    """Per token that is written, where it was timed."""
    written: str | None = None
    """What greedy decoding writes, where that is asked: of a call up to the closing parenthesis,
    of a quote as many tokens as the true answer has."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.inference_mode()
def ask(
    reader: Reader,
    number: int,
    place: Place,
    *,
    is_timed: bool = False,
    is_ranked: bool = False,
    tokenizer: Any = None,
    is_call: bool = False,
) -> Asked:
    """Read a prompt, then its true answer, as if the model wrote that.

    Args:
        reader: of the arm.
        number: of the place.
        place: the prompt and its answer.
        is_timed: then also write some tokens, and time them.
        is_ranked: also look for the right place among the best passages.
        tokenizer: given, the answer is also written freely.
        is_call: the answer is the arguments of a call.
    """
    start = time.perf_counter()
    begun = reader.begin(place)
    likeliest = int(begun.logits[0, -1].argmax())  # waits for an accelerator too
    first_s = time.perf_counter() - start + begun.shared_s
    written = None
    if tokenizer is not None:
        limit = max(PIECE, 2 * len(place.answer)) if is_call else len(place.answer)
        cut = cut_at_close if is_call else None
        written = _write(reader, copy_begun(begun), likeliest, limit, tokenizer, cut)
    best = reader.find(place, MOST_RANKS) if is_ranked else None
    shown = best or begun.found
    logits, known = [begun.logits], place.answer[:-1]
    for first in range(0, len(known), PIECE):
        logits.append(reader.go_on(begun, known[first : first + PIECE]))
    joined = torch.cat(logits, 1)
    answer = torch.tensor([place.answer], device=joined.device)
    return Asked(
        place=number,
        num_right=int((joined.argmax(-1) == answer)[0].long().cumprod(0).sum()),
        num_tokens=len(place.answer),
        nats=float(compute_token_nats(joined, answer).sum()),
        num_given=begun.num_given,
        found=begun.found,
        first_s=first_s,
        rank=None if best is None else find_rank(best, place.sources[0]),
        score=shown[0].score if shown else None,
        is_in_sight=None if best is None else is_in_sight(begun.found, place),
        token_s=_time_tokens(reader, begun, place.answer[-1]) if is_timed else None,
        written=written,
    )


def find_rank(found: Sequence[Found], source: Source) -> int:
    """The number, from 1, of the first passage that holds a place or ends or begins near it.

    0 where none does.
    """
    for number, one in enumerate(found, 1):
        is_near = one.start - NEAR <= source.token < one.end + NEAR
        if one.document == source.document and is_near:
            return number
    return 0


def is_in_sight(found: Sequence[Found], place: Place) -> bool:
    """Whether one passage has the whole answer."""
    source = place.sources[0]
    return any(
        one.document == source.document
        and one.start <= source.token
        and source.token + len(place.answer) <= one.end
        for one in found
    )


def _write(
    reader: Reader,
    begun: Begun,
    token: int,
    limit: int,
    tokenizer: Any,
    cut: Callable[[str], str | None] | None,
) -> str:
    """What greedy decoding writes from a token on, until `cut` gives something. In place."""
    tokens = [token]
    while True:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        closed = None if cut is None else cut(text)
        if closed is not None or len(tokens) >= limit or tokens[-1] == tokenizer.eos_token_id:
            return text if closed is None else closed
        tokens.append(int(reader.go_on(begun, tokens[-1:])[0, -1].argmax()))


def _time_tokens(reader: Reader, begun: Begun, token: int) -> float:
    """Seconds per token that is written after one that was not read yet. In place."""
    start = time.perf_counter()
    for _ in range(_TIMED_TOKENS):
        token = int(reader.go_on(begun, [token])[0, -1].argmax())
    return (time.perf_counter() - start) / _TIMED_TOKENS
