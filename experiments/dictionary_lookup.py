"""Dictionary look-up (`memorizing.data.synthetic`): how far does a memory extrapolate in entries?

Trains small models, with memory and without, on documents of 512 tokens (25 records, then questions
about them), and asks them about more and more records. The local context is one segment of 256
tokens, so that the answer to a key's first question is in the memory or nowhere. In training the
memory also holds documents read before, as distractors (`--training-blocks`; 1 turns that off).
Run again with the same settings, it goes on where it stopped.

    python experiments/dictionary_lookup.py --output runs/dictionary_lookup --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from memorizing.config import ModelConfig, TrainingConfig
from memorizing.data.synthetic import (
    BLOCK_LEN,
    NUM_SYMBOLS,
    VOCAB_SIZE,
    LookUpBatch,
    count_questions,
    make_look_up_batch,
)
from memorizing.files import write_atomically, write_json
from memorizing.loss import sum_nats
from memorizing.model import MemorizingTransformer, ModelState, RetrievalControl
from memorizing.model.block import Block
from memorizing.training.optimizer import Optimizer, group_parameters

TRAINING_RECORDS = count_questions()
"""Documents of 512 tokens: a block of records, a block of questions."""
FIRST_TRAINING_SEED = 1_000_000_000
"""Documents with lower seeds are for evaluation."""


@dataclass(frozen=True)
class Settings:
    """What is trained, besides the seed."""

    steps: int = 400
    rows: int = 8
    model_dim: int = 128
    head_dim: int = 32
    training_blocks: int = 32
    """Blocks of 25 records that the memory holds in training: the document's own and, after a sixth
    of the steps, those read before, so that a query learns to tell keys apart that are alike."""

    def to_model(self, has_memory: bool) -> ModelConfig:
        """Two layers: one to gather the tokens of a key, and one that finds the like of it."""
        return ModelConfig(
            vocab_size=VOCAB_SIZE,
            num_layers=2,
            model_dim=self.model_dim,
            num_heads=4,
            head_dim=self.head_dim,
            ffn_dim=2 * self.model_dim,
            segment_len=BLOCK_LEN,
            window=BLOCK_LEN,
            xl_cache=False,
            memory_layers=(1,),
            capacity=BLOCK_LEN * self.training_blocks if has_memory else 0,
            num_neighbors=32,
            smear_keys=True,
            induction_init=True,
            scale_init=8.0,
            gate_bias_init=1.0,
        )

    def to_training(self) -> TrainingConfig:
        """Muon for the matrices; rates that learned fastest in 100 to 150 steps."""
        return TrainingConfig(
            steps=self.steps,
            rows=self.rows,
            optimizer="muon",
            learning_rate=0.02,
            vector_learning_rate=0.01,
            gate_learning_rate=0.02,
            schedule="linear",
            warmup_steps=20,
            final_share=0.2,
        )


@dataclass(frozen=True)
class Score:
    """Share of right answers. A guess has 1 / 60."""

    first: float
    """Value tokens of the first question about a key: only the memory has them."""
    first_whole: float
    """First questions with all four tokens right."""
    again: float
    """Value tokens of later questions about a key: the answer stands in the local context too."""
    num_first: int
    """Value tokens behind `first`."""


def build_model(settings: Settings, seed: int, has_memory: bool) -> MemorizingTransformer:
    """A model that starts by looking at the tokens just before; with a memory or without it.

    Both start with the same weights. Head h of the first layer starts with a position bias of -2^-h
    per token of distance (Press et al. 2022, ALiBi): gathering the tokens of a key begins with
    looking nearby, and without this start it is most of what has to be learned.
    """
    torch.manual_seed(seed)
    model = MemorizingTransformer(settings.to_model(has_memory))
    gathering = model.blocks[0]
    assert isinstance(gathering, Block)
    with torch.no_grad():
        for head, biases in enumerate(gathering.attention.position_bias.table):
            biases.copy_(-(2.0**-head) * torch.arange(len(biases)))
    return model


def read_records(
    model: MemorizingTransformer, records: Sequence[LookUpBatch], state: ModelState
) -> ModelState:
    """The state after reading blocks of records: in memory, if the state has one.

    With the memory closed and without gradient: entries of the only memory layer come from the
    layer below it, and nothing of the records counts in the loss.
    """
    with torch.no_grad():
        for segment in records:
            state = model(segment.tokens, state, memory_open=False).state.commit()
    return state


def train_model(
    settings: Settings, seed: int, has_memory: bool, log_every: int = 0
) -> MemorizingTransformer:
    """Train a model on documents that it sees once each; the same ones for both arms of a seed."""
    model = build_model(settings, seed, has_memory)
    config = settings.to_training()
    groups = group_parameters(model, [model.embedding.weight], model.memory_parameters())
    optimizer = Optimizer(groups, config)
    state = model.init_state(config.rows)
    every_row = torch.ones(config.rows, dtype=torch.bool)
    start = time.perf_counter()
    for step in range(1, config.steps + 1):
        first = FIRST_TRAINING_SEED * (seed + 1) + step * config.rows
        batch = make_look_up_batch(range(first, first + config.rows), TRAINING_RECORDS)
        records, questions = batch.iterate_segments(BLOCK_LEN)
        if settings.training_blocks == 1 or step <= config.steps // 6:
            state = state.start_documents(every_row)
        state = read_records(model, [records], state)
        # Of the questions nothing is kept: their state is dropped, uncommitted.
        logits = model(questions.tokens, state).logits
        loss = sum_nats(logits, questions.targets, questions.valid) / questions.valid.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.set_step(step)
        optimizer.step()
        optimizer.zero_grad()
        if log_every and step % log_every == 0:
            score = compute_score(logits, questions)
            seconds = time.perf_counter() - start
            print(
                f"  step {step}: {loss:.3f} nats, first questions {score.first:.1%}, "
                f"{seconds:.0f} s",
                flush=True,
            )
    return model


def compute_score(logits: torch.Tensor, questions: LookUpBatch) -> Score:
    """Which answers were right; every token is predicted after the right ones before it."""
    right = (logits.argmax(-1) == questions.targets)[questions.valid]
    right = right.view(*questions.is_first.shape, -1)
    first, again = right[questions.is_first], right[~questions.is_first]
    return Score(
        first.float().mean().item(),
        first.all(-1).float().mean().item(),
        again.float().mean().item(),
        first.numel(),
    )


@torch.no_grad()
def evaluate_model(
    model: MemorizingTransformer,
    num_records: int,
    num_documents: int,
    *,
    other_document: bool = False,
    rows: int = 8,
) -> Score:
    """Answers about documents never trained on. The memory holds a document's records, all of them.

    Args:
        model: with memory or without.
        num_records: of each document.
        num_documents: with seeds from 0 on; a multiple of `rows` or fewer.
        other_document: a control: every document reads the memory of another.
        rows: documents read side by side.
    """
    rows = min(rows, num_documents)
    has_memory = model.config.has_memory
    control = RetrievalControl(donor_rows=torch.arange(rows).roll(1)) if other_document else None
    logits, batches = [], []
    for first in range(0, num_documents, rows):
        batch = make_look_up_batch(range(first, first + rows), num_records)
        *records, questions = batch.iterate_segments(BLOCK_LEN)
        # Without a memory, blocks before the last cannot reach the questions.
        capacity = len(records) * BLOCK_LEN if has_memory else 0
        state = model.init_state(rows, capacity=capacity)
        state = read_records(model, records if has_memory else records[-1:], state)
        logits.append(model(questions.tokens, state, control=control).logits)
        batches.append(questions)
    merged = LookUpBatch(
        *(torch.cat([getattr(b, name) for b in batches]) for name in LookUpBatch.__annotations__)
    )
    return compute_score(torch.cat(logits), merged)


def _iterate_measurements(
    lengths: list[int], tokens: int
) -> Iterator[tuple[str, bool, bool, int, int, int]]:
    """Name, memory, other document's memory, records, documents and rows of what is measured."""
    for length in lengths:
        num_records = (length // BLOCK_LEN - 1) * count_questions()
        rows = max(1, min(4, 2**18 // length))
        documents = max(4, min(32, tokens // length)) // rows * rows
        yield f"memory/{length}", True, False, num_records, documents, rows
        yield f"without/{length}", False, False, num_records, documents, rows
        if length == min(lengths):
            yield f"other_document/{length}", True, True, num_records, documents, rows


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Dictionary look-up with and without memory")
    defaults = Settings()
    parser.add_argument("--output", type=Path, default=Path("runs/dictionary_lookup"))
    parser.add_argument("--seeds", default="0,1,2", help="initialization and training documents")
    parser.add_argument("--lengths", default="512,2048,8192,32768,65536,131072,262144")
    parser.add_argument(
        "--tokens", type=int, default=2**19, help="read per length, in 4 to 32 documents"
    )
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args()


def _open_results(path: Path, settings: Settings) -> dict:
    """What an earlier run of the same settings has measured."""
    if not path.exists():
        return {"settings": asdict(settings), "chance": 1 / NUM_SYMBOLS, "scores": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["settings"] != asdict(settings):
        raise SystemExit(
            f"{path} has the settings {results['settings']}, asked for are {asdict(settings)}; "
            "choose another --output"
        )
    return results


def _get_model(
    settings: Settings, seed: int, has_memory: bool, folder: Path
) -> MemorizingTransformer:
    """Train a model and keep its weights, or take those that were kept."""
    arm = "memory" if has_memory else "without"
    path = folder / f"seed-{seed}-{arm}.safetensors"
    if path.exists():
        model = build_model(settings, seed, has_memory)
        model.load_state_dict(load_file(path))
        return model
    print(f"seed {seed}, {arm}: training", flush=True)
    model = train_model(settings, seed, has_memory, log_every=max(1, settings.steps // 5))
    write_atomically(path, save(model.state_dict()))
    return model


def _print_table(scores: dict[str, dict[str, dict]], names: list[str]) -> None:
    print("\nfirst questions: value tokens right (all four right), by seed")
    for name in names:
        arm, _, length = name.partition("/")
        cells = [f"{s[name]['first']:.1%} ({s[name]['first_whole']:.1%})" for s in scores.values()]
        print(f"{int(length):>9,} tokens  {arm:<15} {'  '.join(cells)}")


def main() -> None:
    """Train and measure what is not measured yet; print the table."""
    arguments = _parse_arguments()
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "result.json"
    results = _open_results(path, settings)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    if any(length % BLOCK_LEN or length < 2 * BLOCK_LEN for length in lengths):
        raise SystemExit(
            f"--lengths are {lengths}; give multiples of {BLOCK_LEN}, at least two blocks"
        )
    measurements = list(_iterate_measurements(lengths, arguments.tokens))
    seeds = arguments.seeds.split(",")
    for seed in seeds:
        models = {m: _get_model(settings, int(seed), m, arguments.output) for m in (True, False)}
        scores = results["scores"].setdefault(seed, {})
        for name, has_memory, other, num_records, documents, rows in measurements:
            if name in scores:
                continue
            start = time.perf_counter()
            score = evaluate_model(
                models[has_memory], num_records, documents, other_document=other, rows=rows
            )
            seconds = time.perf_counter() - start
            scores[name] = asdict(score) | {
                "records": num_records,
                "documents": documents,
                "seconds": seconds,
            }
            write_json(path, results)
            print(f"seed {seed}, {name}: {score.first:.1%} ({seconds:.0f} s)", flush=True)
    _print_table({s: results["scores"][s] for s in seeds}, [name for name, *_ in measurements])


if __name__ == "__main__":
    main()
