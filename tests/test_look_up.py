"""What a memory is for, learned from nothing: dictionary look-up, with memory and without.

The model and its training are those of `experiments/dictionary_lookup.py`, with fewer steps.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "dictionary_lookup.py"
NUM_STEPS = 100
"""A tenth of a second each on one core; seeds 0 to 3 then answer 98% to 99% of first questions."""


@pytest.fixture(scope="module")
def experiment() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXPERIMENT.parent))  # it imports modules beside it, as a script does
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("dictionary_lookup", EXPERIMENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXPERIMENT.parent))
        del sys.modules[spec.name]
        torch.set_num_threads(threads)


@pytest.mark.parametrize("has_memory", [True, False], ids=["with memory", "without"])
def test_a_tiny_model_learns_dictionary_look_up_with_memory_and_not_without(
    experiment: ModuleType, has_memory: bool
):
    # Local context is the block of questions: the value tokens of a key's first question stand in
    # the memory only. Both arms start with the same weights and read the same documents; a guess is
    # right once in 60.
    settings = experiment.Settings(steps=NUM_STEPS, model_dim=64, head_dim=16, training_blocks=1)
    model = experiment.train_model(settings, seed=0, has_memory=has_memory)
    (score,) = experiment.evaluate_model(model, experiment.TRAINING_RECORDS, num_documents=32)
    if has_memory:
        assert score.first > 0.9
        # The knowledge is in the entries, not in the weights.
        (wrong,) = experiment.evaluate_model(
            model, experiment.TRAINING_RECORDS, num_documents=32, control="other_document"
        )
        assert wrong.first < 0.15
    else:
        # It learned to look up what its context holds, and that is all it can do.
        assert score.again > 0.9
        assert score.first < 0.15
