"""The laws of the training loop, for our own model and for a model with added memory."""

from __future__ import annotations

import functools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memorizing.data import TokenizedDocument
from memorizing.errors import CheckpointError, CorpusError, NonFiniteLossError
from memorizing.storage.folders import write_folder
from memorizing.training import StepMetrics, Trainer, read_metrics
from memorizing.training.checkpoint import find_checkpoint, list_checkpoints, locate_checkpoint
from memorizing.training.finetuning import FinetuneSettings
from memorizing.training.finetuning.finetuner import Finetuner
from memorizing.training.loop import TrainingLoop
from memorizing.training.reporting import Counters
from tests.training.conftest import drop_times, raise_after
from tests.training.finetuning.tools import (
    PASSAGES,
    SEGMENT_LEN,
    START,
    make_documents,
    make_model,
)

DOCUMENTS = make_documents(3 * SEGMENT_LEN, 47, 5 * SEGMENT_LEN + 1, 2)
MEMORIES: dict[str, dict[str, Any]] = {"finetune": {}, "passages": PASSAGES}
MakeLoop = Callable[..., TrainingLoop]


def make_finetuner(
    *,
    documents: list[TokenizedDocument] = DOCUMENTS,
    validation: bool | list[TokenizedDocument] = False,
    run_dir: Path | None = None,
    on_step: Any = None,
    on_begin: Any = None,
    dtype: torch.dtype = torch.float32,
    memory: dict[str, Any] | None = None,
    **changes: Any,
) -> Finetuner:
    values = {
        "train": "all", "steps": 7, "rows": 2, "evaluate_every": 0, "warmup_steps": 2,
        "gate_learning_rate": 0.1, "learning_rate": 1e-3, "log_every": 3, **changes,
    }  # fmt: skip
    return Finetuner(
        make_model(**(memory or {})).to(dtype),
        documents,
        START,
        FinetuneSettings(**values),
        run_dir=run_dir,
        on_step=on_step,
        on_begin=on_begin,
        validation=make_documents(61, 29, 17, seed=5) if validation is True else validation or (),
    )


@pytest.fixture(params=["own", "finetune", "passages"])
def make_loop(
    request: pytest.FixtureRequest,
    make_trainer: Callable[..., Trainer],
    documents: list[TokenizedDocument],
) -> MakeLoop:
    if request.param != "own":
        return functools.partial(make_finetuner, memory=MEMORIES[request.param])

    def make(*, validation: bool | list[TokenizedDocument] = False, **settings: Any) -> Trainer:
        settings = {"log_every": 3, "model": {"dropout": 0.2}, **settings}
        held_out = documents[:3] if validation is True else validation or ()
        return make_trainer(validation=held_out, **settings)

    return make


def find_norm(loop: TrainingLoop) -> torch.nn.Parameter:
    """The gain before the logits, which makes them overflow."""
    if isinstance(loop, Trainer):
        return loop.model.final_norm.gain
    assert isinstance(loop, Finetuner)
    return loop.model.model.norm.weight


def list_weights(loop: TrainingLoop) -> list[torch.Tensor]:
    assert isinstance(loop, (Trainer, Finetuner))
    return [p.detach().clone() for p in loop.model.parameters()]


