"""What runs on a GPU agrees with the CPU. Skipped where there is none.

Products on a GPU are summed in another order: results agree to a few fp32 roundings, and the same
neighbors are found where scores do not tie.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from memorizing.benchmark.indexes import DelegatingIndex
from memorizing.config import TrainingConfig
from memorizing.data import SegmentLoader, TokenizedDocument
from memorizing.data.synthetic.records import make_pairs_batch
from memorizing.errors import ConfigError, NonFiniteQueryError
from memorizing.evaluation import evaluate_capacities
from memorizing.evaluation.answers import answer_questions
from memorizing.huggingface import open_memory
from memorizing.index_settings import parse_index
from memorizing.knn import Neighbors, StoredKeys
from memorizing.loss import sum_nats
from memorizing.memory import FrozenMemory, Memory
from memorizing.model import MemorizingTransformer
from memorizing.training import Trainer, list_checkpoints, load_model
from memorizing.training.finetuning.finetuner import Finetuner
from memorizing.training.finetuning.settings import FinetuneSettings
from memorizing.training.questions import build_gathering_model
from tests.evaluation.test_answers import CONFIG as ANSWERING
from tests.huggingface import tools as huggingface
from tests.huggingface.own_model.tools import make_own
from tests.knn.ring import Ring, draw_keys
from tests.model.tools import SMALL, make_model, make_tokens
from tests.training.finetuning import tools as finetuning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
ROWS, HEADS, CAPACITY, DIM, QUERIES, K = 3, 2, 61, 17, 5, 7
KINDS: list[dict[str, Any]] = [
    {},
    {"combine": "joint"},
    {"smear_keys": False, "conv_len": 4, "induction_init": True},
    {"combine": "joint", "smear_keys": False, "conv_len": 3},
]
TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


class OnDevice(DelegatingIndex):
    """Searches on the GPU for a caller that is on the CPU."""

    def search(
        self,
        queries: Tensor,
        stored: StoredKeys,
        num_neighbors: int,
        *,
        num_hidden: Tensor | None = None,
        key_rows: Sequence[int | None] | None = None,
    ) -> Neighbors:
        found = self.index.search(
            queries.to(DEVICE), stored, num_neighbors, num_hidden=num_hidden, key_rows=key_rows
        )
        assert found.slots.device.type == DEVICE.type
        return Neighbors(found.slots.cpu(), found.scores.cpu(), found.valid.cpu())


class DeviceRing(Ring):
    """The ring beside a deque, whose index sees the keys on the GPU."""

    def __init__(self, index: str, dtype: torch.dtype) -> None:
        super().__init__(index, (ROWS, HEADS, CAPACITY, DIM), dtype)
        self.index = OnDevice(self.index)

    @property
    def stored(self) -> StoredKeys:
        return StoredKeys(self.keys.to(DEVICE), tuple(self.num_appended))


INDEXES = ["exact", "buckets:num_buckets=23", "faiss_flat:block_len=13"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", INDEXES)
def test_a_search_agrees_with_a_deque(index: str, dtype: torch.dtype) -> None:
    if index.startswith("faiss") and importlib.util.find_spec("faiss") is None:
        pytest.skip("faiss is not installed")
    ring = DeviceRing(index, dtype)
    queries = draw_keys(ROWS, HEADS, QUERIES, DIM, seed=1)
    least = 0.7 if index.startswith("buckets") else 0.9
    for step, length in enumerate((3, 11, 53, 7, 97)):
        ring.append(draw_keys(ROWS, HEADS, length, DIM, seed=step + 2))
        ring.search(queries, K)
        ring.search(queries, K, torch.tensor([[0, 1, 5, 60, 61]] * ROWS))
    ring.reset(1)
    ring.append(draw_keys(ROWS, HEADS, 2, DIM, seed=9), rows=[1])
    ring.search(queries, K)
    ring.search(queries, K, key_rows=[2, None, 1])
    found = ring.index.search(queries, ring.stored, K)
    true = torch.matmul(queries.to(dtype).float(), ring.keys.float().mT)[0]
    kth = true.topk(K).values[..., -1:]
    rounding = torch.finfo(dtype).eps * kth.abs() + 1e-5
    assert ((true.gather(-1, found.slots[0]) >= kth - rounding).float().mean()) >= least


def test_a_search_with_many_queries_and_keys_equals_that_of_the_cpu() -> None:
    memories = [Memory(2, 3, 4099, DIM, torch.float32, device) for device in (CPU, DEVICE)]
    keys, queries = draw_keys(2, 3, 5003, DIM), draw_keys(2, 3, 211, DIM, seed=1)
    found = []
    for memory in memories:
        device = memory.keys.device
        memory.append(keys.to(device), keys.to(device))
        found.append(memory.retrieve(queries.to(device), 32).neighbors)
    torch.testing.assert_close(found[1].scores.cpu(), found[0].scores, rtol=1e-5, atol=1e-6)
    assert (found[1].slots.cpu() == found[0].slots).float().mean() > 0.999


def test_a_query_that_is_not_finite_is_refused() -> None:
    memory = Memory(1, HEADS, CAPACITY, DIM, torch.float32, DEVICE)
    queries = torch.full((1, HEADS, 1, DIM), float("nan"), device=DEVICE)
    with pytest.raises(NonFiniteQueryError, match="query 0 of row 0, head 0"):
        memory.retrieve(queries, K)


def test_an_index_that_needs_a_cpu_is_refused() -> None:
    memory = Memory(1, HEADS, CAPACITY, DIM, torch.float32, DEVICE, parse_index("int8"))
    keys = draw_keys(1, HEADS, 3, DIM).to(DEVICE)
    with pytest.raises(ConfigError, match="int8 searches on a CPU"):
        memory.append(keys, keys)


def use_memory(device: torch.device, dtype: torch.dtype) -> tuple[Memory, list[Tensor]]:
    """Appends with and without a mask, wraps around, resets, and every way to retrieve."""
    memory = Memory(ROWS, HEADS, CAPACITY, DIM, dtype, device)
    queries = draw_keys(ROWS, 3 * HEADS, QUERIES, DIM, seed=1).to(device)
    results = []

    def keep(**how: Any) -> None:
        found = memory.retrieve(queries, K, **how)
        positions = memory.compute_positions(
            found.neighbors.slots.view(ROWS, HEADS, -1, K), how.get("donor_rows")
        )
        results.extend([found.neighbors.slots, found.neighbors.valid, positions])
        results.extend([found.fetch_keys().float(), found.fetch_values().float()])

    for step, length in enumerate((5, 41, 31, 2, 67)):
        keys, values = (
            draw_keys(ROWS, HEADS, length, DIM, seed=seed).to(device) for seed in (step, step + 50)
        )
        valid = torch.rand(ROWS, length, generator=torch.Generator().manual_seed(step)) < 0.8
        memory.append(keys, values, valid if step % 2 else None)
        keep()
        keep(num_hidden=torch.tensor([[0, 1, 2, 7, 61]] * ROWS))
        keep(is_open=torch.tensor([True, False, True]))
        keep(donor_rows=torch.tensor([1, 2, 0]), value_seed=step)
        if step == 2:
            memory.reset(torch.tensor([False, True, False]))
            keep()
    return memory, [part.cpu() for part in results]


def test_a_memory_does_what_it_does_on_the_cpu() -> None:
    mine, results = use_memory(DEVICE, torch.float32)
    other, expected = use_memory(CPU, torch.float32)
    for found, wanted in zip(results, expected, strict=True):
        assert torch.equal(found, wanted)
    for name, tensor in other.state_dict().items():
        assert torch.equal(mine.state_dict()[name].cpu(), tensor)
    chosen = mine.select_rows(torch.tensor([2, 0]))
    assert torch.equal(chosen.keys.cpu(), other.keys[[2, 0]])
    loaded = Memory(ROWS, HEADS, CAPACITY, DIM, torch.float32)
    loaded.load_state_dict(mine.state_dict())
    assert torch.equal(loaded.values, other.values)
    assert torch.equal(copy.deepcopy(mine).keys, mine.keys)


def test_a_memory_of_bf16_stores_what_it_stores_on_the_cpu() -> None:
    mine, other = use_memory(DEVICE, torch.bfloat16)[0], use_memory(CPU, torch.bfloat16)[0]
    assert torch.equal(mine.keys.cpu(), other.keys)
    assert torch.equal(mine.values.cpu(), other.values)


def test_a_frozen_memory_finds_what_it_finds_on_the_cpu() -> None:
    keys, values = (draw_keys(1, HEADS, 97, DIM, seed=seed)[0] for seed in (0, 1))
    queries = draw_keys(ROWS, 2 * HEADS, QUERIES, DIM, seed=2)
    found = []
    for device in (CPU, DEVICE):
        memory = FrozenMemory.from_tensors(keys.to(device), values.to(device))
        for is_open in (None, torch.tensor([True, False, True])):
            (part,) = memory.retrieve(queries.to(device), K, is_open)
            found.append((part.neighbors.slots.cpu(), part.fetch_values().cpu()))
    for mine, other in zip(found[2:], found[:2], strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])


def read_documents(
    device: torch.device, **kind: Any
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Logits of several segments, gradients and the last state; a document starts, one is short."""
    model = make_model(dtype=torch.float32, **kind).to(device)
    tokens = make_tokens(ROWS, 6 * SMALL.segment_len).to(device)
    state, logits = model.init_state(ROWS), []
    lines = torch.arange(SMALL.segment_len)
    ends = torch.stack([lines >= 0, lines < 5, lines >= 2])
    for number, part in enumerate(tokens.split(SMALL.segment_len, 1)):
        if number == 3:
            state = state.start_documents(torch.tensor([False, True, False]))
        valid = ends if number == 5 else torch.ones_like(ends)
        output = model(part, state, valid=valid if number == 5 else None)
        sum_nats(output.logits, part.roll(-1, 1), valid.to(device)).backward()
        logits.append(output.logits.detach().cpu()[valid])
        state = output.state.commit()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return logits, gradients, {name: part.cpu() for name, part in state.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_gradients_and_state_are_those_of_the_cpu(kind: dict[str, Any]) -> None:
    mine, expected = read_documents(DEVICE, **kind), read_documents(CPU, **kind)
    torch.testing.assert_close(mine[0], expected[0], **TOLERANCE)
    # Summed over all tokens of all segments.
    torch.testing.assert_close(mine[1], expected[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine[2], expected[2], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_decoding_token_by_token_gives_the_logits_of_whole_segments(kind: dict[str, Any]) -> None:
    model = make_model(dtype=torch.float32, **kind).to(DEVICE).eval()
    tokens = make_tokens(2, 5 * SMALL.segment_len).to(DEVICE)
    logits = []
    with torch.inference_mode():
        for length in (SMALL.segment_len, 1):
            state, parts = model.init_state(2), []
            for part in tokens.split(length, 1):
                output = model(part, state)
                state = output.state.commit()
                parts.append(output.logits)
            logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(logits[1], logits[0], **TOLERANCE)


def make_documents() -> list[TokenizedDocument]:
    """Documents that repeat themselves, so that there is something to learn."""
    rng = np.random.default_rng(0)
    return [
        TokenizedDocument(f"d{n}", np.resize(rng.integers(1, 29, 19), n).astype(np.int32), n)
        for n in (67, 17, 29, 73, 5, 41, 53)
    ]


def make_trainer(run_dir: Path | None, losses: list[float], **changes: Any) -> Trainer:
    values = {
        "steps": 24, "rows": 4, "accumulation": 2, "warmup_steps": 2, "learning_rate": 1e-2,
        "precision": "fp32", "memory_closed_share": 0.3, "restart_share": 0.2,
        "evaluate_every": 8, "evaluate_tokens": 97,
    } | changes  # fmt: skip
    config = TrainingConfig(**values)
    torch.manual_seed(0)
    kind = {"dropout": 0.1, "memory_dtype": "bfloat16" if config.precision == "bf16" else "float32"}
    model = MemorizingTransformer(dataclasses.replace(SMALL, **kind)).to(DEVICE)
    documents = make_documents()
    loader = SegmentLoader(documents, config.rows, SMALL.segment_len, 0, config.seed, repeat=True)
    return Trainer(
        model,
        loader,
        config,
        run_dir=run_dir,
        validation=documents[:3],
        on_step=lambda metrics: losses.append(metrics.nats / metrics.num_targets),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"optimizer": "muon"},
        {"optimizer": "adafactor", "learning_rate": 3e-2},
        {"gradient_checkpointing": True},
        {
            "crossbatch_share": 0.5,
            "crossbatch_segments": 2,
            "crossbatch_rows": 2,
            "accumulation": 1,
        },
    ],
    ids=str,
)
def test_training_lowers_the_loss(changes: dict[str, Any]) -> None:
    losses: list[float] = []
    result = make_trainer(None, losses, **changes).run()
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.05
    assert result.validation_nats is not None


def test_training_resumes_where_it_was_and_its_checkpoint_loads_on_the_cpu(tmp_path: Path) -> None:
    whole: list[float] = []
    make_trainer(tmp_path / "whole", whole).run()
    parts: list[float] = []
    make_trainer(tmp_path / "parts", parts).run(until=11)
    saved = list_checkpoints(tmp_path / "parts")[-1]
    resumed = make_trainer(tmp_path / "parts", parts)
    resumed.load(saved)
    for file, tensors in (
        ("model", resumed.model.state_dict()),
        ("optimizer", resumed.optimizer.state_dict()[0]),
    ):
        expected = load_file(saved / f"{file}.safetensors")
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in tensors.items())
    resumed.run()
    # Sums over rows of the same table (position bias, embedding) are in no fixed order on a GPU.
    np.testing.assert_allclose(parts, whole, rtol=1e-3)
    results = []
    for device in (CPU, DEVICE):
        model = load_model(tmp_path / "whole", device=device).model
        assert model.embedding.weight.device.type == device.type
        results.append(evaluate(model))
    np.testing.assert_allclose(results[1], results[0], **TOLERANCE)


