"""What is loaded is somebody else's: damage is told before anything is allocated for it."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from memorizing.errors import ConfigError, TokenizerError
from memorizing.huggingface.loading import load_pretrained
from tests.training.finetuning.tools import make_base, make_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_base().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    load_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 2**53}, "num_hidden_layers is 9,007.*at most"),
        ({"num_hidden_layers": 10**8}, "weights or more"),
        ({"vocab_size": 2**31}, "vocab_size is 2,147,483,648"),
        ({"vocab_size": 2**30}, "weights or more"),
        ({"intermediate_size": 2**24}, "weights or more"),
        ({"hidden_size": "many"}, "cannot be loaded"),
        ({"model_type": "else", "auto_map": {"AutoConfig": "code.Config"}}, "code of its own"),
    ],
)
def test_a_config_that_is_hostile_is_refused(folder: Path, values: dict[str, Any], words: str):
    change(folder / "config.json", **values)
    with pytest.raises(ConfigError, match=words):
        load_pretrained(str(folder))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"model_max_length": "many"}),
        ("tokenizer_config.json", {"model_max_length": [7]}),
        ("generation_config.json", {"max_new_tokens": "7"}),
        ("generation_config.json", {"eos_token_id": "</s>"}),
        ("generation_config.json", {"bos_token_id": 2**70}),
        ("generation_config.json", {"pad_token_id": {"a": 1}}),
        ("generation_config.json", {"temperature": "hot", "do_sample": True}),
        ("config.json", {"output_hidden_states": ["all"]}),
    ],
)
def test_what_is_only_looked_at_in_use_is_told_when_it_is_loaded(
    folder: Path, file: str, values: dict[str, Any]
):
    if "output_hidden_states" in values and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers takes whatever is true")
    change(folder / file, **values)
    with pytest.raises((ConfigError, TokenizerError), match=r"cannot be loaded .*another copy"):
        load_pretrained(str(folder))


def test_loading_draws_no_random_numbers_of_the_caller(folder: Path):
    change(folder / "generation_config.json", do_sample=True, temperature=1.5)
    torch.manual_seed(3)
    wanted = torch.rand(5)
    torch.manual_seed(3)
    load_pretrained(str(folder))
    assert torch.equal(torch.rand(5), wanted)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": ' * 100_000, "\udcff", '{"model_type": 7}']
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_damaged_file_is_told(folder: Path, name: str, text: str):
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises((ConfigError, TokenizerError), match=r"cannot be loaded|code of its own"):
        load_pretrained(str(folder))


def test_ids_of_a_tokenizer_that_the_model_does_not_know_are_refused(folder: Path):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["far"] = 2**31
    path.write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match="2,147,483,649 tokens"):
        load_pretrained(str(folder))


def test_weights_that_are_cut_are_told(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-11])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pretrained(str(folder))


def test_code_that_comes_with_a_model_is_not_run(folder: Path):
    (folder / "code.py").write_text("open('ran', 'w')\nraise SystemExit")
    change(folder / "config.json", model_type="else", auto_map={"AutoConfig": "code.Config"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Tok"]})
    with pytest.raises(ConfigError, match="code of its own"):
        load_pretrained(str(folder))
    assert not Path("ran").exists()


@pytest.mark.parametrize("kind", ["else", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("has_file", [True, False])
def test_code_that_comes_with_a_tokenizer_is_not_run(
    folder: Path, kind: str | None, has_file: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    (folder / "code.py").write_text("open('ran', 'w')\nclass Tok: pass")
    auto_map = {"AutoTokenizer": ["code.Tok", "code.Tok"]}
    change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=kind)
    if not has_file:
        (folder / "tokenizer.json").unlink()
    with suppress(TokenizerError):
        _, tokenizer = load_pretrained(str(folder))
        assert type(tokenizer).__module__.startswith("transformers.")
    assert not Path("ran").exists()
