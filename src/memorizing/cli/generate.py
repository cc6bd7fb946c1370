"""`memorizing generate`."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memorizing.cli.options import (
    INTERRUPTED_STATUS,
    AdapterOption,
    DeviceOption,
    DocumentsOption,
    JsonOption,
    ModelArgument,
    ModelPrecisionOption,
    flag,
    option,
    prepare_files,
    write_result,
)
from memorizing.cli.pretrained import load_model
from memorizing.cli.reading_plan import STDIN, is_utf8, read_stdin
from memorizing.errors import ConfigError, CorpusError, TokenizerError
from memorizing.terminal import escape, say

if TYPE_CHECKING:
    import torch

    from memorizing.huggingface.sessions.sources import Source, Sources

EXAMPLES = """\b
examples:
  memorizing generate runs/smollm2 --memory repo.memory --prompt 'def open_memory(' --sources
  memorizing generate runs/smollm2 --memory repo.memory --no-memory --prompt 'def open_memory('
  memorizing generate runs/smollm2 --memory repo.memory --chat --prompt 'What does reset do?'
  memorizing generate runs/smollm2 --prompt-file start.txt --temperature 0.8 --top-p 0.95 --seed 1
"""

_DOCUMENTS_SHOWN = 5
_LINES_SHOWN = 4
"""Of a passage, from the line where what was found begins."""
_LINE_LEN = 100


def run(
    model: ModelArgument,
    memory: Annotated[
        str | None,
        option("DIR", "Folder that `memorizing read` made, or ray://HOST:PORT/NAME.", "--memory"),
    ] = None,
    no_memory: Annotated[
        bool, flag("Read nothing from --memory, with its window: to compare.", "--no-memory")
    ] = False,
    documents: DocumentsOption = None,
    prompt: Annotated[str | None, option("TEXT", "What the model goes on from.")] = None,
    prompt_file: Annotated[
        Path | None, option("FILE", "Read the prompt from a file, or - for standard input.")
    ] = None,
    max_new_tokens: Annotated[int, option("N", "Stop after N.", min=1)] = 128,
    temperature: Annotated[
        float, option("T", "Sample; 0 takes the likeliest token.", min=0.0)
    ] = 0.0,
    top_p: Annotated[
        float, option("P", "Sample from the likeliest of this mass.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int, option("N", "Of sampling.", min=0, max=2**63 - 1)] = 0,
    chat: Annotated[
        bool, flag("The prompt is a question, put as the model was taught.", "--chat")
    ] = False,
    sources: Annotated[
        bool, flag("Then show what was read: passages, or documents and places.", "--sources")
    ] = False,
    window: Annotated[
        int | None, option("N", "Without --memory: tokens of local attention. Default: 512.", min=1)
    ] = None,
    adapter: AdapterOption = None,
    precision: ModelPrecisionOption = "auto",
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Go on from a prompt, with what a model has read in its memory, or without.

    The text goes to standard output as it is written, everything else to standard error. Layers,
    window and all other settings of the memory are those it was read with.
    """
    is_read = memory is not None and not no_memory
    check_options(memory, no_memory, documents, sources, temperature, top_p)
    if window is not None and (memory is not None or adapter is not None):
        raise ConfigError("--window is given, and --memory or --adapter has one; leave it out")
    text = find_prompt(prompt, prompt_file)
    prepare_files(json_file)
    from memorizing.opening import is_address, open_memory

    num_documents = None
    if memory is not None and not is_address(memory):
        from memorizing.memory.disk import MemoryFolder

        num_documents = len(MemoryFolder.open(memory).documents)
    loaded, tokenizer = load_model(model, precision, device)
    prompt_tokens = encode(tokenizer, text, chat=chat)
    inputs = {name: tensor.to(loaded.device) for name, tensor in prompt_tokens.items()}

    from memorizing.data.text import clean_name
    from memorizing.huggingface import add_memory
    from memorizing.huggingface.learning.adapter import load_adapter

    session = None
    if adapter is not None:
        load_adapter(loaded, adapter)
    elif memory is None:
        add_memory(loaded, window=window or choose_window(loaded), read="entries")
    if memory is not None:
        names = documents and list(map(clean_name, documents))
        session = open_memory(loaded, memory, tokenizer=tokenizer, documents=names)
        count = f"{len(session.documents):,}"
        count += f" of {num_documents:,}" if names and num_documents is not None else ""
        held = f"{count} documents, {session.num_entries:,} entries"
        say(f"memory: {memory}, {held}{'' if is_read else '; not read'}")
    result: dict[str, Any] = {
        "model": model,
        "memory": memory if is_read else None,
        "documents": documents,
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
        print_sources(found, result["prompt_tokens"])
    write_result(json_file, result)
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED_STATUS)


