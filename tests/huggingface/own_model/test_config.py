"""The configuration of our own model, and its tokenizer, by the names of `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from memorizing.config import ModelConfig
from memorizing.data import load_tokenizer
from memorizing.errors import ConfigError
from memorizing.huggingface.own_model.config import MemorizingTokenizer, MemorizingTransformerConfig
from tests.huggingface.own_model.test_model_saving import TEXT, make_tokenizer
from tests.model.tools import SMALL


def test_settings_are_checked_and_have_the_names_of_transformers_too() -> None:
    config = MemorizingTransformerConfig.from_model_config(SMALL)
    assert config.to_model_config() == SMALL
    assert MemorizingTransformerConfig().to_model_config() == ModelConfig()
    assert config.hidden_size == config.model_dim == 22
    assert config.num_hidden_layers == 3
    assert MemorizingTransformerConfig(hidden_size=17).model_dim == 17
    with pytest.raises(ConfigError, match="layers from 0 to 11"):
        MemorizingTransformerConfig(memory_layers=[12])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_tokenizer_puts_the_start_token_before_texts_and_saves_the_same_file(
    kind: str, tmp_path: Path
) -> None:
    own = make_tokenizer(kind)
    own.save(tmp_path / "a")
    MemorizingTransformerConfig(vocab_size=own.vocab_size).save_pretrained(tmp_path / "a")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert isinstance(loaded, MemorizingTokenizer)
    expected = [own.start_token, *own.encode(TEXT)]
    assert loaded(TEXT).input_ids == expected
    assert loaded(TEXT, add_special_tokens=False).input_ids == expected[1:]
    assert loaded.decode(expected[1:]) == TEXT
    assert loaded.decode(expected, skip_special_tokens=True) == TEXT
    batch = loaded(["one", TEXT], padding=True)
    assert batch.input_ids[0][-2:] == [own.start_token, *own.encode("one")]
    assert sum(batch.attention_mask[0]) == 2
    loaded.save_pretrained(tmp_path / "b")
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert load_tokenizer(tmp_path / "b").fingerprint == own.fingerprint
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    assert AutoTokenizer.from_pretrained(tmp_path / "b")(TEXT).input_ids == expected
