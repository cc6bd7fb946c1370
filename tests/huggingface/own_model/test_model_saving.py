"""One checkpoint format: what training saves `transformers` loads, and the other way round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from memorizing.config import TokenizerConfig
from memorizing.data import Document, Tokenizer, train_tokenizer
from memorizing.errors import CheckpointError
from memorizing.huggingface.own_model.config import MemorizingTokenizer
from memorizing.huggingface.own_model.model import MemorizingTransformerForCausalLM
from memorizing.model.pointer import Pointer
from memorizing.training import load_model, save_model
from tests.huggingface.own_model.tools import make_own
from tests.model.tools import make_tokens

TEXT = "one two one two three  four\n\tfive <|document|> six"


def make_tokenizer(kind: str = "bpe") -> Tokenizer:
    return train_tokenizer(
        [Document("d", TEXT)],
        TokenizerConfig(kind=kind, vocab_size=331),  # type: ignore[arg-type]
    )


def compute_logits(model: MemorizingTransformerForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: Tokenizer) -> MemorizingTransformerForCausalLM:
    return make_own(vocab_size=tokenizer.vocab_size)


@pytest.fixture
def trained(model: MemorizingTransformerForCausalLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder as our training writes it."""
    save_model(tmp_path / "trained", model.model, tokenizer)
    return tmp_path / "trained"


def test_a_checkpoint_of_another_attention_is_refused(
    trained: Path, model: MemorizingTransformerForCausalLM
) -> None:
    own = load_model(trained).model
    own.blocks[1].attention.register_buffer("directions", torch.ones(3))
    save_model(trained, own, None)
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.attention\.directions'.*make_model"):
        MemorizingTransformerForCausalLM.from_pretrained(trained)
    # Left-over gates are those of a model that is loaded to combine in another way.
    save_model(trained, model.model, None)
    options = {"combine": "joint", "output_loading_info": True}
    loaded, info = MemorizingTransformerForCausalLM.from_pretrained(trained, **options)
    assert loaded.config.combine == "joint"
    assert info["unexpected_keys"]


def test_a_saved_model_is_loaded_bit_for_bit(
    model: MemorizingTransformerForCausalLM, tmp_path: Path
) -> None:
    tokens = make_tokens(2, 31)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MemorizingTransformerForCausalLM
    assert not loaded.training
    assert torch.equal(compute_logits(loaded, tokens), compute_logits(model, tokens))
    assert loaded.config.to_model_config() == model.config.to_model_config()


def test_transformers_loads_what_our_training_saved(
    model: MemorizingTransformerForCausalLM, trained: Path
) -> None:
    tokens = make_tokens(2, 31)
    loaded = AutoModelForCausalLM.from_pretrained(trained)
    assert torch.equal(compute_logits(loaded, tokens), compute_logits(model, tokens))
    assert loaded.generation_config.bos_token_id == 0
    assert loaded.generation_config.pad_token_id is None


def test_our_own_loader_loads_what_transformers_saved(trained: Path, tmp_path: Path) -> None:
    model, tokenizer = (
        kind.from_pretrained(trained) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    model.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved").tokenizer is None
    tokenizer.save_pretrained(tmp_path / "saved")
    before, after = load_model(trained), load_model(tmp_path / "saved")
    assert after.config == before.config
    assert after.tokenizer is not None
    assert before.tokenizer is not None
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    weights = after.model.state_dict()
    assert all(torch.equal(weights[name], t) for name, t in before.model.state_dict().items())
    names = [load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "saved")]
    assert names[0].keys() == names[1].keys()


