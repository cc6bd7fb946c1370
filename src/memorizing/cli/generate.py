"""`memorizing generate`."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memorizing.cli.evaluate import Precision
from memorizing.cli.output import INTERRUPTED_STATUS, JsonOption, prepare_file, say, write_result
from memorizing.cli.pretrained import (
    AdapterOption,
    DeviceOption,
    ModelArgument,
    PrecisionOption,
    load_model,
    show_name,
)
from memorizing.cli.reading_plan import STDIN, read_stdin
from memorizing.errors import ConfigError, CorpusError, TokenizerError

if TYPE_CHECKING:
    import torch

    from memorizing.huggingface import MemorySession
    from memorizing.huggingface.sessions.sources import Sources

EXAMPLES = """\b
examples:
  memorizing generate runs/smollm2 --memory repo.memory --prompt 'def open_memory(' --sources
  memorizing generate runs/smollm2 --memory repo.memory --no-memory --prompt 'def open_memory('
  memorizing generate runs/smollm2 --memory repo.memory --chat --prompt 'What does reset do?'
  memorizing generate runs/smollm2 --prompt-file start.txt --temperature 0.8 --top-p 0.95 --seed 1
"""

_DOCUMENTS_SHOWN = 5
_CLOSED_PIPE_STATUS = 141
"""As shells have it, where whoever reads standard output goes away."""


def run(
    model: ModelArgument,
    memory: Annotated[
        Path | None,
        typer.Option(
            "--memory", metavar="DIR", help="Folder that `memorizing read` made. Default: none."
        ),
    ] = None,
    no_memory: Annotated[
        bool,
        typer.Option(
            "--no-memory", help="Read nothing from --memory, with its window: to compare."
        ),
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model goes on from.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read the prompt from a file, or - for standard input."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Stop after N.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="Sample; 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, metavar="P", help="Sample from the likeliest of this mass."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a question, put as the model was taught.")
    ] = False,
    sources: Annotated[
        bool,
        typer.Option(
            "--sources", help="Then show which documents were retrieved, and where (kept texts)."
        ),
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Without --memory: tokens of local attention. Default: 512."
        ),
    ] = None,
    adapter: AdapterOption = None,
    precision: PrecisionOption = Precision.AUTO,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Go on from a prompt, with what a model has read in its memory, or without.

    The text goes to standard output as it is written, everything else to standard error. Layers,
    window and all other settings of the memory are those it was read with.
    """
    is_read = memory is not None and not no_memory
    check_options(memory, no_memory, sources, temperature, top_p)
    if window is not None and (memory is not None or adapter is not None):
        raise ConfigError("--window is given, and --memory or --adapter has one; leave it out")
    text = find_prompt(prompt, prompt_file)
    prepare_file(json_file)
    if memory is not None:
        from memorizing.memory.disk import MemoryFolder

        MemoryFolder.open(memory)
    loaded, tokenizer = load_model(model, precision, device)
    prompt_tokens = encode(tokenizer, text, chat=chat)
    inputs = {name: tensor.to(loaded.device) for name, tensor in prompt_tokens.items()}

    from memorizing.huggingface import add_memory, open_memory
    from memorizing.huggingface.learning.adapter import load_adapter

    session = None
    if adapter is not None:
        load_adapter(loaded, adapter)
    elif memory is None:
        add_memory(loaded, window=window or choose_window(loaded))
    if memory is not None:
        session = open_memory(loaded, memory)
        say(f"memory: {describe_memory(session, memory, is_read)}")
    result: dict[str, Any] = {
        "model": model,
        "memory": str(memory) if is_read else None,
        "prompt": text,
    }
    with ExitStack() as stack:
        found = None
        if session is not None and is_read:
            stack.enter_context(session)
            found = stack.enter_context(session.record())
        result |= write(loaded, tokenizer, inputs, max_new_tokens, temperature, top_p, seed)
    say(
        f"{result['prompt_tokens']:,} tokens read, {result['new_tokens']:,} written in "
        f"{result['seconds']:,.1f} s"
    )
    if sources and found is not None:
        result["sources"] = list_sources(found)
        print_sources(result["sources"])
    write_result(json_file, result)
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED_STATUS)


def check_options(
    memory: Path | None, no_memory: bool, sources: bool, temperature: float, top_p: float
) -> None:
    """Refuse options that say nothing together.

    Raises:
        ConfigError: with the option and what it needs.
    """
    if no_memory and memory is None:
        raise ConfigError("--no-memory is given without --memory, whose window it takes; add it")
    if sources and (memory is None or no_memory):
        raise ConfigError("--sources is given, and no memory is read; give --memory DIR")
    if top_p == 0.0:
        raise ConfigError("--top-p is 0.0; allowed: above 0, up to 1, which is no limit")
    if top_p < 1.0 and temperature == 0.0:
        raise ConfigError(f"--top-p is {top_p} and nothing is sampled; add --temperature 1")


