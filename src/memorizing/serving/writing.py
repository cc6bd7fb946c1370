"""From a request to text: the prompt, what is generated, what was read on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers.generation.streamers import BaseStreamer

from memorizing.errors import MemorizingError
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.huggingface.generating import choose_padding, choose_sampling, forget_sampling
from memorizing.huggingface.sessions.sources import Sources
from memorizing.huggingface.sessions.texts import encode_chat, encode_text
from memorizing.serving.line import Job, OutOfTime
from memorizing.serving.memories import Memories
from memorizing.serving.requests import Ask, RequestError

STARTED = object()
"""What a job tells when its request is right, before the first text."""


@dataclass(frozen=True)
class Written:
    """What a request came to, besides the text that was told on the way."""

    finish_reason: str
    """`stop` at the model's end of a text or a string to stop at, `length` at a limit."""
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    """From the beginning of the job."""
    seconds: float
    sources: list[dict[str, Any]] | None
    """What was retrieved; None without a memory."""


_LEAST_TEMPERATURE = 0.01
"""Below it scores would be divided by next to nothing, and the likeliest token is left."""


_MOST_SOURCES = 16
"""Passages come and go while an answer is written."""


class _Stop(Exception):
    """A string to stop at was written."""


class Writer:
    """Answers requests with one model, in the thread that runs it."""

    def __init__(self, memories: Memories, most_prompt_tokens: int, most_new_tokens: int) -> None:
        """Take a model with its memories; its own settings of sampling are left out from now on."""
        self._memories = memories
        self._model, self._tokenizer = memories.model, memories.tokenizer
        self._most_prompt_tokens, self._most_new_tokens = most_prompt_tokens, most_new_tokens
        self._job: Job | None = None
        forget_sampling(self._model)
        # A long prompt is read in pieces, between which nothing else could end it.
        self._model.register_forward_pre_hook(self._check)

    def _check(self, *_: Any) -> None:
        if self._job is not None:
            self._job.check()

    @property
    def can_chat(self) -> bool:
        """Whether the model was taught to."""
        return bool(self._tokenizer.chat_template)

    def write(self, job: Job, ask: Ask, memory: str | None) -> None:
        """Tell the text of an answer piece by piece, then a `Written`.

        Raises:
            RequestError: before anything was told.
            GivenUp: nobody waits any more.
        """
        session = None if memory is None else self._memories.find(memory)
        ids = self._encode(ask)
        attachment = get_attachment(self._model)
        most = self._most_new_tokens
        room = self._most_prompt_tokens
        if session is None:
            # Without a memory the model is itself, and goes as far as its positions.
            room = min(room, attachment.max_window - 1)
            most = min(most, attachment.max_window - len(ids))
        if len(ids) > room:
            raise RequestError(
                400,
                f"the prompt has {len(ids):,} tokens, and may have {room:,}; send a shorter one",
                code="context_length_exceeded",
                param="messages" if ask.is_chat else "prompt",
            )
        job.tell(STARTED)
        text = TextOfTokens(self._tokenizer, ask.stop, job.tell)
        streamer = _Streamer(text, job, self._list_ends())
        found: Sources | None = None
        is_cut = False
        with ExitStack() as stack:
            if session is None:
                stack.enter_context(attachment.change_mode(is_plain=True))
            else:
                stack.enter_context(session.use())
                found = stack.enter_context(session.record())
            self._job = job
            try:
                self._generate(ask, ids, min(most, ask.max_new_tokens or most), streamer)
            except OutOfTime:
                is_cut = True
            except _Stop:
                pass
            finally:
                self._job = None
        text.end()
        now_s = time.monotonic()
        ended = text.is_stopped or (not is_cut and streamer.is_at_end)
        assert job.started_s is not None
        job.tell(
            Written(
                finish_reason="stop" if ended else "length",
                prompt_tokens=len(ids),
                new_tokens=streamer.num_tokens,
                first_token_s=(streamer.first_s or now_s) - job.started_s,
                seconds=now_s - job.started_s,
                sources=None if found is None else list_sources(found),
            )
        )

    def _encode(self, ask: Ask) -> Any:
        """Token ids (n,) of what is asked; what is spelled like a special token is text.

        Raises:
            RequestError: no tokens, or a chat that the model's template refuses.
        """
        if isinstance(ask.prompt, str):
            ids = encode_text(self._tokenizer, ask.prompt, is_whole=True)
        elif not self.can_chat:
            raise RequestError(
                400,
                "this model has no template of chats: it was not taught to answer; send a text to "
                "go on from to /v1/completions",
                param="messages",
            )
        else:
            try:
                ids = encode_chat(self._tokenizer, ask.prompt)
            except jinja2.TemplateError as error:
                raise RequestError(
                    400, f"the model's template of chats refuses this: {error}", param="messages"
                ) from error
        if not len(ids):
            raise RequestError(400, "the prompt has no tokens; send a longer one", param="prompt")
        return ids

    def _generate(self, ask: Ask, ids: Any, max_new_tokens: int, streamer: Any) -> None:
        tokens = torch.from_numpy(ids).long().unsqueeze(0).to(self._model.device)
        is_sampled = ask.temperature >= _LEAST_TEMPERATURE and ask.top_p > 0
        settings = (ask.temperature, ask.top_p) if is_sampled else (0.0, 1.0)
        torch.manual_seed(ask.seed) if ask.seed is not None else torch.seed()
        try:
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                pad_token_id=choose_padding(self._tokenizer, self._model.generation_config),
                streamer=streamer,
                **choose_sampling(*settings),
            )
        except MemorizingError as error:
            raise RequestError(503, f"the model or its memory failed: {error}") from error

    def _list_ends(self) -> list[int]:
        ends = self._model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]


