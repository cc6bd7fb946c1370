"""The settings of `synthetic.py`: what each task is trained on, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from small_models import SHARPNESS, SmallModel

from memorizing.config import Control
from memorizing.data.synthetic.batch import QuestionBatch
from memorizing.data.synthetic.needles import make_needles_batch, make_tracking_batch
from memorizing.data.synthetic.records import (
    RECALL_VOCAB_SIZE,
    make_pairs_batch,
    make_recall_batch,
    make_strings_batch,
)


@dataclass(frozen=True)
class Cell:
    """What is read before the questions."""

    num_blocks: int
    sizes: dict[str, int] = field(default_factory=dict)
    """Further arguments of the task's generator."""
    num_documents_read: int = 1
    """Documents in the memory: the own one is read last."""
    control: Control | None = None

    def __str__(self) -> str:
        """The name of the cell in results."""
        parts = [f"{self.num_blocks} blocks", *(f"{k[4:]} {v}" for k, v in self.sizes.items())]
        if self.num_documents_read > 1:
            parts.append(f"{self.num_documents_read} documents")
        return ", ".join([*parts, *([self.control] if self.control else [])])


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    has_memory: bool = True
    num_kept: int = 1
    """Documents that the memory holds in training: the own one and those read before."""
    is_trained: bool = True


WITHOUT = Arm("without", has_memory=False)


@dataclass(frozen=True)
class Task:
    """A task: how it is trained and on what it is measured.

    Training begins with documents of one block, where the right entry is among the 32 nearest often
    enough to be learned from, and asks twice, so that keys get a gradient from local attention.

    Names of needles, variables and keys are unique in a document. Where they are so rare that
    other documents hardly ever have the same (pairs, strings), earlier documents stay in the memory
    in training, as distractors; where not, documents are longer instead.
    """

    name: str
    generate: Callable[..., QuestionBatch]
    start: dict[str, int]
    """Sizes of documents of one block, in the first third of the steps."""
    train: Cell
    """The documents after that."""
    cells: tuple[Cell, ...]
    arms: tuple[Arm, ...] = (Arm("memory"), WITHOUT)
    has_controls: bool = True
    block_len: int = 128
    model: SmallModel = SmallModel(steps=200)
    sharpness: float = SHARPNESS
    """By which the memory's scale is multiplied after training."""
    least_asked: int = 128
    """Questions of a cell, all documents and one seed together."""

    def make(self, seeds: Sequence[int], cell: Cell) -> QuestionBatch:
        """One document per seed."""
        return self.generate(seeds, cell.num_blocks, self.block_len, **cell.sizes)

    def choose_cell(self, step: int) -> Cell:
        """What is read in a training step."""
        return Cell(1, self.start) if step <= self.model.steps // 3 else self.train

    def list_cells(self, arm: Arm) -> list[Cell]:
        """What an arm is measured on: controls on what it was trained on, with the memory only."""
        if not arm.has_memory:
            return [self.train]
        names: tuple[Control, ...] = ("off", "other_document", "shuffled")
        controls = names if self.has_controls else ()
        wrong = [Cell(self.train.num_blocks, self.train.sizes, control=name) for name in controls]
        return [*self.cells, *wrong]

    def describe(self) -> dict:
        """All settings, as JSON holds them."""
        values = asdict(self)
        values["generate"] = self.generate.__name__
        for name in ("cells", "arms"):
            values[name] = list(values[name])
        return values


def _sweep(lengths: Sequence[int], **sizes: int) -> tuple[Cell, ...]:
    return tuple(Cell(num_blocks, sizes) for num_blocks in lengths)


_FAR = (4, 16, 64, 256)
"""Blocks of 128: 512 tokens, as in training, to 32,768."""
_PAIRS = {"num_questions": 16}
_TRAINING_PAIRS = {"num_questions": 9, "num_repeats": 2}
_REWRITE = _TRAINING_PAIRS | {"num_writes": 2}
_NEEDLES = {"num_needles": 7, "num_questions": 7, "num_repeats": 2}
_CHAINS = {"num_chains": 4, "num_hops": 2}
_RECALL = {"num_pairs": 64, "num_questions": 32, "num_repeats": 2}

_ALL = (
    Task(
        "pairs",
        make_pairs_batch,
        _TRAINING_PAIRS,
        Cell(4, _TRAINING_PAIRS),
        _sweep((*_FAR, 1024), **_PAIRS),
        arms=(Arm("memory", num_kept=8), WITHOUT),
    ),
    Task(
        # How often a key is written, at two lengths: 1 is plain retrieval by the same model. A
        # model that cannot tell which record was last is right once in as many times.
        "rewrite",
        make_pairs_batch,
        _REWRITE,
        Cell(4, _REWRITE),
        tuple(Cell(n, _PAIRS | {"num_writes": w}) for n in (4, 32) for w in (1, 2, 4)),
    ),
    Task(
        # One needle is the passkey task. The others are asked for 8 of theirs.
        "needles",
        make_needles_batch,
        _NEEDLES,
        Cell(8, _NEEDLES),
        (
            *_sweep((8, *_FAR[1:]), num_needles=1),
            *(
                Cell(blocks, {"num_needles": needles, "num_questions": 8})
                for blocks, needles in ((8, 16), (64, 16), (64, 128), (256, 16), (256, 512))
            ),
        ),
    ),
    Task(
        "tracking",
        make_tracking_batch,
        _CHAINS | {"num_repeats": 2},
        Cell(8, _CHAINS | {"num_repeats": 2}),
        (
            *_sweep((8, *_FAR[1:]), **_CHAINS),
            *(Cell(8, {"num_chains": 4, "num_hops": hops}) for hops in (1, 4, 8)),
            Cell(256, {"num_chains": 4, "num_hops": 8}),
        ),
    ),
    Task(
        "strings",
        make_strings_batch,
        {"num_questions": 5, "num_repeats": 2},
        Cell(2, {"num_questions": 5, "num_repeats": 2}),
        _sweep((2, 8, 32, 128), num_questions=8),
        arms=(Arm("memory", num_kept=16), WITHOUT),
        block_len=256,
    ),
    Task(
        # MQAR's largest, 64 pairs in 512 tokens, then more pairs and longer documents.
        "recall",
        make_recall_batch,
        _RECALL,
        Cell(3, _RECALL),
        (
            Cell(3, {"num_pairs": 64}),
            *(Cell(16, {"num_pairs": pairs}) for pairs in (64, 1024)),
            *(Cell(64, {"num_pairs": pairs}) for pairs in (64, 4092)),
            Cell(1024, {"num_pairs": 4092}),
        ),
        model=SmallModel(steps=200, vocab_size=RECALL_VOCAB_SIZE),
    ),
    Task(
        # Focused Transformer, section 3.3: d documents in one memory.
        "distraction",
        make_pairs_batch,
        _TRAINING_PAIRS,
        Cell(4, _TRAINING_PAIRS),
        tuple(Cell(4, _PAIRS, num_documents_read=d) for d in (1, 4, 16, 64, 256)),
        arms=(Arm("untrained", is_trained=False), Arm("alone"), Arm("negatives", num_kept=16)),
        has_controls=False,
        sharpness=1.0,
    ),
)

TASKS = {task.name: task for task in _ALL}
"""By the name that `--task` takes."""
