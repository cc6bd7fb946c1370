"""What a memory is for, learned from nothing: dictionary look-up, with memory and without.

The model and its training are those of `experiments/dictionary_lookup.py`, with fewer steps. What
that script has measured it does not measure again, and several processes may share the work.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "dictionary_lookup.py"
NUM_STEPS = 44
"""A quarter of a second each on one core; 42 answer 96% of first questions."""


@pytest.fixture(scope="module")
def experiment() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXPERIMENT.parent))  # it imports modules beside it, as a script does
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


def test_each_seed_is_measured_once_on_documents_of_its_own(
    experiment: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(experiment, "_MOST_DOCUMENTS", 8)
    settings = experiment.Settings(steps=2, model_dim=16, head_dim=8, training_blocks=2)
    monkeypatch.setitem(experiment.RECIPES, "untrained", settings)
    plan = experiment.Plan((512, 1024), (1.0, 3.0), has_controls=True)
    cpu = torch.device("cpu")
    for seed in (3, 5):
        experiment.run_seed("untrained", seed, plan, tmp_path, cpu)
    results = experiment.collect("untrained", [3, 5], plan, tmp_path)
    arms = ["memory", "memory_x3", "without"]
    expected = [f"{arm}/512" for arm in (*arms, "other_document")]
    expected += [f"{arm}/1024" for arm in arms]
    for scores in results["scores"].values():
        assert list(scores) == expected
        for score in scores.values():
            assert score["documents"] == 8
            assert score["first"] < 0.1
    # Which keys a block of questions asks twice depends on the documents.
    counts = [scores["memory/512"]["num_first"] for scores in results["scores"].values()]
    assert counts[0] != counts[1]
    capsys.readouterr()
    experiment.run_seed("untrained", 3, plan, tmp_path, cpu)
    assert capsys.readouterr().out == ""
    further = experiment.Plan((512, 1280), (1.0,), has_controls=False)
    experiment.run_seed("untrained", 3, further, tmp_path, cpu)
    found = experiment.collect("untrained", [3], further, tmp_path)["scores"]["3"]
    assert list(found) == ["memory/512", "memory/1280"]
    assert found["memory/512"] == results["scores"]["3"]["memory/512"]
    monkeypatch.setitem(experiment.RECIPES, "untrained", experiment.Settings(steps=3))
    with pytest.raises(SystemExit, match="choose another --output"):
        experiment.run_seed("untrained", 3, plan, tmp_path, cpu)


def test_processes_side_by_side_make_all_calls_and_then_raise(
    experiment: ModuleType, tmp_path: Path
):
    calls = [(tmp_path / name,) for name in ("a", "b", "a", "c")]
    with pytest.raises(FileExistsError):
        experiment.run_side_by_side(os.mkdir, calls, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