def are_equal(first: TrainingLoop, second: TrainingLoop) -> bool:
    pairs = zip(list_weights(first), list_weights(second), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(
    make_loop: MakeLoop, tmp_path: Path, stop: int
) -> None:
    settings: dict[str, Any] = {"evaluate_every": 4, "evaluate_tokens": 61, "validation": True}
    whole = make_loop(run_dir=tmp_path / "whole", **settings)
    result = whole.run()
    stopped = make_loop(
        run_dir=tmp_path / "parts", on_step=raise_after(stop, signal.SIGTERM), **settings
    ).run()
    assert (stopped.interrupted, stopped.steps) == (True, stop)
    torch.manual_seed(97)  # whatever the second process did before
    second = make_loop(run_dir=tmp_path / "parts", **settings)
    second.load(locate_checkpoint(tmp_path / "parts", stop))
    resumed = second.run()
    assert (resumed.steps, resumed.tokens) == (7, result.tokens)
    assert resumed.train_nats == result.train_nats
    assert resumed.validation_nats == result.validation_nats
    assert are_equal(whole, second)
    folders = [locate_checkpoint(tmp_path / name, 7) for name in ("whole", "parts")]
    for file in (path.name for path in folders[0].glob("*.safetensors")):
        ours, theirs = (load_file(folder / file) for folder in folders)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), file
    logs = [drop_times(read_metrics(tmp_path / n / "metrics.jsonl")) for n in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [3, 4, 6, 7, 7]


def test_nothing_is_written_before_the_first_step_is_taken(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    begun: list[list[Path]] = []
    loop = make_loop(run_dir=tmp_path, on_begin=lambda: begun.append(list(tmp_path.iterdir())))
    assert loop.save() is None
    before = list_weights(loop)
    loop.run(until=0)
    assert list(tmp_path.iterdir()) == []
    loop.run(until=1)
    loop.run(until=2)
    assert begun == [[]]
    assert any(not torch.equal(*pair) for pair in zip(before, list_weights(loop), strict=True))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_a_first_step_that_is_not_finite_writes_nothing(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    loop = make_loop(run_dir=tmp_path)
    with torch.no_grad():
        find_norm(loop).fill_(1e38)
    with pytest.raises(NonFiniteLossError, match=r"at step 1 .*learning_rate.*start again"):
        loop.run()
    assert list(tmp_path.iterdir()) == []


def test_a_session_whose_first_step_is_not_finite_leaves_the_run_as_it_was(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    make_loop(run_dir=tmp_path).run(until=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    loop = make_loop(run_dir=tmp_path)
    loop.load(locate_checkpoint(tmp_path, 2))
    with torch.no_grad():
        find_norm(loop).fill_(1e38)
    with pytest.raises(NonFiniteLossError, match=r"at step 3 .*saved in .*step-000002"):
        loop.run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_state_saved_before_a_bad_step_takes_that_step_when_its_cause_is_gone(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    good = make_loop()
    good.run()
    kept: list[torch.Tensor] = []

    def spoil(metrics: StepMetrics) -> None:
        if metrics.step == 4:
            kept.append(find_norm(bad).detach().clone())
            with torch.no_grad():
                find_norm(bad).fill_(1e38)  # finite, but the logits overflow

    bad = make_loop(run_dir=tmp_path, on_step=spoil, checkpoint_every=100)
    message = r"at step 5 the loss is (nan|inf).*step-000004.*delete the newest"
    with pytest.raises(NonFiniteLossError, match=message):
        bad.run()
    resumed = make_loop(run_dir=tmp_path)
    resumed.load(locate_checkpoint(tmp_path, 4))
    with torch.no_grad():
        find_norm(resumed).copy_(kept[0])
    resumed.run()
    assert are_equal(good, resumed)


def test_weights_that_are_not_finite_are_never_saved(make_loop: MakeLoop, tmp_path: Path) -> None:
    loop = make_loop(run_dir=tmp_path)
    loop.run(until=2)
    with torch.no_grad():
        find_norm(loop)[3] = float("inf")
    with pytest.raises(NonFiniteLossError, match="step 3"):
        loop.run()
    loop._saved_step = -1
    with pytest.raises(NonFiniteLossError, match="nothing was saved"):
        loop.save()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves(
    make_loop: MakeLoop, tmp_path: Path, number: signal.Signals
) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(one) for one in numbers]
    result = make_loop(run_dir=tmp_path, on_step=raise_after(3, number)).run()
    assert (result.interrupted, result.steps) == (True, 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003"]
    assert [signal.getsignal(one) for one in numbers] == handlers


def test_a_run_may_go_on_after_a_pause(make_loop: MakeLoop) -> None:
    whole = make_loop()
    whole.run()
    parts = make_loop()
    parts.run(until=3)
    parts.run()
    assert are_equal(whole, parts)


def test_the_latest_checkpoints_and_the_best_are_kept(make_loop: MakeLoop, tmp_path: Path) -> None:
    loop = make_loop(
        run_dir=tmp_path,
        steps=6,
        evaluate_every=1,
        evaluate_tokens=61,
        checkpoint_every=1,
        keep_checkpoints=2,
        validation=True,
    )
    loop.run(until=2)
    best = loop._held_out.best_step
    loop._held_out.best_nats = 0.0  # nothing later is better
    loop.run()
    kept = [path.name for path in list_checkpoints(tmp_path)]
    assert kept == [f"step-{step:06d}" for step in (best, 5, 6)]
    assert find_checkpoint(tmp_path, "best").name == kept[0]


def test_a_checkpoint_that_was_not_deleted_for_a_kill_is_when_its_run_is_resumed(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"run_dir": tmp_path, "steps": 4, "checkpoint_every": 1}
    make_loop(**settings, keep_checkpoints=3).run()
    assert len(list_checkpoints(tmp_path)) == 3
    resumed = make_loop(**settings, keep_checkpoints=2)
    resumed.load(locate_checkpoint(tmp_path, 4))
    resumed.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000004"]


def test_an_evaluation_leaves_training_as_it_was(make_loop: MakeLoop) -> None:
    plain = make_loop()
    assert plain.run().validation_nats is None
    evaluated = make_loop(evaluate_every=2, evaluate_tokens=61, validation=True)
    assert evaluated.run().validation_nats is not None
    assert are_equal(plain, evaluated)


def test_other_text_of_the_same_names_and_lengths_is_not_resumed_with(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    make_loop(run_dir=tmp_path).run(until=1)
    loop = make_loop()
    documents = list(loop.loader.documents)
    longest = max(range(len(documents)), key=lambda i: len(documents[i].tokens))
    tokens = documents[longest].tokens.copy()
    tokens[-1] ^= 1
    document = documents[longest]
    documents[longest] = TokenizedDocument(document.name, tokens, document.num_bytes)
    loop.loader.documents = documents
    with pytest.raises(CorpusError, match="other text"):
        loop.load(locate_checkpoint(tmp_path, 1))


def change_one_token(document: TokenizedDocument) -> TokenizedDocument:
    tokens = document.tokens.copy()
    tokens[1] ^= 1
    return TokenizedDocument(document.name, tokens, document.num_bytes)


@pytest.mark.parametrize(
    "change",
    [
        lambda documents: [change_one_token(documents[0]), *documents[1:]],
        # Beyond what is read of them: a run that reads more later would compare.
        lambda documents: [*documents[:-1], change_one_token(documents[-1])],
        lambda documents: documents[::-1],
        lambda documents: documents[:-1],
    ],
)
def test_the_best_result_is_not_compared_with_one_on_other_documents(
    make_loop: MakeLoop, tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    settings: dict[str, Any] = {"evaluate_every": 2, "evaluate_tokens": 37}
    held_out = make_documents(61, 29, 17, 5, seed=5)
    held_out = [TokenizedDocument(d.name, d.tokens % 29 + 1, d.num_bytes) for d in held_out]
    make_loop(run_dir=tmp_path, validation=held_out, **settings).run(until=2)
    checkpoint = locate_checkpoint(tmp_path, 2)
    with pytest.raises(CorpusError, match="validated on other documents"):
        make_loop(validation=change(held_out), **settings).load(checkpoint)
    make_loop(validation=held_out, **settings).load(checkpoint)
    # Without validation a run may go on, and then with it again.
    loop = make_loop(run_dir=tmp_path, **settings)
    loop.load(checkpoint)
    loop.run(until=3)
    again = make_loop(validation=held_out, **settings)
    again.load(locate_checkpoint(tmp_path, 3))
    assert again._held_out.best_step == 2
    with pytest.raises(CorpusError, match="validated on other documents"):
        make_loop(validation=change(held_out), **settings).load(locate_checkpoint(tmp_path, 3))


def test_a_result_on_more_tokens_is_not_compared_with_the_best_before(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"evaluate_every": 2, "validation": True}
    first = make_loop(run_dir=tmp_path, evaluate_tokens=17, **settings)
    first.run(until=2)
    first._held_out.best_nats = 0.0  # nothing is better
    first._saved_step = -1
    first.save()
    same = make_loop(evaluate_tokens=17, **settings)
    same.load(locate_checkpoint(tmp_path, 2))
    same.run(until=4)
    assert same._held_out.best_step == 2
    other = make_loop(evaluate_tokens=10**5, **settings)
    other.load(locate_checkpoint(tmp_path, 2))
    assert other._held_out.best_step == 2
    other.run(until=4)
    assert other._held_out.best_step == 4


def test_a_run_from_before_validation_documents_were_compared_is_resumed(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"evaluate_every": 2, "evaluate_tokens": 61, "validation": True}
    make_loop(run_dir=tmp_path, **settings).run(until=2)
    loop = make_loop(**settings)
    values = json.loads((locate_checkpoint(tmp_path, 2) / "trainer.json").read_text())
    for name in ("documents", "read"):
        del values["validation"][name]
    loop._held_out.load_dict(values["validation"])
    assert loop._held_out.best_nats == values["validation"]["best_nats"] is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("counters", None),
        ("counters", {}),
        ("counters", {"step": "x"}),
        ("loader", []),
        ("loader", {}),
        ("optimizer", 3),
        ("optimizer", {"adamw|nothing|step": 1}),
        ("validation", {}),
        ("validation", "x"),
        ("", []),
    ],
)
def test_damaged_values_of_a_checkpoint_are_an_error_of_ours(
    make_loop: MakeLoop, tmp_path: Path, key: str, value: Any
) -> None:
    make_loop(run_dir=tmp_path).run(until=1)
    [checkpoint] = list_checkpoints(tmp_path)

    def write(partial: Path) -> None:
        """The same files with other values, and checksums that are right."""
        shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
        (partial / "manifest.json").unlink()
        values = json.loads((partial / "trainer.json").read_text())
        (partial / "trainer.json").write_text(json.dumps(values | {key: value} if key else value))

    write_folder(tmp_path / "damaged", write)
    with pytest.raises(
        (CheckpointError, CorpusError), match="damaged|loader state|which this run does not have"
    ):
        make_loop().load(tmp_path / "damaged")


@pytest.mark.parametrize("value", [None, [2], "2", {}, -3, 1.5, float("nan")])
@pytest.mark.parametrize(
    ("part", "name"),
    [("counters", "step"), ("counters", "tokens"), ("window", "num_targets"), ("window", "nats")],
)
def test_counts_of_a_checkpoint_are_numbers(part: str, name: str, value: Any) -> None:
    counters = Counters()
    counters.add(2.5, 3, 0.1, 0.2)
    values = json.loads(json.dumps(counters.to_dict()))
    assert Counters.from_dict(values) == counters
    table = values if part == "counters" else values[part]
    table[name] = value
    if name == "nats" and isinstance(value, (str, float)):
        assert isinstance(Counters.from_dict(values).window.nats, float)
        return
    with pytest.raises((TypeError, ValueError)):
        Counters.from_dict(values)


@pytest.mark.parametrize("value", [[2], "x", {}])
@pytest.mark.parametrize("name", ["best_step", "best_nats", "last_nats"])
def test_results_of_a_checkpoint_are_numbers(make_loop: MakeLoop, name: str, value: Any) -> None:
    held_out = make_loop()._held_out
    values = held_out.to_dict() | {"best_step": 3, "best_nats": 2.5, "last_nats": 2.75}
    held_out.load_dict(values)
    assert (held_out.best_step, held_out.best_nats, held_out.last_nats) == (3, 2.5, 2.75)
    with pytest.raises((TypeError, ValueError)):
        held_out.load_dict(values | {name: value})


@pytest.mark.parametrize("name", ["manifest.json", "trainer.json", "state.safetensors"])
def test_what_a_damaged_checkpoint_advises_helps(
    make_loop: MakeLoop, tmp_path: Path, name: str
) -> None:
    make_loop(run_dir=tmp_path, checkpoint_every=2).run(until=4)
    earlier, last = list_checkpoints(tmp_path)
    (last / name).write_bytes((last / name).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"delete .* goes on from {earlier.name}"):
        make_loop().load(last)
    shutil.rmtree(last)
    loop = make_loop(run_dir=tmp_path)
    loop.load(list_checkpoints(tmp_path)[-1])
    assert loop.run(until=4).steps == 4
    for path in list_checkpoints(tmp_path)[:-1]:
        shutil.rmtree(path)
    (last / name).write_bytes((last / name).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="only checkpoint.*--overwrite"):
        make_loop().load(last)
