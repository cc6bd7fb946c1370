"""Finetune a model of the hub to use a memory: gates, scales and LoRA.

    python examples/finetune_with_lora.py MODEL FOLDER [STEPS [LAYER]]

Reads the text files of a folder, a document each; the last one is held out. Needs peft.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import memorizing


def main(name: str, folder: str, num_steps: int, layer: int | None) -> None:
    """Train, save what was learned, load it onto the base again, and measure it."""
    config = memorizing.DataConfig(corpus=f"files:{folder}")
    *documents, held_out = memorizing.load_corpus(config).documents()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    window = min(512, model.config.max_position_embeddings // 2)
    layers = None if layer is None else [layer]
    memorizing.add_memory(model, layers, window=window, capacity=8192, read="entries")
    settings = memorizing.FinetuneSettings(
        train="lora", steps=num_steps, rows=2, lora_rank=8, evaluate_every=0
    )
    run_dir = "runs/finetuned_with_lora"
    memorizing.finetune(model, tokenizer, documents, settings, run_dir, overwrite=True)

    # A few megabytes, which load onto the base model; peft alone can load its part too.
    finetuned = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    memorizing.load_adapter(finetuned, f"{run_dir}/adapter")
    for control in (None, "off", "shuffled"):
        result = memorizing.evaluate_model(finetuned, [held_out], tokenizer, control=control)
        print(f"memory {control or 'on'}: {result.bits_per_byte:.4f} bits per byte")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[3:]]
    main(sys.argv[1], sys.argv[2], *(numbers + [100, None][len(numbers) :]))
