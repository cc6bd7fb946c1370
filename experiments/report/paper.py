"""Numbers that *Memorizing Transformers* (arXiv 2203.08913) reports."""

from __future__ import annotations

PERPLEXITIES: dict[tuple[int, int, bool], tuple[float, float, float, float, float]] = {
    (512, 0, False): (3.29, 13.71, 17.20, 3.05, 3.09),
    (2048, 0, False): (2.69, 12.37, 14.81, 2.22, 2.39),
    (512, 0, True): (2.67, 12.34, 15.38, 2.26, 2.46),
    (2048, 0, True): (2.42, 11.88, 14.03, 2.10, 2.16),
    (512, 1536, False): (2.61, 12.50, 14.97, 2.20, 2.33),
    (512, 8192, False): (2.49, 12.29, 14.42, 2.09, 2.19),
    (512, 8192, True): (2.37, 11.93, 14.04, 2.03, 2.08),
    (512, 65_536, True): (2.31, 11.62, 14.04, 1.87, 2.06),
    (2048, 8192, True): (2.33, 11.84, 13.80, 1.98, 2.06),
    (2048, 65_536, True): (2.26, 11.37, 13.64, 1.80, 1.99),
}
"""Table 4: by context, memory and whether there is a Transformer-XL cache; columns as `CORPORA`."""

CORPORA = ("arXiv Math", "PG-19", "C4 (4K+)", "GitHub", "Isabelle")

LIKE_FAMILY = {
    "proofs": "Isabelle",
    "code": "GitHub",
    "math": "arXiv Math",
    "books": "PG-19",
    "web": "C4 (4K+)",
}
"""The paper's corpus that a family of ours stands in for."""

BASELINE = (512, 0, True)
"""Row of Table 4 that memory is compared with: the Transformer-XL cache alone."""

FINETUNED = {65_536: 2.32, 262_144: 2.26}
"""Table 5, arXiv Math, context 512: trained with 8,192 entries, finetuned to more; perplexity."""

GAP_CLOSED = ((4.0, 0.85), (20.0, 1.0))
"""Figure 6: percent of the steps of pre-training, share of the gap closed."""

TIMES_LARGER = 5
"""Figure 1: weights of a model without memory that equals one with 8,192 entries."""


def read_perplexity(row: tuple[int, int, bool], corpus: str) -> float | None:
    """Of Table 4; None where the paper has no such row."""
    found = PERPLEXITIES.get(row)
    return None if found is None else found[CORPORA.index(corpus)]


def compute_change(row: tuple[int, int, bool], corpus: str) -> float | None:
    """Relative change of perplexity against the Transformer-XL cache of context 512."""
    found, baseline = read_perplexity(row, corpus), read_perplexity(BASELINE, corpus)
    return None if found is None or baseline is None else found / baseline - 1