def check_options(
    memory: str | None,
    no_memory: bool,
    documents: list[str] | None,
    sources: bool,
    temperature: float,
    top_p: float,
) -> None:
    """Refuse options that say nothing together.

    Raises:
        ConfigError: with the option and what it needs.
    """
    if no_memory and memory is None:
        raise ConfigError("--no-memory is given without --memory, whose window it takes; add it")
    if sources and (memory is None or no_memory):
        raise ConfigError("--sources is given, and no memory is read; give --memory DIR")
    if documents and memory is None:
        raise ConfigError("--documents chooses among those of a memory; give --memory DIR")
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
        if not is_utf8(prompt):
            raise CorpusError(f"--prompt is {prompt!r}; a prompt is text in UTF-8")
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

    from memorizing.huggingface.sessions.texts import encode_chat, encode_text

    if chat:
        if not tokenizer.chat_template:
            raise TokenizerError(
                "--chat is given, and this model has no template of chats: it was not taught to "
                "answer; leave --chat out, and begin the answer yourself"
            )
        tokens = encode_chat(tokenizer, [{"role": "user", "content": text}])
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
    from transformers.utils import logging

    from memorizing.huggingface.generating import choose_padding, choose_sampling, forget_sampling

    # The model's own settings of sampling must not change what the options say.
    forget_sampling(model)
    # What it says of lengths is not so: a model with a window reads past its own.
    logging.set_verbosity_error()
    torch.manual_seed(seed)
    new_tokens: list[int] = []
    streamer, is_interrupted = make_streamer(tokenizer, new_tokens), False
    start = time.perf_counter()
    try:
        model.generate(
            **inputs,
            **choose_sampling(temperature, top_p),
            max_new_tokens=max_new_tokens,
            pad_token_id=choose_padding(tokenizer, model.generation_config),
            streamer=streamer,
        )
    except KeyboardInterrupt:
        is_interrupted = True
        streamer.end()
    return {
        "text": tokenizer.decode(new_tokens, skip_special_tokens=True),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": len(new_tokens),
        "seconds": round(time.perf_counter() - start, 3),
        "interrupted": is_interrupted,
    }


def make_streamer(tokenizer: Any, new_tokens: list[int]) -> Any:
    """What shows the text as it comes, and appends new tokens to a list.

    A file or a pipe gets the text as it is, a terminal what does not steer it.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                new_tokens.extend(value.flatten().tolist())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            shown = escape(text, "\n\t") if sys.stdout.isatty() else text
            print(shown, flush=True, end="\n" if stream_end else "")

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def list_sources(found: Sources) -> dict[str, Any]:
    """Documents with their share of attention, and what was read in those that have texts.

    Raises:
        MemoryFolderError: the folder is damaged.
    """
    total = sum(found.mass.values()) + found.own_mass
    return {
        "this_text": found.own_mass / total if total else 0.0,
        "documents": [{"name": name, "share": share} for name, share in found.list()],
        "passages": list(map(dataclasses.asdict, found.passages)),
        "places": list(map(dataclasses.asdict, [] if found.passages else found.find_places())),
    }


def print_sources(found: Sources, num_prompt: int) -> None:
    """Print to standard error what was read, most used first."""
    if found.passages:
        print_passages(found.passages, num_prompt)
        return
    documents, places = found.list(), found.find_places(num_documents=_DOCUMENTS_SHOWN)
    say("sources, by their share of attention to what was retrieved:")
    for name, share in documents[:_DOCUMENTS_SHOWN]:
        say(f"  {share:6.1%}  {name}")
        for place in places:
            if place.document == name:
                start, end = place.focus
                text = f"{place.text[:start]}«{place.text[start:end]}»{place.text[end:]}"
                say(f"          {place.first_line}: " + re.sub(r"\s*\n\s*", " ⏎ ", text))
    rest = documents[_DOCUMENTS_SHOWN:]
    if rest:
        say(f"  {sum(share for _, share in rest):6.1%}  {len(rest):,} more documents")
    own = 1 - sum(share for _, share in documents)
    if found.own_mass:
        say(f"  {own:6.1%}  this text itself, before its window")
    if not documents and not found.own_mass:
        say("  nothing was retrieved")


def print_passages(passages: Sequence[Source], num_prompt: int) -> None:
    """Print passages in the order in which they came in sight, from the line that was found."""
    for since, group in itertools.groupby(passages, lambda one: one.since or 0):
        # The call that reads the last token which was written looks for passages, for the next.
        num_written = since - num_prompt + 1
        when = "from the start" if num_written <= 0 else f"after {num_written:,} new tokens"
        say(f"passages in sight {when}, best one first, with their share of attention:")
        for one in group:
            place = one.document or "this text itself, before its window"
            lines = "" if one.first_line is None else f", lines {one.first_line}-{one.last_line}"
            say(f"  {one.weight:6.1%}  {place}{lines}")
            found = max(one.text.rfind(end, 0, one.focus[0]) for end in "\r\n") + 1
            shown = [line for line in one.text[found:].splitlines() if line.strip()]
            for line in shown[:_LINES_SHOWN]:
                say(f"          {line[:_LINE_LEN]}{'…' * (len(line) > _LINE_LEN)}")
