"""The command line with odd terminals, arguments and places to write to."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading

import pytest

COMMAND = [sys.executable, "-m", "memorizing"]
STEERING = "a\x1b[2Jb\rc\u202ed"
ESCAPED = "a\\x1b[2Jb\\rc\\u202ed"


def call(words: str, **named) -> subprocess.CompletedProcess[bytes]:
    """A command of the shell; `memorizing` is the program."""
    line = words.replace("memorizing", " ".join(COMMAND))
    return subprocess.run(["bash", "-c", line], capture_output=True, check=False, **named)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_faults_and_no_file_is_written_to_by_accident(closed, tmp_path):
    path = tmp_path / "recipes.json"
    done = call(f"memorizing info recipes --json {path} {closed}")
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert "tiny" in json.loads(path.read_text())


def test_reading_from_a_closed_standard_input_is_one_line():
    done = call("memorizing generate nowhere --prompt-file - <&-")
    assert done.returncode == 2
    assert done.stderr == b"error: standard input is empty; it must be text in UTF-8\n"


@pytest.mark.parametrize("verb", ["info", "--help"])
def test_a_reader_that_goes_away_ends_every_verb_quietly(verb):
    with subprocess.Popen(
        [*COMMAND, verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("verb", ["info", "--help", "--version"])
def test_an_output_that_takes_nothing_more_is_one_line(verb):
    done = call(f"memorizing {verb} >/dev/full")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        b"error: no space left on the disk; free some, or choose another folder"
    ]


def test_an_ascii_terminal_shows_everything(tmp_path):
    (tmp_path / "n\u00e4me.txt").write_text("some text\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = "memorizing corpus files:. --stats --set tokenizer.vocab_size=300"
    done = call(words, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"n\\xe4me.txt" in done.stdout
    assert done.stdout.isascii()
    assert b"#" in done.stdout


def test_names_that_are_no_utf8_are_shown_and_written(tmp_path):
    place = os.fsencode(tmp_path) + b"/\xff.json"
    done = subprocess.run([*COMMAND, "info", "--json", place], capture_output=True, check=False)
    assert done.returncode == 0
    assert b"\\udcff.json" in done.stderr
    assert os.path.exists(place)


@pytest.mark.parametrize(
    "words",
    [
        ["info", "\udcff"],
        ["info", "\udcff.toml"],
        ["evaluate", "\udcff"],
        ["memory", "info", "\udcff"],
        ["corpus", "files:\udcff"],
        ["train", "tiny", "--run", "run", "--set", "data.corpus=files:\udcff"],
        ["generate", "nowhere", "--prompt", "\udcff"],
        ["\udcff"],
    ],
)
def test_words_that_are_no_utf8_end_in_one_line(run, words, tmp_path, monkeypatch):
    # Python gives such bytes of a command line as lone surrogates.
    monkeypatch.chdir(tmp_path)
    outcome = run(*words)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert "udcff" in outcome.err


def test_what_is_no_file_is_written_through_and_stays_what_it_is(run, tmp_path):
    # A device of its own: where this fails, that of the machine would be replaced.
    master, slave = os.openpty()
    device = os.ttyname(slave)
    assert run("info", "--json", device).status == 0
    os.set_blocking(master, False)
    shown = os.read(master, 65_536)
    assert "tiny" in json.loads(shown)
    assert stat.S_ISCHR(os.stat(device).st_mode)
    os.close(slave)
    os.close(master)
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(json.loads(pipe.read_text())))
    reader.start()
    assert run("info", "--json", pipe).status == 0
    reader.join(60)
    assert "tiny" in found[0]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "target.json")
    assert run("info", "--json", tmp_path / "link").status == 0
    assert (tmp_path / "link").is_symlink()
    assert "tiny" in json.loads((tmp_path / "deep" / "target.json").read_text())
    (tmp_path / "folder").symlink_to(tmp_path)
    outcome = run("info", "--json", tmp_path / "folder")
    assert outcome.status == 2
    assert "is a folder" in outcome.err


def test_a_recording_and_a_plot_follow_links_too(run, trained, tmp_path):
    for name in ("a.recorded", "a.png"):
        (tmp_path / name).symlink_to(tmp_path / f"target-{name}")
    words = ("--entries", "131", "--queries", "19", "--out", tmp_path / "a.recorded")
    assert run("benchmark", "record", trained, *words).status == 0
    words = ("--capacity", "8", "--no-controls", "--plot", tmp_path / "a.png")
    assert run("evaluate", trained, *words).status == 0
    for name in ("a.recorded", "a.png"):
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / f"target-{name}").stat().st_size > 1000


def test_names_and_texts_of_a_memory_do_not_steer_the_terminal(run, llama, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / STEERING).write_text(f"some text {STEERING}\n" * 7)
    folder = tmp_path / "odd.memory"
    words = ("--window", "17", "--precision", "fp32", "--memory", folder)
    prompt = ("--prompt", "some text a\x1b[2J", "--max-new-tokens", "3", "--sources")
    for command in (
        ("read", llama, tmp_path / "notes", "--keep-text", *words),
        ("generate", llama, *words[2:], *prompt),
        ("memory", "list", folder),
        ("memory", "info", folder),
        ("memory", "forget", folder, STEERING[:-1]),
    ):
        outcome = run(*command)
        assert not set("\x1b\r\u202e") & set(outcome.err), command
        assert command[0] == "generate" or not set("\x1b\r\u202e") & set(outcome.out), command
        if command[1] != "info" and command[0] != "read":
            assert ESCAPED[:-1] in outcome.out + outcome.err, command


def test_names_of_a_corpus_do_not_steer_the_terminal(run, tmp_path):
    (tmp_path / STEERING).write_text("some text\n")
    (tmp_path / "other\nname").write_text("other text\n")
    for words in ((), ("--stats", "--set", "tokenizer.vocab_size=300")):
        outcome = run("corpus", f"files:{tmp_path}", *words)
        assert outcome.status == 0
        assert ESCAPED in outcome.out
        assert "other\\nname" in outcome.out
        assert not set("\x1b\r\u202e") & {*outcome.out, *outcome.err}


def test_what_a_run_says_of_itself_does_not_steer_the_terminal(run, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "odd")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {STEERING: STEERING}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    outcome = run("info", folder)
    assert outcome.status == 0
    assert outcome.out.count(ESCAPED) == 2
    outcome = run("info", STEERING)
    assert outcome.status == 2
    assert not set("\x1b\r\u202e") & {*outcome.out, *outcome.err}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"sessions": 3}', b"null"]
)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "config.toml"])
def test_a_damaged_run_is_described_or_refused_in_one_line(run, trained, tmp_path, name, content):
    folder = shutil.copytree(trained, tmp_path / "damaged")
    (folder / name).write_bytes(content)
    outcome = run("info", folder)
    assert outcome.status in (0, 2)
    assert len(outcome.err.splitlines()) == (1 if outcome.status else 0)
    outcome = run("evaluate", folder, "--capacity", "0", "--documents", "1", "--max-tokens", "7")
    assert outcome.status in (0, 2)


@pytest.mark.parametrize(
    "setting",
    [
        "model.num_layers=" + "[" * 50_000,
        "model.num_layers={a={a=1}}",
        "model.num_layers=1\n[training]",
        "model.num_layers=nan",
        "model.memory_layers=[[[1]]]",
        "model.capacity=" + "9" * 5000,
        "training.learning_rate=1e999",
        "=3",
        "model.=3",
    ],
)
def test_odd_values_of_settings_are_one_line(run, tmp_path, setting):
    outcome = run("train", "tiny", "--run", tmp_path / "run", "--set", setting)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_nested_too_deeply_is_one_line(run, tmp_path):
    path = tmp_path / "deep.toml"
    path.write_text("a = " + "[" * 100_000)
    outcome = run("info", path)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1
