r"""Tasks of lm-evaluation-harness with memory on and off.

    python -m memorizing.huggingface.lm_eval --model memorizing --tasks wikitext \
        --model_args pretrained=runs/smollm2,layers=20,window=512,memory=True

is the command line of `lm_eval` with one model more; in Python, importing this module registers it.
lm-eval reads rolling windows of different documents in one batch and cuts what is longer than the
model's context; here each document is read alone, in order, with a memory of its own, to its end.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memorizing.errors import ConfigError, IndexUnavailableError
from memorizing.huggingface.attaching.attachment import (
    add_memory,
    find_attachment,
    get_attachment,
    unwrap,
)
from memorizing.huggingface.attaching.memory_settings import MemorySettings
from memorizing.huggingface.learning.adapter import load_adapter
from memorizing.huggingface.sessions.scoring import read_memory, score_texts
from memorizing.huggingface.sessions.texts import encode_text
from memorizing.model import evaluation_mode
from memorizing.settings import read_hints

_UNLIMITED = 1 << 30
"""Tokens: nothing is cut."""


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise IndexUnavailableError(
            "tasks of lm-eval need lm-eval, which is not installed (or cannot be imported: "
            f'{error}); pip install "memorizing[eval]"'
        ) from error


_HFLM: Any = _import("lm_eval.models.huggingface").HFLM
_register: Any = _import("lm_eval.api.registry").register_model


@_register("memorizing")
class MemorizingLM(_HFLM):
    """`HFLM` whose model reads a memory.

    Requests do not depend on one another or on their order: each has an empty memory. A context
    that several requests share is read once. `batch_size` matters for generation only.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        memory: bool = True,
        layers: Any = None,
        window: int = 512,
        adapter: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        **arguments: Any,
    ) -> None:
        """Load a model and give it a memory.

        Args:
            pretrained: folder, name on the hub, or a model, which may have a memory already.
            memory: whether it is read; without it, the model sees its window.
            layers: that read it: a number, several with colons between, or a list.
            window: tokens of local attention.
            adapter: folder that `save_adapter` or `memorizing finetune` wrote; it has its own
                layers and window.
            max_length: tokens of a question and its answer; longer questions lose their
                beginning. None cuts none. Documents of rolling tasks are read whole always.
            batch_size: rows that are generated side by side.
            arguments: `capacity` and other settings of `MemorySettings`; what is not one of them,
                `HFLM` gets.

        Raises:
            ConfigError: settings that cannot work.
        """
        if arguments.pop("trust_remote_code", False):
            raise ConfigError("trust_remote_code is set; code that comes with a model is never run")
        if str(batch_size).startswith("auto"):
            raise ConfigError(f"batch_size is {batch_size!r}; give a number: rows to generate")
        own = {name: arguments.pop(name) for name in _SETTINGS & arguments.keys()}
        super().__init__(
            pretrained,
            max_length=max_length or _UNLIMITED,
            batch_size=batch_size,
            trust_remote_code=False,
            **arguments,
        )
        self._is_templated = False
        self._inner = unwrap(self.model)
        if adapter is not None:
            if layers is not None:
                raise ConfigError("adapter and layers are given; an adapter has its own layers")
            load_adapter(self._inner, Path(adapter), **own)
        elif find_attachment(self._inner) is None:
            add_memory(self._inner, parse_layers(layers), window=window, **own)
        elif layers is not None or own:
            raise ConfigError("the model has a memory already; leave out layers and settings")
        self.has_memory = memory
        self._attachment = get_attachment(self._inner)

    @contextmanager
    def _read(self) -> Iterator[None]:
        capacity = None if self.has_memory else 0
        with evaluation_mode(self._inner), read_memory(self._attachment, capacity):
            yield

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """A conversation as text, in which the template's special tokens are tokens."""
        self._is_templated = True
        return super().apply_chat_template(*args, **kwargs)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """As `HFLM`, but that what is spelled like a special token in a text is text."""
        if self._is_templated:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        is_whole = self.add_bos_token if add_special_tokens is None else add_special_tokens
        tokens = encode_text(self.tokenizer, string, is_whole=is_whole is not False).tolist()
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> Any:
        """See `tok_encode`."""
        before = self.tokenizer.split_special_tokens
        self.tokenizer.split_special_tokens = before or not self._is_templated
        try:
            return super().tok_batch_encode(*args, **kwargs)
        finally:
            self.tokenizer.split_special_tokens = before

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As `HFLM`; an answer that is all in the question's last token has tokens of its own."""
        tokens, following = super()._encode_pair(context, continuation)
        if not following:
            following = self.tok_encode(continuation, add_special_tokens=False)
        return tokens, following

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole documents, each read in order with a memory of its own."""
        found = []
        for request in requests:
            (string,) = request.args
            tokens = np.array(self.tok_encode(string), dtype=np.int64)
            (nats,) = score_texts(
                self._inner,
                [tokens],
                self.prefix_token_id,
                capacity=None if self.has_memory else 0,
            )
            found.append(-float(nats.sum(dtype=np.float64)))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), found[-1])
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, each after its context, and whether greedy says so."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        # An answer must not find passages for its own first tokens.
        with self._read(), self._attachment.change_mode(looks_ahead=False):
            for indices in by_context.values():
                # Whole segments that all of them begin with are read once.
                cut = [_cut(requests[i][1], requests[i][2], self.max_length) for i in indices]
                start = self._read_shared(cut)
                for index, context in zip(indices, cut, strict=True):
                    answers[index] = self._score(context, requests[index][2], *start)
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial(
                            "loglikelihood", requests[index][0], answers[index]
                        )
        return [answers[index] for index in range(len(requests))]

    def _read_shared(self, contexts: list[list[int]]) -> tuple[int, Any]:
        """Read what equal contexts have in whole segments: its length, and the cache after it."""
        cache = self._attachment.make_cache()
        segment_len = self._attachment.settings.segment_len
        # The last token of a context predicts the first of a continuation.
        length = (len(contexts[0]) - 1) // segment_len * segment_len
        if length <= 0 or any(context != contexts[0] for context in contexts):
            return 0, cache
        for begin in range(0, length, segment_len):
            self._call(contexts[0][begin : begin + segment_len], cache)
        return length, cache

    def _score(
        self, context: list[int], continuation: list[int], num_read: int, shared: Any
    ) -> tuple[float, bool]:
        segment_len, cache = self._attachment.settings.segment_len, copy.deepcopy(shared)
        inputs = (context + continuation)[:-1]
        logits = torch.cat(
            [
                self._call(inputs[begin : begin + segment_len], cache)
                for begin in range(num_read, len(inputs), segment_len)
            ]
        )[-len(continuation) :]
        targets = torch.tensor(continuation, device=logits.device)
        log_probs = torch.log_softmax(logits.float(), -1)
        picked = log_probs.gather(-1, targets.unsqueeze(-1))
        return float(picked.double().sum()), bool((logits.argmax(-1) == targets).all())

    def _call(self, tokens: list[int], cache: Any) -> Tensor:
        """Logits (n, V) of the next tokens of a text."""
        inputs = torch.tensor([tokens], device=self.device)
        return self._inner(input_ids=inputs, **self._attachment.pass_cache(cache)).logits[0]

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Generate after each row's prompt, which is read into the row's memory."""
        with self._read():
            return super()._model_generate(context, *args, **kwargs)


_SETTINGS = read_hints(MemorySettings).keys() - {"layers", "window", "dtype"}


def parse_layers(layers: Any) -> list[int] | None:
    """Layers as `model_args` may hold them: 20, "18:20" or a list.

    Raises:
        ConfigError: anything else.
    """
    if layers is None:
        return None
    parts = layers.split(":") if isinstance(layers, str) else layers
    parts = [parts] if isinstance(parts, int) else parts
    try:
        return [int(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"layers is {layers!r}; write 20, or 18:20 for two") from error


def _cut(context: list[int], continuation: list[int], max_length: int) -> list[int]:
    """The context as `HFLM` cuts it: the last `max_length` + 1 tokens of both.

    Raises:
        ConfigError: an answer of no tokens, or one that is longer.
    """
    if not 0 < len(continuation) <= max_length:
        raise ConfigError(
            f"an answer has {len(continuation)} tokens; allowed: 1 to max_length = {max_length}, "
            "for it is scored as a whole; change max_length or the task"
        )
    excess = len(context) + len(continuation) - max_length - 1
    return context[max(0, excess) :]


if __name__ == "__main__":
    _import("lm_eval.__main__").cli_evaluate()
