"""The queue of experiments: its plan can be run, jobs go on where they stopped."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

QUEUE = Path(__file__).parents[2] / "experiments" / "queue"
sys.path.insert(0, str(QUEUE))

import running  # noqa: E402
from attentions import choose_model  # noqa: E402
from claims import claim, is_claimed  # noqa: E402
from jobs import Evaluation, Job  # noqa: E402
from plan import ATTENTIONS, find_jobs, list_jobs  # noqa: E402
from running import is_kept, load_job_config, run_job  # noqa: E402
from status import describe_progress, is_done  # noqa: E402

from memorizing.errors import ConfigError  # noqa: E402
from memorizing.training import list_checkpoints  # noqa: E402

RECIPE = """
[model]
vocab_size = 307
num_layers = 2
model_dim = 13
num_heads = 2
head_dim = 7
ffn_dim = 23
segment_len = 11
window = 11
memory_layers = [1]
capacity = 29
num_neighbors = 3
conv_len = 3
[tokenizer]
vocab_size = 307
[data]
corpus = "files:{folder}"
test = ["test*"]
validation = ["valid*"]
[training]
steps = 4
rows = 2
precision = "fp32"
log_every = 1
evaluate_every = 2
evaluate_tokens = 50
checkpoint_every = 1
[evaluation]
capacities = [29]
max_tokens_per_document = 61
"""


@pytest.fixture
def tiny_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of a family named `tiny`; returns the folder of runs."""
    texts, recipes = tmp_path / "texts", tmp_path / "recipes"
    texts.mkdir()
    recipes.mkdir()
    for name in ("train1", "train2", "train3", "test1", "test2", "valid"):
        (texts / f"{name}.txt").write_text(" ".join(f"{name} word{i % 17}" for i in range(40)))
    (recipes / "tiny.toml").write_text(RECIPE.format(folder=texts))
    monkeypatch.setattr(running, "RECIPES", recipes)
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


