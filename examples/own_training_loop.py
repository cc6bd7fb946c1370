"""A training loop of your own, without `train`.

    python examples/own_training_loop.py FOLDER [STEPS]

Reads the text files of a folder, a document each, and trains a small model with memory on them.
"""

import sys

import torch

from memorizing import DataConfig, MemorizingTransformer, TokenizerConfig, load_config
from memorizing.data import SegmentLoader, load_corpus, tokenize_documents, train_tokenizer
from memorizing.loss import sum_nats


def main(folder: str, num_steps: int) -> None:
    """Train and print the loss."""
    documents = list(load_corpus(DataConfig(corpus=f"files:{folder}")).documents())
    tokenizer = train_tokenizer(documents, TokenizerConfig(vocab_size=512))
    config = load_config("tiny").replace([f"model.vocab_size={tokenizer.vocab_size}"]).model
    loader = SegmentLoader(
        tokenize_documents(documents, tokenizer),
        num_rows=2,
        segment_len=config.segment_len,
        start_token=tokenizer.start_token,
        seed=0,
        repeat=True,
    )
    torch.manual_seed(0)
    model = MemorizingTransformer(config)
    # Gates and scales learn at a rate of their own.
    memory_parameters = set(model.memory_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p not in memory_parameters]},
            {"params": list(memory_parameters), "lr": 1e-2, "weight_decay": 0.0},
        ],
        lr=3e-3,
    )
    state = model.init_state(num_rows=2)
    for step, batch in zip(range(1, num_steps + 1), loader, strict=False):
        state = state.start_documents(batch.doc_start)  # forgets the rows that start a document
        output = model(batch.tokens, state, valid=batch.valid)
        loss = sum_nats(output.logits, batch.targets, batch.valid) / batch.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = output.state.commit()  # the segment can be retrieved from now on
        if step % 10 == 0 or step == num_steps:
            sizes = next(iter(state.memories.values())).size.tolist()
            print(f"step {step}: {loss.item():.3f} nats a token, entries per row {sizes}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100)
