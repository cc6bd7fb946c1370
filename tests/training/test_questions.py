"""Training on documents with questions, where the answers alone count."""

import dataclasses
from pathlib import Path

import pytest
import torch

from memorizing.config import TrainingConfig
from memorizing.data.synthetic.batch import QuestionBatch
from memorizing.data.synthetic.records import make_pairs_batch
from memorizing.model import MemorizingTransformer
from memorizing.training.questions import QuestionStep, build_gathering_model, train_on_questions
from tests.evaluation.test_answers import BLOCK_LEN, CONFIG

TRAINING = TrainingConfig(
    steps=7, rows=2, optimizer="muon", learning_rate=0.02, warmup_steps=1, checkpoint_every=3
)


def make_step(step: int, seeds) -> QuestionBatch:
    return make_pairs_batch(seeds, 1 + step % 2, BLOCK_LEN, num_questions=3)


def test_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path):
    def train(folder: Path | None, stop_at: int = 0) -> tuple[MemorizingTransformer, list[int]]:
        taken: list[int] = []

        def on_step(step: QuestionStep) -> None:
            taken.append(step.step)
            if step.step == stop_at:
                raise KeyboardInterrupt

        model = build_gathering_model(CONFIG, seed=0)
        train_on_questions(
            model, TRAINING, make_step, keeps_documents=True, folder=folder, on_step=on_step
        )
        return model, taken

    whole, _ = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=5)
    resumed, taken = train(tmp_path)
    assert taken == [4, 5, 6, 7]  # the checkpoint was written after step 3
    again, nothing = train(tmp_path)
    assert not nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
        assert torch.equal(weight, again.state_dict()[name]), name


def test_kept_documents_are_distractors_in_training():
    # The memory of three blocks holds two earlier documents beside the own one from step 2 on.
    losses: dict[bool, list[float]] = {True: [], False: []}
    for keeps, seen in losses.items():
        train_on_questions(
            build_gathering_model(CONFIG, seed=0),
            dataclasses.replace(TRAINING, steps=6),
            make_step,
            keeps_documents=keeps,
            on_step=lambda step, seen=seen: seen.append(step.nats),
        )
    assert losses[True][0] == losses[False][0]
    assert losses[True][1] != losses[False][1]
