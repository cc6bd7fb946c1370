"""From a model with memory and documents to an adapter in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from memorizing.data import Document, TokenizedDocument
from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import get_attachment, unwrap
from memorizing.huggingface.sessions.scoring import find_start_token
from memorizing.training.checkpoints import list_checkpoints
from memorizing.training.finetuning.documents import tokenize_for_model
from memorizing.training.finetuning.loop import Finetuner
from memorizing.training.finetuning.run_folder import RESULT_FOLDER, prepare_run_folder
from memorizing.training.finetuning.settings import FinetuneSettings
from memorizing.training.progress import make_display
from memorizing.training.reporting import StepMetrics, TrainingResult
from memorizing.training.run_folder import LOG_FILE


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
    """Finetune a model of `transformers` to use its memory, on documents read in order in rows.

        memorizing.add_memory(model, layers=[20], capacity=8192)
        finetune(model, tokenizer, documents, FinetuneSettings(train="lora"), "runs/mine")

    Each step reads the next segment of a document in every row, with that row's memory and window
    cache; neither takes a gradient. A memory of capacity 0 trains the same on the same tokens in
    the same order without memory: the control.

    The model computes in the dtype it has; what is trained is kept in fp32 beside it. Afterwards
    the model is the finetuned one, and `run_dir/adapter` holds what was learned (`load_adapter`);
    with train = "all" that folder is also the model itself, for `from_pretrained`.

    Args:
        model: with `add_memory`, as it was loaded. Trained in place, on its device.
        tokenizer: of the model.
        documents: with texts, or tokenized without special tokens.
        settings: how to train.
        run_dir: a new or empty folder, unless one of the two flags is given.
        validation: documents for the evaluations during training.
        resume: go on from the last checkpoint, bit for bit as if the run had not stopped (with the
            same threads and versions). The model is the base model with the same memory again.
        overwrite: replace a run that is there.
        progress: show a progress bar, or lines where standard error is not a terminal.
        about: written into the run's description, such as where model and corpus are from.
        on_step: called after every step.

    Raises:
        RunFolderError: a folder that exists, or none to resume.
        ConfigError: settings that cannot work, or do not fit the run that is resumed.
        CorpusError: no documents, or other documents than the run was started with.
        IndexUnavailableError: LoRA without peft.
        ResourceError: no space left.
        CheckpointError: the last checkpoint is truncated, altered or of another model.
        NonFiniteLossError: the loss is NaN or infinite; the state before that step is saved.
    """
    run_dir, inner = Path(run_dir), unwrap(model)
    attachment = get_attachment(inner)
    limits = {
        "max_tokens": settings.max_document_tokens,
        "min_tokens": settings.min_document_tokens,
    }
    start_token = find_start_token(inner, tokenizer)
    display = make_display(progress)
    display.say("reading the documents")
    train = tokenize_for_model(documents, tokenizer, **limits)
    held_out = tokenize_for_model(validation, tokenizer, max_tokens=settings.max_document_tokens)
    if settings.evaluate_every and not held_out:
        raise ConfigError(
            f"evaluate_every is {settings.evaluate_every}, but no document is held out for it; "
            "give validation documents, or set it to 0"
        )
    description = {
        "finetune": settings.to_dict(),
        "memory": attachment.settings.to_dict(),
        "heads": attachment.dump_heads(),
        "dtype": str(inner.dtype),
        "about": about or {},
    }
    changes = prepare_run_folder(run_dir, description, resume=resume, overwrite=overwrite)
    display.open_log(run_dir / LOG_FILE)
    for change in changes:
        display.say(f"resumed with another setting: {change}")
    tuner = Finetuner(
        inner,
        train,
        start_token,
        settings,
        run_dir=run_dir,
        validation=held_out,
        display=display,
        on_step=on_step,
    )
    display.say(
        f"{tuner.weights.num_weights:,} weights are trained; {tuner.loader.num_targets:,} training "
        f"tokens in {len(train)} documents"
    )
    checkpoints = list_checkpoints(run_dir) if resume else []
    if checkpoints:
        tuner.load(checkpoints[-1])
        display.say(f"resumed from {checkpoints[-1].name}")
    result = tuner.run()
    if not result.interrupted:
        tuner.save_result(run_dir / RESULT_FOLDER)
        display.say(f"saved in {run_dir / RESULT_FOLDER}")
    return result
