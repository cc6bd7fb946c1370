"""The verbs put together, and what a user sees when something goes wrong."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from memorizing import __version__
from memorizing.cli import (
    compare,
    corpus,
    demo,
    evaluate,
    finetune,
    generate,
    info,
    inspect,
    memory,
    plan,
    read,
    serve,
    train,
)
from memorizing.cli.benchmark import memory_use, timing
from memorizing.cli.options import INTERRUPTED_STATUS
from memorizing.cli.ranks import check_verb
from memorizing.errors import MemorizingError
from memorizing.storage.files import FULL_DISK, describe_failure
from memorizing.terminal import say, show

USAGE_STATUS = 2
CLOSED_PIPE_STATUS = 141
"""As shells have it, where whoever reads standard output goes away."""

app = typer.Typer(
    name="memorizing",
    help="Language models with a memory they read by k-nearest-neighbor attention "
    "(Memorizing Transformers, ICLR 2022).",
    epilog="""\b
examples:
  memorizing demo                                    what memory is worth, in ten minutes
  memorizing demo --pretrained                       a small model quotes what it has read
  memorizing info recipes                            what can be trained as it is
  memorizing train small --run runs/small            train it
  memorizing evaluate runs/small --capacity 0,8192   measure it, without memory and with
  memorizing read MODEL src --memory repo.memory     let a model of the hub read a repository
  memorizing generate MODEL --memory repo.memory --prompt 'def main('
  memorizing inspect runs/small --text FILE          a page: where memory helps, and why
  memorizing VERB --help                             more examples
""",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        show(f"memorizing {__version__}")
        raise typer.Exit


@app.callback()
def _set_up(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Options of the program itself."""
    check_verb(context.invoked_subcommand)


VERBS = {
    "train": train,
    "evaluate": evaluate,
    "read": read,
    "finetune": finetune,
    "generate": generate,
    "inspect": inspect,
    "serve": serve,
    "compare": compare,
    "demo": demo,
    "corpus": corpus,
    "info": info,
    "plan": plan,
}
for name, verb in VERBS.items():
    app.command(name, epilog=verb.EXAMPLES)(verb.run)
for name, (run_benchmark, examples) in memory_use.VERBS.items():
    timing.app.command(name, epilog=examples)(run_benchmark)
app.add_typer(memory.app, name="memory")
app.add_typer(timing.app, name="benchmark")


@functools.cache
def _build() -> Any:
    """The commands, from the signatures of all verbs: a tenth of a second, once per process."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `memorizing` is this function.

    Args:
        arguments: words after `memorizing`; None takes those of the process.

    Returns:
        The exit status: 0; 2 for input that cannot work, with one line on standard error; 130 after
        Ctrl-C; 141 where whoever reads standard output has gone away. Errors that are bugs of ours
        are raised.
    """
    # Read when torch is imported. Threads that spin while they wait for one another take the
    # processor from the one they wait for, as soon as the machine does anything else: two cores
    # beside one busy process read 20 times as many tokens per second with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch's warnings that a connection broke are a stack of C++; `RankError` says what it means.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _settle_streams()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        status = _build()(words or ["--help"], prog_name="memorizing", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED_STATUS
    except (BrokenPipeError, SystemExit):
        # Typer exits for a broken pipe, and for nothing else in this mode.
        _give_up_output()
        return CLOSED_PIPE_STATUS
    except Exception as error:
        message = explain_failure(error)
        if message is None:
            raise
        with contextlib.suppress(OSError):
            say(f"error: {message}")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            return USAGE_STATUS
        _give_up_output()
        return USAGE_STATUS
    return status if isinstance(status, int) else 0


def _settle_streams() -> None:
    """Let nothing that is shown fail for the terminal's encoding, nor for streams that are closed.

    A closed one leaves its number to the next file that is opened, which libraries would write to.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Write what is left nowhere: Python would fail again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain_failure(error: Exception) -> str | None:
    """One line for what a user can mend; None for anything else, which is a bug of ours."""
    if isinstance(error, MemorizingError):
        message = str(error)
    elif isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        where = f" ({context.command_path} --help shows the usage)" if context else ""
        message = error.format_message() + where
    elif isinstance(error, OSError) and error.errno in FULL_DISK:
        place = f" for {error.filename!r}" if error.filename else ""
        message = f"no space left on the disk{place}; free some, or choose another folder"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        message = (
            f"{describe_failure(error)}: {error.filename!r}; check the path and its permissions"
        )
    elif isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        around = error.object[max(0, error.start - 40) : error.end + 40]
        message = f"{around!r} is not UTF-8; give another name or text"
    elif _is_out_of_memory(error):
        message = "not enough memory; lower the rows, the capacity or the size of the model"
    else:
        return None
    return " ".join(message.split())


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    # Torch's CPU allocator has no exception of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
