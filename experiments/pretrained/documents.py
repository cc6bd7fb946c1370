"""The documents that SmolLM2 is finetuned, tuned and tested on, frozen by name before any result.

The texts are those of `experiments/corpora` (`python experiments/corpora/build.py proofs code`):
`proofs`, a document is a folder of HOL Light or a Coq library, its files in the order in which they
build on one another; `code`, a document is a Python package, its files in the paper's order
(section 4.1). What is held out are whole libraries and packages.

How they were drawn, 26 November, before the model had read any of them:

- **test**, for each claim once: from the test documents of `experiments/recipes/*.toml`, which were
  named before the project's first run, the first in the order of `shuffle_names(names,
  "pretrained")`: of proofs the first two folders of HOL Light and the first two Coq libraries, of
  code the first four packages. Each is longer than 32,768 tokens of SmolLM2 and cut there.
- **validation**, for every choice (layer, threshold, temperature, rate, checkpoint): the validation
  documents of the same recipes without `hol_Minisat.txt`, which is tables of numbers.
- **train**: all other documents of at least 65,536 tokens, in the order of `shuffle_names` as
  above.

SmolLM2 was probably trained on the code (all these packages are public, if not these versions), and
hardly on the proofs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from memorizing.config import DataConfig
from memorizing.data import Document, Tokenizer, cut_documents, load_corpus, tokenize_documents
from memorizing.errors import ConfigError, CorpusError

Family = Literal["proofs", "code"]
Use = Literal["train", "validation", "test"]

FAMILIES: tuple[Family, ...] = get_args(Family)
TEST_TOKENS = 32_768
VALIDATION_TOKENS = 16_384
CORPORA = Path("corpora")

NAMES: dict[Family, dict[Use, tuple[str, ...]]] = {
    "proofs": {
        "test": ("hol_Logic.txt", "hol_Rqe.txt", "coq_flocq.txt", "coq_stdpp.txt"),
        "validation": ("coq_coqprime.txt", "coq_math-classes.txt", "hol_EC.txt"),
        "train": (
            "hol_Formal_ineqs.txt",
            "hol_Tutorial.txt",
            "coq_hott.txt",
            "coq_unimath.txt",
            "hol_Examples.txt",
            "hol_Geometric_Algebra.txt",
            "hol_Multivariate.txt",
            "coq_mathcomp-real-closed.txt",
            "coq_corn.txt",
            "hol_Library.txt",
            "hol_Complex.txt",
            "hol_core.txt",
            "coq_mathcomp-field.txt",
            "hol_Functionspaces.txt",
            "hol_100.txt",
            "hol_Arithmetic.txt",
            "hol_Proofrecording.txt",
            "coq_stdlib.txt",
            "hol_Unity.txt",
            "hol_Boyer_Moore.txt",
            "coq_mathcomp-character.txt",
            "coq_mathcomp-solvable.txt",
            "hol_RichterHilbertAxiomGeometry.txt",
            "coq_mathcomp-ssreflect.txt",
            "coq_mathcomp-algebra.txt",
            "coq_mathcomp-analysis.txt",
            "hol_GL.txt",
            "coq_mathcomp-fingroup.txt",
            "hol_miz3.txt",
        ),
    },
    "code": {
        "test": ("tornado", "scrapy", "rich", "pylint"),
        "validation": ("jinja2", "requests"),
        "train": (
            "dask",
            "ansible_core",
            "nltk",
            "pygments",
            "sympy",
            "mypy",
            "django",
            "xarray",
        ),
    },
}

_PLACES: dict[Family, str] = {"proofs": "files:{}/proofs/*.txt", "code": "repositories:{}/code"}
_CHARS_PER_TOKEN = 5
"""Of code 4, of proofs 2 to 3: a first guess at how much has to be tokenized."""


@dataclass(frozen=True)
class ReadDocument:
    """The beginning of a document, or a later piece of it (`name#2`)."""

    name: str
    text: str
    """What the tokens stand for. A character that is cut in two is U+FFFD at both ends."""
    tokens: np.ndarray
    """(n,) int32, without the start token."""
    num_bytes: int
    """Of the raw text: what bits per byte are counted by."""


def load_documents(
    family: Family,
    use: Use,
    tokenizer: Tokenizer,
    *,
    corpora: Path = CORPORA,
    max_tokens: int = 0,
    num_pieces: int = 1,
) -> list[ReadDocument]:
    """The documents of one use, in the order of their list.

    Args:
        family: of texts.
        use: train, validation or test.
        tokenizer: of the model.
        corpora: where `experiments/corpora` has built them.
        max_tokens: where they are cut; 0 means 32,768, of validation 16,384.
        num_pieces: how many pieces of that length each gives, where it is long enough, one after
            the other; more than 1 is for training.

    Raises:
        CorpusError: documents are missing.
        ConfigError: several pieces of a document that is held out.
    """
    if num_pieces > 1 and use != "train":
        raise ConfigError(
            f"num_pieces is {num_pieces}; held-out documents are read from their start"
        )
    max_tokens = max_tokens or (VALIDATION_TOKENS if use == "validation" else TEST_TOKENS)
    names = NAMES[family][use]
    found = read_texts(family, names, corpora)
    pieces = [
        piece
        for name in names
        for piece in cut_text(found[name], tokenizer, max_tokens, num_pieces)
    ]
    if use == "test" and (short := [p.name for p in pieces if len(p.tokens) < max_tokens]):
        raise CorpusError(f"{', '.join(short)}: shorter than {max_tokens:,} tokens")
    return pieces


def read_texts(family: Family, names: tuple[str, ...], corpora: Path) -> dict[str, Document]:
    """Whole documents by name.

    Raises:
        CorpusError: one is missing.
    """
    remedy = f"build the texts: python experiments/corpora/build.py {family}"
    try:
        corpus = load_corpus(DataConfig(corpus=_PLACES[family].format(corpora)))
    except CorpusError as error:
        raise CorpusError(f"{error}; {remedy}") from error
    found = {document.name: document for document in corpus.documents() if document.name in names}
    if missing := [name for name in names if name not in found]:
        raise CorpusError(f"{corpora}/{family} lacks {', '.join(missing)}; {remedy}")
    return found


def cut_text(
    document: Document, tokenizer: Tokenizer, max_tokens: int, num_pieces: int
) -> list[ReadDocument]:
    """The first pieces of a document; no more of it is tokenized than that takes."""
    num_chars = _CHARS_PER_TOKEN * max_tokens * num_pieces
    # A token of a text that goes on may be longer: the last ones of a part do not count.
    while True:
        part = document.text[:num_chars]
        is_whole = len(part) == len(document.text)
        whole = Document(document.name, part, document.num_bytes if is_whole else -1)
        tokenized = tokenize_documents([whole], tokenizer)
        if is_whole or len(tokenized[0].tokens) > max_tokens * num_pieces:
            break
        num_chars *= 2
    pieces = cut_documents(tokenized, tokenizer, max_tokens)[:num_pieces]
    return [ReadDocument(p.name, tokenizer.decode(p.tokens), p.tokens, p.num_bytes) for p in pieces]