class _Streamer(BaseStreamer):
    """Takes the tokens of `generate`, which gives it the prompt first."""

    def __init__(self, text: TextOfTokens, job: Job, ends: list[int]) -> None:
        self._text, self._job, self._ends = text, job, ends
        self._is_prompt = True
        self.num_tokens, self.first_s, self.is_at_end = 0, None, False

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._job.check()
        self.first_s = self.first_s or time.monotonic()
        self.num_tokens += 1
        token = int(value.flatten()[0])
        self.is_at_end = token in self._ends
        if not self.is_at_end:
            self._text.add(token)
        if self._text.is_stopped:
            raise _Stop

    def end(self) -> None:
        """The rest is told by `TextOfTokens.end`, also where a limit ends it."""


class TextOfTokens:
    """Text that is told as its tokens come: whole characters, and nothing of what it stops at."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], tell: Callable[[str], Any]) -> None:
        """Nothing yet.

        Args:
            tokenizer: of the tokens.
            stops: the text ends before the first of these.
            tell: called with every piece.
        """
        self._tokenizer, self._stops, self._tell = tokenizer, stops, tell
        self._ids: list[int] = []
        self._first, self._num_told = 0, 0
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> None:
        """Take the next token, and tell what is sure by now."""
        self._ids.append(token)
        new = self._decode()
        # Some bytes of a character are no text yet.
        if new and not new.endswith("\N{REPLACEMENT CHARACTER}"):
            self._first, self._num_told = self._num_told, len(self._ids)
            self._hold(new)

    def _decode(self) -> str:
        """What the tokens that were not told add to those before, whose spacing they follow."""
        before = self._ids[self._first : self._num_told]
        every = self._ids[self._first :]
        told, text = (
            self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, every)
        )
        return text[len(told) :]

    def _hold(self, new: str) -> None:
        """Tell all but an end that may be the beginning of a string to stop at."""
        text = self._held + new
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.is_stopped = bool(places)
        if places:
            text, self._held = text[: min(places)], ""
        else:
            count = max((_count_shared(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - count], text[len(text) - count :]
        if text:
            self._tell(text)

    def end(self) -> None:
        """Tell what was held back."""
        if self.is_stopped:
            return
        rest = self._decode()
        if rest:
            self._hold(rest)
        if self._held and not self.is_stopped:
            self._tell(self._held)


def _count_shared(text: str, stop: str) -> int:
    """The longest end of a text that a string begins with."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)


def list_sources(found: Sources) -> list[dict[str, Any]]:
    """Passages that were in sight, or places that were retrieved, the heaviest first.

    As `memorizing generate --json` has them; `lines` are the first and the last, or None where they
    are not known, and a document None is what the request itself has behind its window.
    """
    sources = sorted(found.passages or found.find_places(), key=lambda one: -one.weight)
    return [
        {
            "document": one.document,
            "lines": None if one.first_line is None else [one.first_line, one.last_line],
            "weight": one.weight,
            "text": one.text,
        }
        for one in sources[:_MOST_SOURCES]
    ]