def test_saving_over_a_checkpoint_leaves_no_manifest_of_other_files(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    with torch.no_grad():
        model.model.final_norm.gain += 1.0
    model.save_pretrained(trained)
    assert torch.equal(load_model(trained).model.final_norm.gain, model.model.final_norm.gain)


def test_checkpoints_from_before_are_loaded_too(
    model: MemorizingTransformerForCausalLM, trained: Path
) -> None:
    (trained / "manifest.json").unlink()
    config = json.loads((trained / "config.json").read_text())
    config |= {"model_type": "memorizing", "architectures": ["MemorizingTransformer"]}
    del config["bos_token_id"]
    (trained / "config.json").write_text(json.dumps(config))
    tokens = make_tokens(1, 17)
    loaded = AutoModelForCausalLM.from_pretrained(trained)
    assert torch.equal(compute_logits(loaded, tokens), compute_logits(model, tokens))
    assert loaded.config.model_type == "memorizing_transformer"
    assert isinstance(AutoTokenizer.from_pretrained(trained), MemorizingTokenizer)
    assert load_model(trained).config == model.config.to_model_config()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damage_is_noticed_without_a_manifest(trained: Path, name: str) -> None:
    (trained / "manifest.json").unlink()
    path = trained / name
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(trained)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no file|holds no checkpoint"):
        load_model(trained)


def test_settings_can_be_changed_while_loading(trained: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(trained, capacity=5, dtype="bfloat16")
    assert loaded.init_cache(1).state.memories[1].capacity == 5
    assert loaded.model.embedding.weight.dtype == torch.float32
    assert compute_logits(loaded, make_tokens(1, 17)).dtype == torch.bfloat16


def test_weights_stay_fp32_when_computing_in_bf16(trained: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").dtype == torch.float32
    before = load_file(trained / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_without_memory_is_loaded_with_one_whose_gates_start_anew(tmp_path: Path) -> None:
    make_own(memory_layers=()).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, memory_layers=[1], gate_bias_init=-3.0, empty_value=True, pointer=True
    )
    fresh = Pointer(loaded.config.model_dim, loaded.config.num_heads).state_dict()
    own = loaded.model.pointer.state_dict()
    drawn = [states.pop("inner_weight").std() for states in (own, fresh)]
    assert 0.8 < drawn[0] / drawn[1] < 1.25
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in own.items())
    attention = loaded.model.blocks[1].attention
    assert attention.gate_bias.tolist() == [-3.0, -3.0]
    assert not attention.empty_value.any()


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    make_own(smear_keys=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lacks 'smear' of Attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path, smear_keys=True)


def test_a_new_model_starts_as_our_own_does() -> None:
    config = make_own(induction_init=True).config
    torch.manual_seed(5)
    wrapped = MemorizingTransformerForCausalLM(config)
    torch.manual_seed(5)
    own = type(wrapped.model)(config.to_model_config())
    theirs = wrapped.model.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in own.state_dict().items())
    torch.manual_seed(5)
    auto = AutoModelForCausalLM.from_config(config)
    assert torch.equal(auto.model.embedding.weight, own.embedding.weight)


def test_the_frozen_bias_of_a_memory_layer_stays_frozen(tmp_path: Path) -> None:
    make_own(memory_layer_bias=False).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tables = [block.attention.position_bias.table.requires_grad for block in loaded.model.blocks]
    assert tables == [True, False, True]


def test_a_pipeline_is_made_from_a_folder(trained: Path) -> None:
    generator = pipeline("text-generation", model=str(trained), device="cpu")
    [found] = generator("one two", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("one two")


def test_what_is_pushed_to_the_hub_is_what_is_saved(
    model: MemorizingTransformerForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    pushed: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, repo_id: str, **_: object):
            return type("Url", (), {"repo_id": repo_id})

    def upload(self, working_dir, repo_id, *_, **__) -> None:
        assert repo_id == "owner/name"
        pushed.update({p.name: p.read_bytes() for p in Path(working_dir).iterdir()})

    card = type("Card", (), {"save": lambda path: Path(path).write_text("")})
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(MemorizingTransformerForCausalLM, "_upload_modified_files", upload)
    model.push_to_hub("owner/name")
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert pushed == saved | {"README.md": b""}


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, memorizing; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
