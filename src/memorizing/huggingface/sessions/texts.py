"""Texts as a tokenizer of `transformers` reads them: text is text, special tokens are added."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from memorizing.data import Document, Tokenizer
from memorizing.errors import CorpusError


def list_documents(documents: Any) -> Iterator[Document]:
    """Documents as they may be given: of `memorizing`, pairs of name and text, or a dict.

    Raises:
        CorpusError: what is neither.
    """
    if isinstance(documents, str):
        raise CorpusError(
            "documents are one text without a name; give (name, text) pairs, a dict of them, or "
            "memorizing.load_corpus(...)"
        )
    items: Iterable[Any] = documents.items() if isinstance(documents, dict) else documents
    for item in items:
        if isinstance(item, (tuple, list)) and len(item) == 2:
            name, text = item
        else:
            name, text = getattr(item, "name", None), getattr(item, "text", None)
        if not isinstance(name, str) or not isinstance(text, str) or not name:
            raise CorpusError(
                f"a document is a {type(item).__name__}; give (name, text) pairs of strings, or "
                "documents with a name and a text"
            )
        yield Document(name, text)


def encode_text(tokenizer: Any, text: str, *, is_whole: bool = False) -> np.ndarray:
    """Token ids (n,) int32 of a text.

    What is spelled like a special token is text, whatever the tokenizer was set to.

    Args:
        tokenizer: of `transformers`.
        text: the text.
        is_whole: also put the special tokens around it that the tokenizer puts around a text.
    """
    return np.array(_call(tokenizer, text, is_whole)["input_ids"], dtype=np.int32)


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray | None]:
    """As `encode_text` of a whole text, and (n, 2) int64: characters [start, end) of each.

    A tokenizer that is not of `tokenizers` does not tell them: None.
    """
    if not getattr(tokenizer, "is_fast", False):
        return encode_text(tokenizer, text, is_whole=True), None
    encoded = _call(tokenizer, text, True, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], dtype=np.int32), offsets


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
    """What was said, as the tokenizer's template of chats puts it, up to the answer.

    Only the template's special tokens are special: contents that spell one are cut out, and put in
    as text.

    Args:
        tokenizer: of `transformers`.
        messages: of each its `role` and its `content`, which another may have written.
    """
    special, contents = tokenizer.all_special_tokens, [one["content"] for one in messages]
    if not any(token in content for token in special for content in contents):
        return np.array(_apply_template(tokenizer, messages, tokenize=True)["input_ids"])
    marked = [{**one, "content": f"{_MARK}{number}{_MARK}"} for number, one in enumerate(messages)]
    written = _apply_template(tokenizer, marked, tokenize=False)
    ids: list[int] = []
    for place, part in enumerate(re.split(f"{_MARK}(\\d+){_MARK}", written)):
        if place % 2:
            ids += encode_text(tokenizer, contents[int(part)]).tolist()
        else:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=False)[
                "input_ids"
            ]
    return np.array(ids)


_MARK = "\ue000content\ue000"
"""Not in any template."""


def _apply_template(tokenizer: Any, messages: Any, *, tokenize: bool) -> Any:
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=tokenize, return_dict=tokenize
    )


def _call(tokenizer: Any, text: str, is_whole: bool, **options: Any) -> Any:
    return tokenizer(
        text,
        add_special_tokens=is_whole,
        split_special_tokens=True,
        truncation=False,
        padding=False,
        verbose=False,
        **options,
    )


def wrap_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """A tokenizer of `transformers` as one of ours; None where it has no backend of `tokenizers`.

    It gives the ids of `encode_text`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else Tokenizer(backend)


def hash_tokenizer(tokenizer: Any) -> str:
    """Of everything that decides which tokens a text becomes.

    How batches are padded and cut does not, nor which special tokens there are besides those that
    are put around a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        special = set(tokenizer.all_special_tokens)
        words = {word: i for word, i in tokenizer.get_vocab().items() if word not in special}
        return _hash(json.dumps(words, sort_keys=True))
    parts = json.loads(backend.to_str())
    del parts["padding"], parts["truncation"]
    parts["added_tokens"] = [one for one in parts["added_tokens"] if not one["special"]]
    return _hash(json.dumps(parts, sort_keys=True))


def is_same_tokenizer(stored: str, tokenizer: Any) -> bool:
    """Whether a tokenizer is the one whose hash is stored.

    Hashes of the first format held how batches were padded and cut when they were made. What can be
    told of them: the tokenizer as it is now, as it was loaded, or after a batch that was padded to
    its longest text.
    """
    if stored == hash_tokenizer(tokenizer):
        return True
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return stored == _hash(json.dumps(tokenizer.get_vocab(), sort_keys=True))
    if stored == _hash(backend.to_str()):
        return True
    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.no_padding()
    plain.no_truncation()
    if stored == _hash(plain.to_str()):
        return True
    if tokenizer.pad_token_id is None:
        return False
    plain.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    return stored == _hash(plain.to_str())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
