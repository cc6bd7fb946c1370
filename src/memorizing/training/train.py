"""From a configuration to a trained model in a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from memorizing.errors import CheckpointError, ConfigError
from memorizing.model import MemorizingTransformer
from memorizing.ranks import Ranks, join_ranks
from memorizing.storage.files import write_bytes
from memorizing.terminal import Display, make_display
from memorizing.training.checkpoint import (
    TOKENIZER_FILE,
    advise,
    find_checkpoint,
    read_trainer,
)
from memorizing.training.precision import Precision, choose_precision
from memorizing.training.reporting import TrainingResult
from memorizing.training.resources import (
    check_resources,
    count_weights,
    deal_training,
    estimate_needs,
    measure_share,
)
from memorizing.training.run_folder import (
    CONFIG_FILE,
    LOG_FILE,
    TRAINING,
    RunFolder,
    compare_settings,
    open_run,
    read_run_config,
)
from memorizing.training.trainer import Trainer


def train(
    config: Config,
    run_dir: Path | str,
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
    overwrite: bool = False,
    corpus: TokenizedCorpus | None = None,
    make_model: Callable[[ModelConfig], MemorizingTransformer] = MemorizingTransformer,
) -> TrainingResult:
    """Train the model that a configuration describes, in a run folder that describes itself.

    The model's vocabulary is that of the tokenizer. Initialization, order of documents and dropout
    follow `training.seed`, through torch's global generator.

    Started by `torchrun` or `accelerate launch`, the processes train one model: rows are dealt
    among them, and everything else is as in one process (dropout draws other masks). A run goes on
    with any number of processes.

    Args:
        config: everything about the run.
        run_dir: a new or empty folder, unless one of the two flags is given.
        resume: go on from the last checkpoint that is whole, bit for bit as if the run had not
            stopped (with the same threads and versions).
        device: where to train; None is CUDA where there is a GPU, else the CPU.
        progress: show a progress bar, or lines where standard error is not a terminal.
        overwrite: replace a run that is there, once the new one has taken its first step.
        corpus: what `prepare_corpus` gave for this configuration, to train several models on the
            same tokens; None prepares it.
        make_model: makes the model of a configuration, such as one with an attention of your own:
            `lambda config: MemorizingTransformer(config, MyAttention)`. Resuming, and `load_model`,
            need the same again; without it they refuse weights of other names or shapes. Memory is
            estimated as for the ordinary model.

    Raises:
        RunFolderError: a folder that exists, none to resume, or one that another process writes.
        ConfigError: settings that do not fit the run that is resumed.
        CorpusError: no documents, or other documents than the run was started with.
        ResourceError: too little memory, said before anything is started; or no space left.
        CheckpointError: every checkpoint is truncated or altered.
        NonFiniteLossError: the loss is NaN or infinite; the state before that step is saved.
        RankError: another process of the run is gone, failed, or has other files.
    """
    path = Path(run_dir)
    with (
        join_ranks(device) as ranks,
        open_run(path, TRAINING, resume=resume, overwrite=overwrite, ranks=ranks) as run,
    ):
        display = make_display(progress and ranks.is_main)
        place = ranks.find_device(device)
        return _train_in(run, config, place, display, corpus, ranks, make_model)


def _train_in(
    run: RunFolder,
    config: Config,
    device: torch.device,
    display: Display,
    corpus: TokenizedCorpus | None,
    ranks: Ranks,
    make_model: Callable[[ModelConfig], MemorizingTransformer],
) -> TrainingResult:
    """`train` in a folder that is nobody else's."""
    changes: list[str] = []
    if run.is_resumed:
        saved = read_run_config(run.path).to_dict()
        del saved["model"]["vocab_size"]  # that of the tokenizer, whatever the recipe says
        changes = compare_settings(saved, config.to_dict(), TRAINING.must_stay)
    last = run.find_checkpoint(display.say)
    ranks.check_equal("setting or last checkpoint", [config.to_dict(), str(last)])
    # What a probe finds may differ.
    precision = Precision(**ranks.share(asdict(_settle_precision(config, last, device))))
    _check_memory(config, precision, device, ranks)
    start_from = config.training.start_from
    origin = find_checkpoint(Path(start_from)) if start_from and last is None else None
    if corpus is None:
        tokenizer = _find_tokenizer(run, origin, last)
        if ranks.is_main:
            corpus = prepare_corpus(config, display, tokenizer)
        if ranks.size > 1:
            text = ranks.share(corpus and corpus.tokenizer.backend.to_str())
            # What the main process has tokenized is in the cache.
            corpus = corpus or prepare_corpus(config, display, Tokenizer.parse(text))
        assert corpus is not None
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
    )
    _check_memory(config, precision, device, ranks)  # now that the vocabulary is known
    for change in changes:
        display.say(f"resumed with another setting: {change}")
    display.say(f"precision {precision.reason}")

    def begin() -> None:
        def write(folder: Path) -> None:
            write_bytes(folder / CONFIG_FILE, config.to_toml().encode())
            corpus.tokenizer.save(folder)

        about = {"precision": precision.name, "num_weights": num_weights}
        run.begin(write, {**about, "processes": ranks.size})
        display.open_log(run.path / LOG_FILE)

    torch.manual_seed(config.training.seed)
    model = make_model(config.model)
    if not (config.training.shard and ranks.size > 1):
        model.to(device)
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
        run_dir=run.path,
        tokenizer=corpus.tokenizer,
        validation=corpus.validation,
        precision=precision,
        display=display,
        on_begin=begin,
        ranks=ranks,
    )
    num_weights = sum(p.numel() for p in model.parameters())
    display.say(
        f"{num_weights:,} weights; {loader.num_targets:,} training tokens in {len(corpus.train)} "
        "documents"
    )
    if last is not None:
        trainer.load(last)
        display.say(f"resumed from {last.name}")
    elif run.is_resumed:
        display.say("the run has no checkpoint yet: it starts at the beginning")
    if origin is not None:
        trainer.load_weights(origin, may_lack_memory=True)
        display.say(f"starts with the weights of {origin}")
    return trainer.run()


