"""Indexes as settings and as text."""

from __future__ import annotations

import pytest

from memorizing.errors import ConfigError
from memorizing.index_settings import (
    ExactSettings,
    FaissHnswSettings,
    FaissIvfSettings,
    list_indexes,
    parse_index,
)


@pytest.mark.parametrize("name", list_indexes())
def test_every_name_gives_settings_that_are_written_as_that_name(name: str) -> None:
    assert str(parse_index(name)) == name


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("exact:rescore=true", ExactSettings()),  # as older settings say it
        ("faiss_hnsw:num_links=17,ef_search=41", FaissHnswSettings(num_links=17, ef_search=41)),
        (" faiss_ivf : num_lists = 37 ,num_probes=5", FaissIvfSettings(num_lists=37, num_probes=5)),
        ("faiss_ivf:train_on_queries=true", FaissIvfSettings(train_on_queries=True)),
    ],
)
def test_text_and_settings_are_the_same(text: str, settings) -> None:
    assert parse_index(text) == settings
    assert parse_index(str(settings)) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("faiss_hsnw", "did you mean 'faiss_hnsw'"),
        ("faiss_hnsw:ef=3", "unknown key 'faiss_hnsw.ef'"),
        ("faiss_hnsw:ef_search", "write name:option=value"),
        ("faiss_hnsw:ef_search=0", "faiss_hnsw.ef_search is 0; allowed: 1 or more"),
        ("faiss_hnsw:ef_search=1.5", "faiss_hnsw.ef_search is 1.5; allowed: a whole number"),
        ("faiss_hnsw:num_links=1", "faiss_hnsw.num_links is 1; allowed: 2 or more"),
        ("faiss_flat:block_len=0", "faiss_flat.block_len is 0; allowed: 1 or more"),
        ("faiss_flat:oversample=-1", "faiss_flat.oversample is -1; allowed: 1 or more"),
        ("faiss_ivf:num_lists=7,num_probes=8", "num_probes is 8; allowed: at most num_lists, 7"),
        ("faiss_ivf:num_lists=31", "num_probes is 32; allowed: at most num_lists, 31"),
        ("faiss_ivf:num_bits=4", "num_bits is 4; allowed: 8 or 16"),
        ("faiss_ivf:train_on_queries=1", "train_on_queries is 1; allowed: true or false"),
        ("scann:leaves_to_search=1025", "is 1025; allowed: at most num_leaves, 1024"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_index(text)
    assert message in str(caught.value)
