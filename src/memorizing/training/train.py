"""From a configuration to a trained model in a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memorizing.config import Config, ModelConfig
from memorizing.data import (
    Document,
    SegmentLoader,
    TokenizedDocument,
    Tokenizer,
    load_splits,
    load_tokenizer,
    tokenize_documents,
    train_tokenizer,
)
from memorizing.devices import find_device
from memorizing.errors import CheckpointError, ConfigError
from memorizing.model import MemorizingTransformer
from memorizing.training.checkpoint import load_weights
from memorizing.training.checkpoints import TRAINER_FILE, find_checkpoint, list_checkpoints
from memorizing.training.folder import read_json
from memorizing.training.precision import Precision, choose_precision
from memorizing.training.progress import Display, make_display
from memorizing.training.resources import check_resources, estimate_needs, measure_available
from memorizing.training.run_folder import LOG_FILE, check_run_folder, create_run_folder, record
from memorizing.training.trainer import Trainer, TrainingResult


def train(
    config: Config,
    run_dir: Path | str,
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
    overwrite: bool = False,
    corpus: TokenizedCorpus | None = None,
) -> TrainingResult:
    """Train the model that a configuration describes, in a run folder that describes itself.

    The model's vocabulary is that of the tokenizer. Initialization, order of documents and dropout
    follow `training.seed`, through torch's global generator.

    Args:
        config: everything about the run.
        run_dir: a new or empty folder, unless one of the two flags is given.
        resume: go on from the last checkpoint, bit for bit as if the run had not stopped (with the
            same threads and versions).
        device: where to train; None is CUDA where there is a GPU, else the CPU.
        progress: show a progress bar, or lines where standard error is not a terminal.
        overwrite: replace a run that is there.
        corpus: what `prepare_corpus` gave for this configuration, to train several models on the
            same tokens; None prepares it.

    Raises:
        RunFolderError: a folder that exists, or none to resume.
        ConfigError: settings that do not fit the run that is resumed.
        CorpusError: no documents, or other documents than the run was started with.
        ResourceError: too little memory, said before anything is started; or no space left.
        CheckpointError: the last checkpoint is truncated or altered.
        NonFiniteLossError: the loss is NaN or infinite; the state before that step is saved.
    """
    run_dir = Path(run_dir)
    changes = check_run_folder(run_dir, config, resume=resume, overwrite=overwrite)
    device = find_device(device)
    display = make_display(progress)
    checkpoints = list_checkpoints(run_dir) if resume else []
    precision = _settle_precision(config, checkpoints, device)
    _check_memory(config, precision, device)
    origin = None if checkpoints else _find_origin(config)
    if corpus is None:
        known = run_dir if resume else origin
        corpus = prepare_corpus(config, display, load_tokenizer(known) if known else None)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
    )
    create_run_folder(run_dir, config, resume=resume, overwrite=overwrite)
    corpus.tokenizer.save(run_dir)
    display.open_log(run_dir / LOG_FILE)
    for change in changes:
        display.say(f"resumed with another setting: {change}")
    display.say(f"precision {precision.reason}")

    torch.manual_seed(config.training.seed)
    model = MemorizingTransformer(config.model).to(device)
    loader = SegmentLoader(
        corpus.train,
        config.training.rows,
        config.model.segment_len,
        corpus.tokenizer.start_token,
        config.training.seed,
        repeat=True,
    )
    trainer = Trainer(
        model,
        loader,
        config.training,
        run_dir=run_dir,
        tokenizer=corpus.tokenizer,
        validation=corpus.validation,
        precision=precision,
        display=display,
    )
    num_weights = sum(p.numel() for p in model.parameters())
    record(run_dir, {"precision": precision.name, "num_weights": num_weights})
    display.say(
        f"{num_weights:,} weights; {loader.num_targets:,} training tokens in {len(corpus.train)} "
        "documents"
    )
    if checkpoints:
        trainer.load(checkpoints[-1])
        display.say(f"resumed from {checkpoints[-1].name}")
    else:
        if resume:
            display.say("the run has no checkpoint yet: it starts at the beginning")
        if origin is not None:
            load_weights(origin, model, corpus.tokenizer, may_lack_memory=True)
            display.say(f"starts with the weights of {origin}")
    return trainer.run()


def _find_origin(config: Config) -> Path | None:
    """The checkpoint whose weights a run begins with."""
    start_from = config.training.start_from
    return find_checkpoint(Path(start_from)) if start_from else None


@dataclass(frozen=True)
class TokenizedCorpus:
    """The documents of a configuration by their use, and the tokenizer trained on the first."""

    tokenizer: Tokenizer
    train: list[TokenizedDocument]
    validation: list[TokenizedDocument]
    test: list[Document]
    """Not tokenized: nothing but a claim reads them."""


def _settle_precision(
    config: Config, checkpoints: Sequence[Path], device: torch.device
) -> Precision:
    """What the run was started with, since a probe may come out differently; or a choice."""
    if checkpoints:
        name = read_json(checkpoints[-1] / TRAINER_FILE).get("precision")
        if name not in ("fp32", "bf16"):
            raise CheckpointError(
                f"{checkpoints[-1]} does not say its precision; it was altered: use another "
                "checkpoint"
            )
        return Precision(name, f"{name}, as before")
    return choose_precision(
        config.training.precision, config.model.model_dim, config.model.ffn_dim, device
    )


def _check_memory(config: Config, precision: Precision, device: torch.device) -> None:
    needs = estimate_needs(
        config.model,
        config.training,
        _count_weights(config.model),
        2 if precision.name == "bf16" else 4,
        device,
    )
    check_resources(needs, config.model, config.training, measure_available(device))


def _count_weights(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MemorizingTransformer(config).parameters())


def prepare_corpus(
    config: Config, display: Display, tokenizer: Tokenizer | None = None
) -> TokenizedCorpus:
    """Read the corpus, train its tokenizer unless one is given, and tokenize the documents.

    Raises:
        CorpusError: unknown or empty; or a held-out name that matches nothing.
        TokenizerError: a tokenizer that is missing.
        ConfigError: evaluations during training, and no document is held out for them.
    """
    display.say("reading the corpus")
    splits = load_splits(config.data)
    for line in splits.describe():
        display.say(line)
    if tokenizer is None:
        if config.tokenizer.kind != "pretrained":
            display.say(
                f"training a {config.tokenizer.kind} tokenizer of {config.tokenizer.vocab_size:,} "
                "ids"
            )
        tokenizer = train_tokenizer(splits.train, config.tokenizer)
    if config.training.evaluate_every and not splits.validation:
        raise ConfigError(
            f"training.evaluate_every is {config.training.evaluate_every}, but no document is held "
            "out for it; name some in data.validation, set data.held_out_share, or set it to 0"
        )
    max_tokens = config.data.max_document_tokens
    train_documents = tokenize_documents(
        splits.train, tokenizer, max_tokens=max_tokens, min_tokens=config.data.min_document_tokens
    )
    validation = tokenize_documents(splits.validation, tokenizer, max_tokens=max_tokens)
    return TokenizedCorpus(tokenizer, train_documents, validation, splits.test)
