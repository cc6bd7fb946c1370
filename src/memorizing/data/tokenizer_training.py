"""Training a tokenizer on the documents a model is trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from memorizing.config import TokenizerConfig
from memorizing.data.text import Document
from memorizing.data.tokenizer import PIECES, START_TOKEN, Tokenizer, load_tokenizer
from memorizing.errors import CorpusError

_BLOCK = 16_384  # characters
_BLOCKS_AT_ONCE = 512
_CANDIDATES = 2  # per piece that is kept
_MIN_CHARACTERS = 64
_UNKNOWN = "<unk>"
_NEVER = (
    -1e4
)  # log probability of Unigram entries that text must not be read as: byte tokens and specials


def train_tokenizer(documents: Sequence[Document], config: TokenizerConfig) -> Tokenizer:
    """A tokenizer trained on a sample of the documents, or the existing one `config` names.

    Both kinds lose nothing: decoding gives the text back. `bpe` is byte-level BPE (Radford et al.
    2019); `unigram` is Kudo's (2018), with bytes for characters it does not know: the paper's 32K
    "SentencePiece" (section 4.1). A corpus with little text can give fewer ids than asked for:
    models take `Tokenizer.vocab_size`.

    **Deviation:** SentencePiece writes spaces as U+2581 and normalizes; here spaces stay spaces and
    nothing is normalized, because a text that holds U+2581 would come back altered. Candidates come
    from BPE and are counted in the most probable reading (hard expectation maximization).

    Raises:
        CorpusError: there is no text to train on.
        TokenizerError: a `pretrained` tokenizer does not exist.
    """
    if config.kind == "pretrained":
        return load_tokenizer(config.path)
    if not any(document.text for document in documents):
        raise CorpusError(
            "there is no text to train a tokenizer on; the training documents are empty or all "
            "held out"
        )
    sample = sample_text(documents, config.sample_mib * 2**20)
    return Tokenizer(
        _train_bpe(sample, config) if config.kind == "bpe" else _train_unigram(sample, config)
    )


def sample_text(documents: Sequence[Document], num_bytes: int) -> Iterator[str]:
    """Blocks of text spread evenly over all documents, about `num_bytes`; all if it is less."""
    total = sum(document.num_bytes for document in documents)
    share = min(1.0, num_bytes / total) if total else 0.0
    due = 0.0
    for document in documents:
        for begin in range(0, len(document.text), _BLOCK):
            due += share
            if due >= 1.0 - 1e-9:
                due -= 1.0
                yield document.text[begin : begin + _BLOCK]


def _train_bpe(sample: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[START_TOKEN],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(sample, trainer)
    return backend


def _train_unigram(sample: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    """Candidates from BPE, counted in the most probable readings, the least useful dropped.

    The library's own Unigram trainer takes its candidates from a list of distinct words: what
    repeats only inside one word of code is never one, and it gave half of the ids asked for.
    """
    blocks = list(sample)
    reserved = [START_TOKEN, _UNKNOWN, *(f"<0x{value:02X}>" for value in range(256))]
    room = max(config.vocab_size - len(reserved), 1)
    candidates = _propose_pieces(
        blocks, _CANDIDATES * room, max_characters=max(room // 4, _MIN_CHARACTERS)
    )
    counts = dict.fromkeys(candidates, 1.0)
    backend = _build_unigram(reserved, counts)
    for size in (len(candidates), (len(candidates) + room) // 2, room, room):
        counts = _count_pieces(backend, blocks, list(counts))
        # Single characters stay. Of longer pieces those that save the most tokens do.
        kept = sorted(counts, key=lambda p: (len(p) > 1, -counts[p] * max(len(p) - 1, 1), p))[:size]
        counts = {piece: counts[piece] for piece in sorted(kept)}
        backend = _build_unigram(reserved, counts)
    return backend


def _propose_pieces(blocks: Sequence[str], count: int, max_characters: int) -> list[str]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=count, show_progress=False, special_tokens=[], limit_alphabet=max_characters
    )
    backend.train_from_iterator(blocks, trainer)
    return sorted(backend.get_vocab())


def _count_pieces(
    backend: tokenizers.Tokenizer, blocks: Sequence[str], pieces: Sequence[str]
) -> dict[str, float]:
    """How often a piece is in the most probable reading; at least 0.5: none is ruled out."""
    counts = np.zeros(backend.get_vocab_size(), dtype=np.int64)
    for begin in range(0, len(blocks), _BLOCKS_AT_ONCE):
        for encoding in backend.encode_batch_fast(
            blocks[begin : begin + _BLOCKS_AT_ONCE], add_special_tokens=False
        ):
            counts += np.bincount(encoding.ids, minlength=len(counts))
    vocabulary = backend.get_vocab()
    return {piece: max(float(counts[vocabulary[piece]]), 0.5) for piece in pieces}


def _build_unigram(reserved: Sequence[str], counts: dict[str, float]) -> tokenizers.Tokenizer:
    total = sum(counts.values())
    vocab = [(token, _NEVER) for token in reserved] + [
        (piece, math.log(n / total)) for piece, n in counts.items()
    ]
    backend = tokenizers.Tokenizer(
        models.Unigram(vocab, unk_id=reserved.index(_UNKNOWN), byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    backend.add_special_tokens([START_TOKEN, _UNKNOWN])
    backend.encode_special_tokens = True
    return backend
