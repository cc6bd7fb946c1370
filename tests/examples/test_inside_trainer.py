import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing.data import SegmentLoader
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.finetuner import Finetuner
from tests.training.finetuning.tools import SEGMENT_LEN, START, make_documents, make_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "inside_trainer.py"
DOCUMENTS = make_documents(3 * SEGMENT_LEN, 47, 5 * SEGMENT_LEN + 1, 2)


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("inside_trainer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rows", [1, 3])
def test_the_trainer_learns_as_finetuning_does(example: Any, rows: int, tmp_path: Path):
    steps, expected = 7, []
    settings = FinetuneSettings(
        train="all", steps=steps, rows=rows, learning_rate=1e-3, gate_learning_rate=1e-1,
        schedule="constant", warmup_steps=0, weight_decay=0.0, evaluate_every=0,
    )  # fmt: skip
    Finetuner(
        make_model(),
        DOCUMENTS,
        START,
        settings,
        on_step=lambda m: expected.append(m.nats / m.num_targets),
    ).run()
    model = make_model()
    loader = SegmentLoader(DOCUMENTS, rows, SEGMENT_LEN, START, seed=0, repeat=True)

    def make_optimizer(model: Any, rate: float) -> torch.optim.Optimizer:
        optimizer = make(model, rate)
        for group in optimizer.param_groups:
            group |= {"betas": (0.9, 0.95), "weight_decay": 0.0}
        return optimizer

    make, example.make_optimizer = example.make_optimizer, make_optimizer
    try:
        losses = example.train(model, loader, steps, 1e-3, str(tmp_path))
    finally:
        example.make_optimizer = make
    assert losses == pytest.approx(expected, abs=2e-4)
    assert not get_attachment(model).is_bound