def _find_tokenizer(run: RunFolder, origin: Path | None, last: Path | None) -> Tokenizer | None:
    """The tokenizer that a run goes on or begins with; None where it has to be trained.

    A run that was killed before it had written one has that of its last checkpoint.
    """
    if run.is_resumed and (run.path / TOKENIZER_FILE).is_file():
        return load_tokenizer(run.path)
    known = last or origin
    return load_tokenizer(known) if known else None


@dataclass(frozen=True)
class TokenizedCorpus:
    """The documents of a configuration by their use, and the tokenizer trained on the first."""

    tokenizer: Tokenizer
    train: list[TokenizedDocument]
    validation: list[TokenizedDocument]
    test: list[Document]
    """Not tokenized: nothing but a claim reads them."""


def _settle_precision(config: Config, last: Path | None, device: torch.device) -> Precision:
    """What the run was started with, since a probe may come out differently; or a choice."""
    if last is not None:
        name = read_trainer(last).get("precision")
        if name not in ("fp32", "bf16"):
            raise CheckpointError(
                f"{last} does not say its precision; it was altered: {advise(last)}"
            )
        return Precision(name, f"{name}, as before")
    return choose_precision(
        config.training.precision, config.model.model_dim, config.model.ffn_dim, device
    )


def _check_memory(config: Config, precision: Precision, device: torch.device, ranks: Ranks) -> None:
    training = deal_training(config.training, len(ranks.deal(config.training.rows)))
    num_weights = count_weights(config.model)
    bytes_per_value = 2 if precision.name == "bf16" else 4
    needs = estimate_needs(config.model, training, num_weights, bytes_per_value, device, ranks.size)
    check_resources(needs, config.model, training, measure_share(device, ranks))


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
