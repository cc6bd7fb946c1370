"""Train a model with memory inside of `transformers.Trainer`.

    python examples/inside_trainer.py MODEL FOLDER [STEPS]

Reads the text files of a folder, a document each. A batch of the Trainer is the next segment of
one row; `gradient_accumulation_steps` rows are read side by side, each with a memory of its own.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import memorizing
from memorizing.data import SegmentLoader, Tokenizer, tokenize_documents


class Segments(IterableDataset):
    """One segment of every row after another, for ever; a row that ends begins a new document."""

    def __init__(self, loader: SegmentLoader) -> None:
        """Take a loader that repeats."""
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of one row, of the length of their segment."""
        for batch in self.loader:
            for row, length in enumerate(batch.valid.sum(1).tolist()):
                targets = batch.targets[row : row + 1, :length]
                yield {
                    "row": row,
                    "starts_document": bool(batch.doc_start[row]),
                    "input_ids": batch.tokens[row : row + 1, :length],
                    "labels": targets,
                    "shift_labels": targets,  # the loader has shifted them
                }


class MemoryTrainer(Trainer):
    """Keeps a cache per row, and lets a segment be retrieved once its backward pass is done.

    That is right with any `gradient_accumulation_steps`: gradients of several segments add up, and
    none flows into what a memory or a cache holds.
    """

    def __init__(self, *args: Any, memory: memorizing.MemorySession, **kwargs: Any) -> None:
        """As `Trainer`, with the memory that is open."""
        super().__init__(*args, **kwargs)
        self.memory = memory
        self.caches: dict[int, Any] = {}

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """Forward and backward over a segment of one row."""
        row = inputs.pop("row")
        if inputs.pop("starts_document"):
            self.caches[row] = self.memory.new_cache()
        inputs |= {"past_key_values": self.caches[row], "use_cache": True}
        loss = super().training_step(model, inputs, *args)
        self.memory.commit(self.caches[row])
        return loss


def make_optimizer(model: Any, rate: float) -> torch.optim.Optimizer:
    """Gates and scales learn at a rate of their own, without weight decay."""
    gates = [p for name, p in model.named_parameters() if ".memory." in name]
    others = [p for name, p in model.named_parameters() if ".memory." not in name]
    groups = [{"params": others}, {"params": gates, "lr": 100 * rate, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)


def train(model: Any, loader: SegmentLoader, num_steps: int, rate: float, out: str) -> list[float]:
    """Train all weights; the losses of the steps."""
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=loader.num_rows,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},
    )
    with memorizing.open_memory(model) as memory:
        trainer = MemoryTrainer(
            model,
            arguments,
            train_dataset=Segments(loader),
            data_collator=lambda batches: batches[0],
            optimizers=(make_optimizer(model, rate), None),
            memory=memory,
        )
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(name: str, folder: str, num_steps: int) -> None:
    """Train and print the loss."""
    config = memorizing.DataConfig(corpus=f"files:{folder}")
    tokenizer = Tokenizer(
        AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer
    )
    documents = tokenize_documents(memorizing.load_corpus(config).documents(), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    window = min(512, model.config.max_position_embeddings // 2)
    memorizing.add_memory(model, window=window, capacity=8192, read="entries")
    loader = SegmentLoader(documents, 2, window, tokenizer.start_token, seed=0, repeat=True)
    losses = train(model, loader, num_steps, 1e-4, "runs/inside_trainer")
    for step, loss in enumerate(losses, 1):
        print(f"step {step}: {loss:.3f} nats a token")
    memorizing.save_adapter(model, "runs/inside_trainer/adapter")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 50)
