"""Models, texts and settings so small that a writer takes a fraction of a second."""

from __future__ import annotations

from pathlib import Path

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")
"""Each document repeats a word of its own."""
TRAINING = (
    "training.steps=4",
    "training.rows=2",
    "training.checkpoint_every=1",
    "training.evaluate_every=2",
    "training.evaluate_tokens=64",
    "training.log_every=1",
    "tokenizer.vocab_size=307",
    "data.validation=delta.txt,epsilon.txt",
    "data.test=",
    "model.segment_len=8",
    "model.window=8",
    "model.capacity=24",
)


def write_texts(folder: Path, num_lines: int = 17) -> None:
    """A folder of five documents."""
    folder.mkdir(parents=True)
    for index, word in enumerate(WORDS):
        lines = (f"{word} {number * (index + 3) % 89};\n" for number in range(num_lines))
        (folder / f"{word}.txt").write_text("".join(lines), encoding="utf-8")


def find_llama(folder: Path) -> str:
    """Where `save_llama` saved one, in the nearest folder above."""
    return str(next(above / "llama" for above in folder.parents if (above / "llama").is_dir()))


def save_llama(folder: Path, seed: int = 0, max_positions: int = 128) -> Path:
    """A random Llama of three layers with a token for every byte, as on the hub."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=20,
        intermediate_size=31,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        max_position_embeddings=max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Loud enough that what is retrieved is heard.
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
