"""From a model with memory and documents to an adapter in a run folder that describes itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from memorizing.data import Document, TokenizedDocument, cut_documents, tokenize_documents
from memorizing.errors import ConfigError, CorpusError, ResourceError, RunFolderError
from memorizing.huggingface.attaching.attachment import get_attachment, unwrap
from memorizing.huggingface.sessions.scoring import find_start_token
from memorizing.huggingface.sessions.texts import encode_text, wrap_tokenizer
from memorizing.ranks import Ranks, join_ranks
from memorizing.storage.files import read_json, write_json
from memorizing.terminal import make_display
from memorizing.training.finetuning.finetuner import Finetuner
from memorizing.training.finetuning.settings import FinetuneSettings
from memorizing.training.reporting import StepMetrics, TrainingResult
from memorizing.training.resources import measure_share
from memorizing.training.run_folder import LOG_FILE, RunKind, compare_settings, open_run

SETTINGS_FILE = "finetune.json"
RESULT_FOLDER = "adapter"
FINETUNING = RunKind(
    "finetuning",
    SETTINGS_FILE,
    (RESULT_FOLDER,),
    (
        "memory.",
        "finetune.train",
        "finetune.rows",
        "finetune.lora_",
        "finetune.seed",
        "finetune.min_document_tokens",
        "finetune.max_document_tokens",
    ),
)


def finetune(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document] | Iterable[TokenizedDocument],
    settings: FinetuneSettings,
    run_dir: Path | str,
    *,
    validation: Iterable[Document] | Iterable[TokenizedDocument] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    about: dict[str, Any] | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
) -> TrainingResult:
    """Finetune a model of `transformers` to use its memory.

        memorizing.add_memory(model, layers=[20], capacity=8192, read="entries")
        finetune(model, tokenizer, documents, FinetuneSettings(train="lora"), "runs/mine")

    Each step reads the next segment of a document in every row, with that row's memory and window
    cache; neither takes a gradient. Where passages are read (`read="passages"`), every row of a
    step is another text of 64 to 128 tokens, drawn from the documents, behind passages that its
    first words find; see `finetuning/examples.py`.

    A memory of capacity 0 trains the same on the same tokens in the same order without memory: the
    control.

    The model computes in the dtype it has; what is trained is kept in fp32 beside it. Afterwards
    the model is the finetuned one, and `run_dir/adapter` holds what was learned (`load_adapter`);
    with train = "all" that folder is also the model itself, with its tokenizer, for
    `from_pretrained`: what `load_adapter` then has to be given.

    Args:
        model: with `add_memory`, as it was loaded. Trained in place, on its device.
        tokenizer: of the model.
        documents: with texts, or tokenized without special tokens.
        settings: how to train.
        run_dir: a new or empty folder, unless one of the two flags is given.
        validation: documents for the evaluations during training.
        resume: go on from the last checkpoint, bit for bit as if the run had not stopped (with the
            same threads and versions). The model is the base model with the same memory again.
        overwrite: replace a run that is there, once the new one has taken its first step.
        progress: show a progress bar, or lines where standard error is not a terminal.
        about: written into the run's description, such as where model and corpus are from.
        on_step: called after every step.

    Raises:
        RunFolderError: a folder that exists, none to resume, or one that another process writes.
        ConfigError: settings that cannot work, or do not fit the run that is resumed.
        CorpusError: no documents, or other documents than the run was started with.
        IndexUnavailableError: LoRA without peft.
        ResourceError: too little memory, said before the first step; or no space left.
        CheckpointError: no checkpoint is whole, or the last is of another model.
        NonFiniteLossError: the loss is NaN or infinite; the state before that step is saved.
    """
    inner = unwrap(model)
    attachment = get_attachment(inner)
    with (
        join_ranks(inner.get_input_embeddings().weight.device) as ranks,
        open_run(Path(run_dir), FINETUNING, resume=resume, overwrite=overwrite, ranks=ranks) as run,
    ):
        description = {
            "finetune": settings.to_dict(),
            "memory": attachment.settings.to_dict(),
            "heads": attachment.dump_heads(),
            "dtype": str(inner.dtype),
            "about": about or {},
        }
        changes: list[str] = []
        if run.is_resumed:
            before = read_description(run.path)
            changes = _compare(before, description)
            description["heads"] = before["heads"]
        ranks.check_equal("model, memory or setting", description)
        start_token = find_start_token(inner, tokenizer)
        display = make_display(progress and ranks.is_main)
        display.say("reading the documents")
        most = settings.max_document_tokens
        train = tokenize_for_model(
            documents, tokenizer, max_tokens=most, min_tokens=settings.min_document_tokens
        )
        held_out = tokenize_for_model(validation, tokenizer, max_tokens=most)
        if settings.evaluate_every and not held_out:
            raise ConfigError(
                f"evaluate_every is {settings.evaluate_every}, but no document is held out for it; "
                "give validation documents, or set it to 0"
            )
        for change in changes:
            display.say(f"resumed with another setting: {change}")

        def begin() -> None:
            run.begin(
                lambda folder: write_json(folder / SETTINGS_FILE, description),
                {"num_weights": num_weights, "processes": ranks.size},
            )
            display.open_log(run.path / LOG_FILE)

        tuner = Finetuner(
            inner,
            train,
            start_token,
            settings,
            tokenizer=tokenizer,
            run_dir=run.path,
            validation=held_out,
            display=display,
            on_step=on_step,
            on_begin=begin,
            ranks=ranks,
        )
        num_weights = sum(p.numel() for p in inner.parameters() if p.requires_grad)
        _check_memory(tuner, num_weights, ranks)
        display.say(
            f"{num_weights:,} weights are trained; {tuner.loader.num_targets:,} training tokens in "
            f"{len(train)} documents"
        )
        if last := run.find_checkpoint(display.say):
            tuner.load(last)
            display.say(f"resumed from {last.name}")
        elif run.is_resumed:
            display.say("the run has no checkpoint yet: it starts at the beginning")
        result = tuner.run()
        if not result.interrupted:
            tuner.save_result(run.path / RESULT_FOLDER)
            display.say(f"saved in {run.path / RESULT_FOLDER}")
        return result


def _compare(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    before, now = (
        {name: json.loads(json.dumps(values[name])) for name in ("finetune", "memory")}
        for values in (saved, wanted)
    )
    return compare_settings(before, now, FINETUNING.must_stay)


def _check_memory(tuner: Finetuner, num_weights: int, ranks: Ranks) -> None:
    """Refuse what cannot fit: gradients and moments of what is trained, and memories of all rows.

    Raises:
        ResourceError: with what is needed and what there is.
    """
    attachment, rows = tuner.attachment, len(ranks.deal(tuner.settings.rows))
    num_layers = len(attachment.settings.layers)
    capacity = 0 if attachment.settings.read == "passages" else attachment.settings.capacity
    entry = 2 * math.prod(attachment.entry_shape) * attachment.stored_dtype.itemsize
    num_parts = ranks.size if tuner.settings.shard else 1
    weights, memories = 3 * 4 * num_weights // num_parts, rows * num_layers * capacity * entry
    available = measure_share(tuner.model.get_input_embeddings().weight.device, ranks)
    if weights + memories > available:
        raise ResourceError(
            f"finetuning needs {(weights + memories) / 2**30:,.1f} GiB besides the model and "
            f"{available / 2**30:,.1f} GiB are free: {weights / 2**30:,.1f} GiB for gradients and "
            f"moments of what is trained, {memories / 2**30:,.1f} GiB for memories of capacity "
            f"{capacity:,} in {rows} rows; lower the rows or the capacity, or train less"
        )


def read_description(run_dir: Path) -> dict[str, Any]:
    """What a run was started with: `finetune` and `memory` settings, `heads` as they began.

    Raises:
        RunFolderError: the folder is no finetuning, or its description cannot be read.
    """
    path = Path(run_dir) / SETTINGS_FILE
    remedy = "restore the file that finetuning wrote"
    missing = (
        f"{run_dir} holds no finetuning to resume (no {SETTINGS_FILE}); leave out --resume to "
        "start one"
    )
    values = read_json(path, RunFolderError, remedy, missing=missing)
    for table in ("finetune", "memory", "heads"):
        if not isinstance(values.get(table), dict):
            raise RunFolderError(f"{path} has no table {table!r}; it was altered: {remedy}")
    return values


def tokenize_for_model(
    documents: Iterable[Document] | Iterable[TokenizedDocument],
    tokenizer: Any,
    *,
    max_tokens: int = 0,
    min_tokens: int = 0,
) -> list[TokenizedDocument]:
    """Tokenize documents that are not yet, then cut them (`cut_documents`).

    Texts are kept tokenized on disk (`MEMORIZING_CACHE`).

    Args:
        documents: all texts, or all tokenized.
        tokenizer: of the model; None where nothing is to be tokenized or cut.
        max_tokens: longer documents are cut; 0 leaves them whole.
        min_tokens: shorter documents are left out.

    Raises:
        ConfigError: texts, or documents to cut, and no tokenizer that can.
        CorpusError: all documents are too short.
    """
    items: list[Any] = list(documents)
    own = None if tokenizer is None else wrap_tokenizer(tokenizer)
    tokenized = [item for item in items if isinstance(item, TokenizedDocument)]
    if len(tokenized) < len(items):
        if tokenizer is None:
            raise ConfigError("documents are texts; give the tokenizer of the model")
        if own is not None:
            return tokenize_documents(items, own, max_tokens=max_tokens, min_tokens=min_tokens)
        tokenized = [
            TokenizedDocument(item.name, encode_text(tokenizer, item.text), item.num_bytes)
            for item in items
        ]
    if own is not None:
        return cut_documents(tokenized, own, max_tokens, min_tokens)
    if max_tokens:
        raise ConfigError(
            f"max_document_tokens is {max_tokens}, and the tokenizer cannot tell the bytes of a "
            "token; use 0, or a fast tokenizer"
        )
    kept = [one for one in tokenized if len(one.tokens) >= max(min_tokens, 1)]
    if tokenized and not kept:
        raise CorpusError(f"every document is shorter than {min_tokens} tokens")
    return kept