def evaluate(model: MemorizingTransformer) -> np.ndarray:
    """Nats of all tokens, with several memories and wrong ones."""
    results = evaluate_capacities(
        model,
        make_documents(),
        0,
        capacities=(0, 13, 53),
        controls=("off", "other_document", "shuffled"),
        rows=3,
    )
    return np.concatenate([d.token_nats for result in results.values() for d in result.documents])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_evaluations_and_controls_are_those_of_the_cpu(kind: dict[str, Any]) -> None:
    nats = [
        evaluate(make_model(dtype=torch.float32, **kind).to(device)) for device in (CPU, DEVICE)
    ]
    np.testing.assert_allclose(nats[1], nats[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("control", [None, "off", "other_document", "shuffled"])
def test_answers_are_those_of_the_cpu(control: Any) -> None:
    batch = make_pairs_batch(range(4), 2, ANSWERING.segment_len, num_questions=3)
    found = []
    # With keys of bf16, which of those that tie are found is open.
    config = dataclasses.replace(ANSWERING, memory_dtype="float32")
    for device in (CPU, DEVICE):
        model = build_gathering_model(config, seed=0).to(device)
        found.append(answer_questions(model, batch, control=control))
    torch.testing.assert_close(found[1].nats, found[0].nats, **TOLERANCE)


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_llama_with_memory_reads_and_writes_as_on_the_cpu(
    implementation: str, combine: str
) -> None:
    tokens = huggingface.make_tokens(2, 5 * huggingface.SEGMENT_LEN + 3)
    logits, written = [], []
    for device in (CPU, DEVICE):
        model = huggingface.make_model("llama", implementation)
        huggingface.give_memory(model, combine=combine)
        model.to(device)
        with open_memory(model), torch.no_grad():
            logits.append(huggingface.read(model, tokens.to(device), [13, 1, 7]).cpu())
        with open_memory(model):
            written.append(
                model.generate(tokens.to(device), max_new_tokens=17, do_sample=False).cpu()
            )
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(written[1], written[0])


def test_our_model_generates_what_it_generates_on_the_cpu() -> None:
    tokens = make_tokens(2, 23)
    written = [
        make_own().to(device).generate(tokens.to(device), max_new_tokens=17, do_sample=False).cpu()
        for device in (CPU, DEVICE)
    ]
    assert torch.equal(written[1], written[0])


@pytest.mark.parametrize("train", ["gates", "lora"])
def test_finetuning_takes_the_steps_of_the_cpu(train: str, tmp_path: Path) -> None:
    if train == "lora" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    documents = finetuning.make_documents(61, 47, 53, 29)
    settings = FinetuneSettings(
        steps=3, rows=2, train=train, warmup_steps=1, evaluate_every=0, gate_learning_rate=0.1
    )
    losses: list[list[float]] = [[], []]
    for device, found in zip((CPU, DEVICE), losses, strict=True):
        model = finetuning.make_model().to(device)
        Finetuner(
            model,
            documents,
            finetuning.START,
            settings,
            run_dir=tmp_path / device.type,
            on_step=lambda metrics, found=found: found.append(metrics.nats / metrics.num_targets),
        ).run()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