def make_job(arm: str = "memory", **changes: object) -> Job:
    values: dict[str, object] = {
        "settings": (),
        "evaluations": (Evaluation(29), Evaluation(29, "other_document")),
        "tier": 1,
    }
    return Job("main", arm, "tiny", **{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def queue_main() -> ModuleType:
    """What the command line runs."""
    spec = importlib.util.spec_from_file_location("queue_main", QUEUE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_result(results: Path, job: Job) -> dict:
    return json.loads((results / f"{job.name}.json").read_text())


def test_every_job_has_a_name_of_its_own_and_settings_that_exist() -> None:
    jobs = list_jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        config = load_job_config(job, Path("runs"))
        assert config.name == job.name
        assert config.model.has_memory or all(e.capacity == 0 for e in job.evaluations)


def test_a_job_starts_from_an_earlier_one_of_its_seed_and_shape() -> None:
    earlier: dict[str, Job] = {}
    starts = []
    for job in list_jobs():
        if job.start_from:
            before = earlier[job.start_from]
            assert (before.family, before.seed) == (job.family, job.seed)
            shapes = [
                replace(load_job_config(j, Path("runs")).model, capacity=0) for j in (before, job)
            ]
            assert shapes[0] == shapes[1]
            starts.append(f"{job.experiment} {job.start_from}")
        earlier[job.name] = job
    memory, cache = "first/proofs-memory-seed1", "first/proofs-cache-seed1"
    assert starts == [
        *(f"finetuning {name}" for name in (memory, memory, cache, cache)), f"long {memory}",
    ]  # fmt: skip


def list_readings(*words: str) -> set[tuple[object, ...]]:
    """What the evaluations of some jobs read, apart from the size of the memory."""
    return {
        (e.use, e.documents, e.max_tokens or load_job_config(job, Path("runs")).evaluation)
        for job in find_jobs(list(words))
        for e in job.evaluations
    }


@pytest.mark.parametrize(
    "words",
    [
        ("table4/", "sizes/", "window/", "crossbatch/"),
        ("recipes/",),
        ("ablations/", "rates/"),
        ("main/proofs-", "first/", "finetuning/"),
        ("main/code-",),
        ("long/",),
        ("attentions/proofs",),
        ("attentions/code",),
    ],
    ids=" ".join,
)
def test_arms_that_are_compared_read_the_same(words: tuple[str, ...]) -> None:
    assert len(list_readings(*words)) == 1


def test_sizes_are_those_of_table_4_but_for_the_model() -> None:
    """The report takes the medium size from there."""
    (cache,), (memory,) = (
        find_jobs([f"table4/proofs-ours-{arm}-seed"]) for arm in ("512-xl", "512-8192-xl")
    )
    for size in ("small", "large"):
        for like, arm in ((cache, "cache"), (memory, "memory")):
            (job,) = find_jobs([f"sizes/proofs-{size}-{arm}-"])
            assert job.evaluations == like.evaluations
            configs = [load_job_config(j, Path("runs")) for j in (like, job)]
            assert configs[0].training == configs[1].training
            assert configs[0].data == configs[1].data
            assert configs[0].model.num_layers != configs[1].model.num_layers


def compute_time(name: str, timed: str) -> float:
    """Of a job's training, in steps of the cache alone."""
    (job,) = find_jobs([name])
    steps = load_job_config(job, Path("runs")).training.steps
    measured = json.loads((QUEUE.parent / "results" / "step_times.json").read_text())
    ratios = {row["name"]: row["ratio"] for row in measured["rows"]}
    # Crossbatch training ends with a tenth of its steps as without, at half the rows.
    last, half = (0.1, ratios["memory"] / 2) if timed.startswith("crossbatch") else (0.0, 0.0)
    return steps * ((1 - last) * ratios[timed] + last * half)


@pytest.mark.parametrize(
    ("name", "timed"),
    [
        ("recipes/proofs-ours-seed0", "memory"),
        ("recipes/proofs-paper-seed0", "paper-memory"),
        ("crossbatch/proofs-ours-seed0", "memory"),
        ("crossbatch/proofs-crossbatch-1-seed0", "crossbatch-1"),
        ("crossbatch/proofs-crossbatch-4-seed0", "crossbatch-4"),
        ("window/proofs-window-512-", "cache"),
        ("window/proofs-window-1024-", "window-1024"),
        ("window/proofs-window-2048-", "window-2048"),
    ],
)
def test_arms_at_equal_time_have_the_steps_that_the_measured_times_allow(
    name: str, timed: str
) -> None:
    expected = compute_time("table4/proofs-ours-512-8192-xl-seed", "memory")
    assert compute_time(name, timed) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("arm", ATTENTIONS)
def test_attentions_at_equal_time_have_the_steps_that_the_measured_times_allow(arm: str) -> None:
    path = QUEUE.parent / "results" / "step_times_attentions.json"
    ratios = {row["name"]: row["ratio"] for row in json.loads(path.read_text())["rows"]}
    (job,) = find_jobs([f"attentions/proofs-{arm}-seed0"])
    steps = load_job_config(job, Path("runs")).training.steps
    assert steps * ratios[arm] == pytest.approx(490 * ratios["memory"], rel=0.01)


def test_arms_of_attentions_differ_in_nothing_else() -> None:
    """Of one family and seed: parameters within two percent, the same tokens in the same order."""
    counts, configs = {}, {}
    for job in find_jobs(["attentions/proofs-"]):
        config = load_job_config(job, Path("runs"))
        with torch.device("meta"):
            model = choose_model(job.settings)(config.model)
        counts[job.arm] = sum(p.numel() for p in model.parameters())
        config = replace(config.model, window=512, capacity=0, empty_value=False, pointer=False)
        configs[job.arm] = config
    assert set(counts) == {*ATTENTIONS, *(f"{arm}-tokens" for arm in ATTENTIONS if arm != "memory")}
    assert len(set(configs.values())) == 1
    assert max(counts.values()) < 1.02 * min(counts.values())


def test_words_choose_jobs() -> None:
    chosen = find_jobs(["main/proofs", "staleness"])
    assert chosen
    assert all("main/proofs" in job.name or "staleness" in job.name for job in chosen)


def test_a_job_trains_measures_and_writes_what_repeats_it(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    monkeypatch.setitem(running.MACHINE, "commit", "of the worker's code")
    assert run_job(job, tiny_family, tmp_path / "results")
    result = read_result(tmp_path / "results", job)
    assert set(result["evaluations"]) == {"29", "29 other_document"}
    measured = result["evaluations"]["29"]
    assert [d["name"] for d in measured["documents"]] == ["test1.txt", "test2.txt"]
    assert measured["tokens"] == sum(min(d["tokens"], 61) for d in measured["documents"])
    blocks = sum(sum(d["block_nats"]) for d in measured["documents"])
    assert blocks == pytest.approx(measured["nats"], abs=0.05)
    assert measured["bytes"] is not None
    assert [v["tokens"] for v in result["training"]["validation"]] == sorted(
        v["tokens"] for v in result["training"]["validation"]
    )
    assert result["training"]["validation"][-1]["tokens"] == result["training"]["tokens"]
    assert (result["seed"], result["command"].split()[-1]) == (0, f"'{job.name}'")
    assert result["commits"] == [result["evaluation_commit"]] == ["of the worker's code"]
    lines = (tiny_family / job.name / "metrics.jsonl").read_text().splitlines()
    speeds = [v["train"]["tokens_per_s"] for v in map(json.loads, lines) if "train" in v]
    assert len(speeds) == 4
    assert result["precision"] == "fp32"
    assert result["training"]["tokens_per_s"] == statistics.median(speeds)


def test_a_model_is_read_in_the_precision_that_it_was_trained_in(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_in = []

    def watch(model, *arguments, **options):
        read_in.append(model.compute_dtype)
        return evaluate_documents(model, *arguments, **options)

    evaluate_documents = running.evaluate_documents
    monkeypatch.setattr(running, "evaluate_documents", watch)
    monkeypatch.setattr("memorizing.training.precision.multiplies_bf16", lambda _: True)
    for speedup, precision in ((9.0, "bf16"), (0.1, "fp32")):
        # The machine's choice, and no probe afterwards: another one could come out differently.
        times = iter([(speedup, 1.0)])
        monkeypatch.setattr("memorizing.training.precision._time_pair", lambda *_: next(times))  # noqa: B023
        settings = ('training.precision="auto"',)
        job = make_job(precision, evaluations=(Evaluation(3),), settings=settings)
        assert run_job(job, tiny_family, tmp_path / "results")
        assert read_result(tmp_path / "results", job)["precision"] == precision
    assert read_in == [torch.bfloat16, torch.float32]


def test_commits_are_those_of_all_sessions_of_training(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(evaluations=(Evaluation(3),))
    monkeypatch.setitem(running.MACHINE, "commit", "first")
    assert run_job(job, tiny_family, tmp_path / "results")
    (tiny_family / job.name / "trained.json").unlink()
    shutil.rmtree(list_checkpoints(tiny_family / job.name)[-1])
    for commit in ("second", "third"):
        monkeypatch.setitem(running.MACHINE, "commit", commit)
        assert run_job(job, tiny_family, tmp_path / "results")
    result = read_result(tmp_path / "results", job)
    assert result["commits"] == ["first", "second"]
    assert result["evaluation_commit"] == "third"


def test_a_session_that_takes_no_step_is_no_session(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(evaluations=(Evaluation(3),))
    for commit in ("first", "second"):
        monkeypatch.setitem(running.MACHINE, "commit", commit)
        assert run_job(job, tiny_family, tmp_path / "results")
        (tiny_family / job.name / "trained.json").unlink()
        assert read_result(tmp_path / "results", job)["commits"] == ["first"]


def test_a_run_folder_of_other_settings_is_refused_by_name(
    tiny_family: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    assert run_job(make_job(evaluations=(Evaluation(3),)), tiny_family, results)
    changed = make_job(evaluations=(Evaluation(3),), settings=("training.steps=5",))
    assert not is_done(changed, results)
    assert describe_progress(changed, tiny_family, results, False)[0] == "outdated"
    with pytest.raises(ConfigError, match=r"training\.steps was 4 and is 5; remove the folder"):
        run_job(changed, tiny_family, results)
    shutil.rmtree(tiny_family / changed.name)
    assert run_job(changed, tiny_family, results)
    assert is_done(changed, results)
    assert read_result(results, changed)["config"]["training"]["steps"] == 5


def test_a_job_with_another_attention_is_trained_read_and_told_from_one_without(
    tiny_family: Path, tmp_path: Path
) -> None:
    attention = ("attention.kind=compressive", "attention.num_slots=5", "attention.rate=3")
    job = make_job("other", settings=("model.capacity=0", *attention), evaluations=(Evaluation(0),))
    results = tmp_path / "results"
    assert run_job(job, tiny_family, results)
    result = read_result(results, job)
    assert result["settings"] == list(job.settings)
    plain = make_job("plain", settings=("model.capacity=0",), evaluations=(Evaluation(0),))
    assert run_job(plain, tiny_family, results)
    other = read_result(results, plain)
    assert result["num_weights"] > other["num_weights"]
    assert result["evaluations"]["0"]["nats"] != other["evaluations"]["0"]["nats"]
    (tiny_family / job.name / "evaluations.json").unlink()
    assert run_job(job, tiny_family, results)
    assert read_result(results, job)["evaluations"] == result["evaluations"]
    changed = replace(job, settings=(*job.settings[:-1], "attention.rate=2"))
    assert not is_done(changed, results)
    with pytest.raises(ConfigError, match=r"rate=3' is now '.*rate=2'; remove the folder"):
        run_job(changed, tiny_family, results)


def test_a_moved_folder_of_runs_is_no_other_setting(tiny_family: Path, tmp_path: Path) -> None:
    first = make_job(evaluations=(Evaluation(3),))
    tuned = make_job("tuned", start_from=first.name, evaluations=(Evaluation(3),))
    for job in (first, tuned):
        assert run_job(job, tiny_family, tmp_path / "results")
    moved = tiny_family.rename(tmp_path / "moved")
    assert run_job(tuned, moved, tmp_path / "results")


def test_an_evaluation_of_other_settings_is_measured_again_and_an_unplanned_one_left_out(
    tiny_family: Path, tmp_path: Path
) -> None:
    job = make_job(evaluations=(Evaluation(3), Evaluation(29)))
    assert run_job(job, tiny_family, tmp_path / "results")
    for changes in ({"documents": ("test2.txt",)}, {"max_tokens": 7}):
        less = make_job(evaluations=(Evaluation(29, **changes),))
        assert run_job(less, tiny_family, tmp_path / "results")
        (measured,) = read_result(tmp_path / "results", less)["evaluations"].values()
        expected = [d["tokens"] for d in measured["documents"]]
        assert len(expected) == (1 if "documents" in changes else 2)
        assert max(expected) <= changes.get("max_tokens", 61)
    assert not is_kept(Evaluation(29), measured)
    assert is_kept(Evaluation(29, max_tokens=7), measured)
    # Files of before these were written are of all documents, as long as the recipe says.
    del measured["only_documents"], measured["max_tokens"]
    assert is_kept(Evaluation(29), measured)


def test_a_finished_training_is_not_done_again_for_another_measurement(
    tiny_family: Path, tmp_path: Path
) -> None:
    job = make_job(evaluations=(Evaluation(29),))
    assert run_job(job, tiny_family, tmp_path / "results")
    log = tiny_family / job.name / "metrics.jsonl"
    before = log.read_bytes()
    more = make_job(evaluations=(Evaluation(29), Evaluation(3)))
    assert run_job(more, tiny_family, tmp_path / "results")
    assert log.read_bytes() == before
    result = json.loads((tmp_path / "results" / f"{job.name}.json").read_text())
    assert set(result["evaluations"]) == {"29", "3"}


def test_a_job_begins_with_the_weights_of_another_or_measures_them(
    tiny_family: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    first = make_job(evaluations=(Evaluation(29),))
    assert run_job(first, tiny_family, results)
    again = make_job("again", start_from=first.name, trains=False)
    assert run_job(again, tiny_family, results)
    tuned = make_job("tuned", start_from=first.name, settings=("training.steps=1",))
    assert run_job(tuned, tiny_family, results)
    found = {
        name: json.loads((results / f"main/tiny-{name}-seed0.json").read_text())
        for name in ("memory", "again", "tuned")
    }
    nats = {name: result["evaluations"]["29"]["nats"] for name, result in found.items()}
    assert nats["memory"] == nats["again"] != nats["tuned"]
    assert found["again"]["trains"] is False


def test_a_job_that_is_claimed_is_not_taken_by_another_process(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(QUEUE)!r}); from claims import claim; "
        "from pathlib import Path\n"
        f"with claim(Path({str(tmp_path / 'job')!r})) as mine: print(mine)"
    )
    command = [sys.executable, "-c", code]
    with claim(tmp_path / "job") as is_mine:
        assert is_mine
        assert is_claimed(tmp_path / "job")
        assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"
    assert not is_claimed(tmp_path / "job")


def test_the_status_tells_how_far_a_job_is(tiny_family: Path, tmp_path: Path) -> None:
    job, results = make_job(), tmp_path / "results"
    assert describe_progress(job, tiny_family, results, False) == ("waiting", "")
    assert run_job(job, tiny_family, results)
    state, detail = describe_progress(job, tiny_family, results, False)
    assert state == "done"
    assert detail.startswith("29: ")
    (results / f"{job.name}.json").unlink()
    assert describe_progress(job, tiny_family, results, True) == ("running", "2 of 2 evaluations")


def test_a_name_is_whole_and_an_unknown_word_is_an_error(
    queue_main: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    longest = max((job.name for job in list_jobs()), key=len)
    places = ["--runs", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["queue", "--status", *places])
    queue_main.main()
    assert f"  {longest}\n" in capsys.readouterr().out
    for what in ("--status", "--run"):
        monkeypatch.setattr(sys, "argv", ["queue", what, "no-such-word", *places])
        with pytest.raises(SystemExit) as caught:
            queue_main.main()
        assert caught.value.code == 2
        assert "no job's name holds 'no-such-word'" in capsys.readouterr().err


def test_what_a_job_starts_from_is_done_too(queue_main: ModuleType) -> None:
    names = [job.name for job in queue_main.choose_jobs(["long/"])]
    assert names == ["first/proofs-memory-seed1", "long/proofs-memory-seed1"]


def test_a_job_that_waits_for_lost_weights_says_for_which(
    queue_main: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [make_job(), make_job("again", start_from="main/tiny-memory-seed0", trains=False)]
    path = tmp_path / "results" / f"{jobs[0].name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"settings": []}))
    with pytest.raises(SystemExit) as caught:
        queue_main.work(jobs, tmp_path / "runs", tmp_path / "results")
    assert caught.value.code == 1
    said = capsys.readouterr().out
    assert "main/tiny-again-seed0: not done: it waits for main/tiny-memory-seed0" in said
    assert f"remove {path} to train it again" in said
    with claim(tmp_path / "runs" / jobs[0].name), pytest.raises(SystemExit) as caught:
        queue_main.work(jobs, tmp_path / "runs", tmp_path / "results")
    assert caught.value.code == 0
    assert "waits for main/tiny-memory-seed0, which another worker does" in capsys.readouterr().out