def find_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt that was given.

    Raises:
        ConfigError: none was, or two.
        CorpusError: a file that is empty or no text.
    """
    from memorizing.data.reading.files import decode_whole

    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give a prompt: either --prompt TEXT or --prompt-file FILE")
    if prompt_file is None:
        if not prompt:
            raise ConfigError("--prompt is empty; give a text to go on from")
        return prompt
    if str(prompt_file) == STDIN:
        return read_stdin()
    text, reason = decode_whole(prompt_file.read_bytes())
    if text is None:
        raise CorpusError(f"{str(prompt_file)!r} is {reason}; a prompt is text in UTF-8")
    return text


def encode(tokenizer: Any, text: str, *, chat: bool) -> dict[str, torch.Tensor]:
    """A prompt as the model reads it; what is spelled like a special token is text.

    Raises:
        TokenizerError: there is no template of chats, or the prompt has no tokens.
    """
    import torch

    from memorizing.huggingface.sessions.texts import encode_question, encode_text

    if chat:
        if not tokenizer.chat_template:
            raise TokenizerError(
                "--chat is given, and this model has no template of chats: it was not taught to "
                "answer; leave --chat out, and begin the answer yourself"
            )
        tokens = encode_question(tokenizer, text)
    else:
        tokens = encode_text(tokenizer, text, is_whole=True)
    if not len(tokens):
        raise TokenizerError("the prompt has no tokens; give a longer one")
    ids = torch.from_numpy(tokens).long().unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def choose_window(model: Any) -> int:
    """The default of `add_memory`, or half of the positions of a model that has few."""
    from memorizing.huggingface.attaching.memory_settings import MemorySettings

    return min(MemorySettings.window, int(model.config.max_position_embeddings) // 2)


def describe_memory(session: MemorySession, path: Path, is_read: bool) -> str:
    """What a memory holds, on a line."""
    held = f"{path}, {len(session.documents):,} documents, {session.num_entries:,} entries"
    return held if is_read else f"{held}; not read"


def write(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> dict[str, Any]:
    """Generate, and write the text to standard output as it comes."""
    import torch
    from transformers import TextStreamer
    from transformers.utils import logging

    # The model's own settings of sampling must not change what the options say.
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k, own.max_length = (None,) * 5
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # What it says of lengths is not so: a model with a window reads past its own.
    logging.set_verbosity_error()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    num_prompt = inputs["input_ids"].shape[1]
    tokens, is_interrupted = Kept(streamer), False
    start = time.perf_counter()
    with survive_closed_pipe():
        try:
            model.generate(
                **inputs,
                **sampling,
                max_new_tokens=max_new_tokens,
                pad_token_id=choose_padding(tokenizer, own),
                streamer=tokens,
            )
        except KeyboardInterrupt:
            is_interrupted = True
            tokens.end()
    return {
        "text": tokenizer.decode(tokens.new_tokens, skip_special_tokens=True),
        "prompt_tokens": num_prompt,
        "new_tokens": len(tokens.new_tokens),
        "seconds": round(time.perf_counter() - start, 3),
        "interrupted": is_interrupted,
    }


class Kept:
    """Passes tokens on to a streamer, and keeps those that are new."""

    def __init__(self, streamer: Any) -> None:
        """Take what shows them."""
        self._streamer = streamer
        self._is_prompt = True
        self.new_tokens: list[int] = []

    def put(self, value: Any) -> None:
        """The prompt, then a token at a time."""
        if not self._is_prompt:
            self.new_tokens += value.flatten().tolist()
        self._is_prompt = False
        self._streamer.put(value)

    def end(self) -> None:
        """Nothing more comes."""
        self._streamer.end()


def choose_padding(tokenizer: Any, settings: Any) -> int | None:
    """Some token; one row is never padded, but its absence is warned of."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    end = settings.eos_token_id
    return end[0] if isinstance(end, list) else end


@contextmanager
def survive_closed_pipe() -> Iterator[None]:
    """End quietly where standard output is closed, as `| head` does.

    Raises:
        typer.Exit: it was closed.
    """
    try:
        yield
    except BrokenPipeError as error:
        # Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_CLOSED_PIPE_STATUS) from error


def list_sources(found: Sources) -> dict[str, Any]:
    """Documents with their share of attention, and the most used places of those that have texts.

    Raises:
        MemoryFolderError: the folder is damaged.
    """
    listed = found.list()
    total = sum(found.mass.values()) + found.own_mass
    snippets = found.find_snippets([name for name, _ in listed[:_DOCUMENTS_SHOWN]])
    return {
        "this_text": found.own_mass / total if total else 0.0,
        "documents": [
            {
                "name": name,
                "share": share,
                "places": [
                    {
                        "share": place.share,
                        "before": place.text.before,
                        "token": place.text.token,
                        "after": place.text.after,
                    }
                    for place in snippets.get(name, [])
                ],
            }
            for name, share in listed
        ],
    }


def print_sources(sources: dict[str, Any]) -> None:
    """Print documents and places to standard error, most used first."""
    documents = sources["documents"]
    say("sources, by their share of attention to what was retrieved:")
    for document in documents[:_DOCUMENTS_SHOWN]:
        say(f"  {document['share']:6.1%}  {show_name(document['name'])}")
        for place in document["places"]:
            line = f"{place['before']}«{place['token']}»{place['after']}"
            say(f"          {flatten(line)}")
    rest = documents[_DOCUMENTS_SHOWN:]
    if rest:
        share = sum(document["share"] for document in rest)
        say(f"  {share:6.1%}  {len(rest):,} more documents")
    if sources["this_text"]:
        say(f"  {sources['this_text']:6.1%}  this text itself, before its window")
    if not documents and not sources["this_text"]:
        say("  nothing was retrieved")


def flatten(text: str) -> str:
    """One line, without what would steer the terminal."""
    text = re.sub(r"\s*\n\s*", " ⏎ ", text)
    return "".join(one if one.isprintable() else " " for one in text)
