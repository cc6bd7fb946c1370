"""Training a model of `transformers` with memory: its histories, and what the loop needs to know.

A checkpoint is an adapter folder with what training needs to go on beside it:

    step-000100/
    ├── memory_settings.json, memory_heads.safetensors, adapter_*   as `save_adapter` writes them
    ├── config.json, model.safetensors, tokenizer.json, ...   with train = "all": the whole model,
    │                                                         in fp32, with its tokenizer
    └── manifest.json, trainer.json, optimizer.safetensors, state.safetensors   as for our own model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack, final

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing.data import SegmentBatch, SegmentLoader, TokenizedDocument
from memorizing.errors import CheckpointError, ConfigError
from memorizing.evaluation import EvaluationResult, Progress
from memorizing.evaluation.pretrained import evaluate_model
from memorizing.huggingface.attaching.attachment import Attachment, get_attachment, unwrap
from memorizing.huggingface.attaching.fingerprint import hash_model
from memorizing.huggingface.learning.adapter import (
    HEADS_FILE,
    LORA_FILE,
    SETTINGS_FILE,
    add_lora,
    find_lora,
    list_parameters,
    load_lora_weights,
    train_only,
    write_adapter,
)
from memorizing.huggingface.sessions.cache_state import dump_cache, load_cache
from memorizing.huggingface.sessions.scoring import read_memory
from memorizing.loss import sum_nats
from memorizing.ranks import ALONE, Ranks, Shards
from memorizing.storage.folders import verify_folder, write_folder
from memorizing.storage.tensors import (
    MaybeAwaited,
    check_shapes,
    fetch_tensors,
    read_tensors,
)
from memorizing.training.checkpoint import MODEL_FILE, advise
from memorizing.training.finetuning.settings import FinetuneSettings
from memorizing.training.loop import Histories, LoopOptions, TrainingLoop
from memorizing.training.optimizer import Optimizer, ParameterGroups, group_parameters
from memorizing.training.reporting import Evaluation, HeldOut


@final
class FinetuneRows(Histories):
    """A cache per row. A document that begins gets a new one, so that rows end where they like.

    `read` computes a step's gradient, row after row; `commit` makes the step part of the histories.
    Caches last as long as a memory is open; between two times they are kept as tensors.
    """

    def __init__(
        self, model: Any, attachment: Attachment, loader: SegmentLoader, mine: range
    ) -> None:
        """Start with empty histories of what a loader is about to give in the rows of `mine`."""
        self._model, self._attachment, self._loader = model, attachment, loader
        self._mine = mine
        self._caches: list[DynamicCache | None] = [None] * len(mine)
        self._kept: dict[str, Tensor] | None = {}
        """Histories while they are not in caches that can be read on: of the last commit."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within this context rows are read; the attachment must be bound.

        Raises:
            CheckpointError: what was loaded is of another model, memory or number of rows.
        """
        by_row: dict[int, dict[str, Tensor]] = {}
        for key, tensor in (self._kept or {}).items():
            _, row, name = key.split(".", 2)
            by_row.setdefault(int(row), {})[name] = tensor
        is_ended = self._find_doc_ends()
        needed = [row for row in self._mine if not is_ended[row]]
        if sorted(by_row) != needed:
            raise CheckpointError(
                f"the checkpoint holds the histories of rows {sorted(by_row)}, and rows {needed} "
                "go on; it was altered, or is of another number of rows"
            )
        self._caches = [
            load_cache(self._attachment, by_row[row]) if row in by_row else None
            for row in self._mine
        ]
        self._kept = None
        yield
        self._kept = self.state_dict()

    def read(self, batch: SegmentBatch, num_targets: int) -> float:
        """Forward and backward over a segment of every own row; gradients add to the parameters'.

        The loss is summed nats / target tokens of all rows. What the cache holds of segments before
        takes no gradient.

        Args:
            batch: the next segment of every own row.
            num_targets: of all rows, those of other processes too.

        Returns:
            Summed nats.
        """
        # Reading changes the caches in place: what a step that fails goes back to is kept.
        self._kept = self._dump(batch.doc_start.tolist())
        device = self._model.get_input_embeddings().weight.device
        num_targets = max(num_targets, 1)
        total = 0.0
        for row, length in enumerate(batch.valid.sum(1).tolist()):
            if batch.doc_start[row]:
                self._caches[row] = self._attachment.make_cache()
            if not length:
                continue
            cache = self._caches[row]
            assert cache is not None  # a row's first segment begins a document
            output = self._model(
                input_ids=batch.tokens[row : row + 1, :length].to(device),
                **self._attachment.pass_cache(cache),
            )
            targets = batch.targets[row : row + 1, :length].to(device)
            nats = sum_nats(output.logits, targets, torch.ones_like(targets, dtype=torch.bool))
            if nats.requires_grad:  # not so where only gates are trained and no memory is filled
                (nats / num_targets).backward()
            total += nats.item()
        return total

    def commit(self) -> None:
        """See `Histories`."""
        for cache in self._caches:
            if cache is not None:
                self._attachment.commit(cache)
        self._kept = None

    def measure_fill(self) -> dict[int, float]:
        """See `Histories`."""
        fills: dict[int, list[float]] = {}
        for cache in self._caches:
            if cache is None:
                continue
            for layer, memory in self._attachment.find_history(cache).memories.items():
                fills.setdefault(layer, []).append(float(memory.size[0]) / memory.capacity)
        return {layer: sum(values) / len(values) for layer, values in fills.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """See `Histories`; a row whose document is read to its end has none."""
        if self._kept is not None:
            return self._kept
        return self._dump(self._find_doc_ends()[self._mine.start : self._mine.stop])

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Histories`; what cannot be used is refused by `open`."""
        others = {str(row) for row in range(self._loader.num_rows) if row not in self._mine}
        self._kept = {n: t for n, t in tensors.items() if n.split(".", 2)[1] not in others}

    def _find_doc_ends(self) -> list[bool]:
        """Per row of all, whether its next segment begins a document."""
        rows = self._loader.state_dict()["rows"]
        lengths = [len(document.tokens) for document in self._loader.documents]
        return [index < 0 or place >= lengths[index] for index, place in rows]

    def _dump(self, doc_ends: Sequence[bool]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for row, cache, is_ended in zip(self._mine, self._caches, doc_ends, strict=True):
            if cache is not None and not is_ended:
                dumped = dump_cache(self._attachment, cache) or {}
                tensors |= {f"row.{row}.{name}": tensor for name, tensor in dumped.items()}
        return tensors


@final
class Finetuner(TrainingLoop):
    """Trains what makes a model use its memory.

    `finetune` builds one in a run folder; experiments make their own. Without `run_dir` nothing is
    written to disk. After `run` the model is in evaluation mode.
    """

    settings_prefix = "finetune."

    def __init__(
        self,
        model: Any,
        documents: Sequence[TokenizedDocument],
        start_token: int,
        settings: FinetuneSettings,
        *,
        tokenizer: Any = None,
        **options: Unpack[LoopOptions],
    ) -> None:
        """Prepare to train from the beginning; `load` goes on from a checkpoint.

        Args:
            model: of `transformers`, with `add_memory`. Trained in place, on its device; LoRA is
                added where `settings` want it, and which parameters require gradients is set.
            documents: read in an order that follows `settings.seed`, again and again.
            start_token: precedes every document.
            settings: how to train.
            tokenizer: of the model; saved beside it where all weights are trained.
            options: see `LoopOptions`.

        Raises:
            ConfigError: nothing would be trained, or LoRA is in the way.
            IndexUnavailableError: LoRA without peft.
        """
        self.model = inner = unwrap(model)
        self.attachment = attachment = get_attachment(inner)
        self.settings, config = settings, settings.make_training_config()
        self._tokenizer = tokenizer
        self._base = hash_model(attachment.decoder, attachment.settings)
        torch.manual_seed(settings.seed)
        prepare_weights(inner, attachment, settings)
        loader = SegmentLoader(
            documents,
            settings.rows,
            attachment.settings.segment_len,
            start_token,
            settings.seed,
            repeat=True,
        )
        ranks = options.get("ranks", ALONE)
        if settings.shard and ranks.size > 1:
            options["shards"] = shard_model(inner, attachment, settings, ranks)
        mine = ranks.deal(settings.rows)
        self._caches = FinetuneRows(inner, attachment, loader, mine)
        optimizer = Optimizer(group_weights(inner, attachment), config, options.get("shards"))
        device = inner.get_input_embeddings().weight.device
        super().__init__(config, loader, optimizer, self._caches, device, **options)

    @contextmanager
    def _open(self) -> Iterator[None]:
        self.model.train()
        try:
            with read_memory(self.attachment), self._caches.open():
                yield
        finally:
            self.model.eval()

    def _read(self, batches: Sequence[SegmentBatch], num_targets: int) -> float:
        (batch,) = batches
        return self._caches.read(batch, num_targets)

    def _identify(self) -> dict[str, Any]:
        return {
            "train": self.settings.train,
            "dtype": str(self.model.dtype),
            "base": self._base,
        }

    def save_result(self, folder: Path) -> None:
        """Save what was learned, whole or not at all, without what training needs to go on.

        All processes call it, and the main one writes.
        """
        if self._ranks.is_main:
            write_folder(folder, self._write_model)
        elif self._shards:
            self._fetch_weights()
        self._ranks.wait()

    def _write_model(self, folder: Path) -> None:
        if self.settings.train == "all":
            tensors = self._fetch_weights()
            self.model.save_pretrained(folder, state_dict=tensors, max_shard_size="1TB")
            if self._tokenizer is not None:
                # Without folders: some tokenizers have several templates of chats.
                self._tokenizer.save_pretrained(folder, save_jinja_files=False)
        write_adapter(self.model, folder)

    def _list_weights(self) -> MaybeAwaited:
        if self.settings.train != "all":
            return {}
        first = {id(tensor): name for name, tensor in reversed(self._find_weights().items())}
        return {
            name: self.optimizer.await_exact(tensor)
            for name, tensor in self._find_weights().items()
            if first[id(tensor)] == name
        }

    def _fetch_weights(self) -> dict[str, Tensor]:
        """All of them in fp32; tied ones are one tensor."""
        fetched = dict(fetch_tensors(self._list_weights()))
        weights = self._find_weights()
        by_tensor = {id(weights[name]): tensor for name, tensor in fetched.items()}
        return {name: by_tensor[id(tensor)] for name, tensor in weights.items()}

    def _find_weights(self) -> dict[str, Tensor]:
        """Those of the model itself, without its memory."""
        tensors = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in tensors.items() if ".memory." not in name}

    def _load_model(self, folder: Path) -> None:
        lora, remedy = find_lora(self.model), advise(folder)
        names = [SETTINGS_FILE, HEADS_FILE]
        names += [LORA_FILE] if lora else []
        names += [MODEL_FILE] if self.settings.train == "all" else []
        verify_folder(folder, names, remedy=remedy)
        heads = read_tensors(folder / HEADS_FILE, CheckpointError, remedy)
        self.attachment.load_heads(heads, str(folder))
        if lora:
            tensors = read_tensors(folder / LORA_FILE, CheckpointError, remedy)
            load_lora_weights(self.model, tensors, str(folder))
        if self.settings.train == "all":
            self._load_weights(folder, remedy)

    def _load_weights(self, folder: Path, remedy: str) -> None:
        tensors = read_tensors(folder / MODEL_FILE, CheckpointError, remedy)
        mine = self._find_weights()
        # Tied weights are saved once.
        saved = {id(mine[name]) for name in tensors if name in mine}
        expected = {n: t for n, t in mine.items() if n in tensors or id(t) not in saved}
        check_shapes(str(folder), tensors, expected, CheckpointError, "resume with its base model")
        for name, tensor in tensors.items():
            self.optimizer.load_exact(mine[name], tensor)
        self.optimizer.give_back()

    def _evaluate(self, held_out: HeldOut, progress: Progress) -> Evaluation:
        capacity = self.attachment.settings.capacity
        num_runs = 2 if capacity else 1

        def read(number: int, capacity: int) -> EvaluationResult:
            return evaluate_model(
                self.model,
                held_out.documents,
                capacity=capacity,
                max_tokens=held_out.max_tokens,
                start_token=held_out.start_token,
                progress=lambda done, total: progress(number * total + done, num_runs * total),
                ranks=self._evaluating,
            )

        return Evaluation(read(0, capacity), read(1, 0) if capacity else None)

    def _describe_heads(self) -> dict[str, Any]:
        has_memory = self.attachment.settings.capacity > 0
        return {"heads": self.attachment.dump_heads() if has_memory else {}}


def prepare_weights(inner: Any, attachment: Attachment, settings: FinetuneSettings) -> None:
    """Add LoRA where it is wanted and missing, and say which parameters are trained. In place.

    Raises:
        ConfigError: nothing would be trained, or LoRA is in the way.
    """
    lora = find_lora(inner)
    has_gates = attachment.settings.read != "passages" and attachment.settings.capacity > 0
    if settings.train == "gates" and attachment.settings.read == "passages":
        raise ConfigError(
            "train is 'gates' and read is 'passages', which all layers read without gates; train "
            "'lora' or 'all', or read entries"
        )
    if settings.train == "gates" and not attachment.settings.capacity:
        raise ConfigError(
            "capacity is 0 and train is 'gates': gates of no memory learn nothing; train LoRA "
            "or all weights, or give a capacity"
        )
    if settings.train == "gates" and not any(
        heads.is_any for heads in attachment.open_heads.values()
    ):
        raise ConfigError(
            "train is 'gates' and all heads are closed: closed gates learn nothing; open some "
            "(add_memory(model, heads=...), or a bias above -29)"
        )
    if settings.train == "all" and lora is not None:
        raise ConfigError(
            "train is 'all' and the model has LoRA; merge it into the weights first, or train LoRA"
        )
    if settings.train == "lora" and lora is None:
        first = min(attachment.settings.layers) if settings.lora_layers == "from_memory" else 0
        add_lora(
            inner,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            first_layer=first,
        )
    train_only(
        inner,
        memory=has_gates,
        lora=settings.train == "lora",
        others=settings.train == "all",
    )


def shard_model(
    inner: Any, attachment: Attachment, settings: FinetuneSettings, ranks: Ranks
) -> Shards:
    """Deal the weights of a model among the processes. In place.

    What memory and LoRA add stays whole.

    Raises:
        ConfigError: how much a process computes would depend on what it reads.
        RankError: the processes have other weights.
    """
    if settings.train == "gates" or attachment.settings.read == "passages":
        raise ConfigError(
            f"finetune.shard is true with train {settings.train!r} and read "
            f"{attachment.settings.read!r}: processes that hold a model in parts must all compute "
            "the same; train 'lora' or 'all' and read entries, or set finetune.shard to false"
        )
    added = list_parameters(attachment)
    if settings.train == "lora":
        added += [p for p in inner.parameters() if p.requires_grad]
    layers = getattr(attachment.decoder.base, attachment.decoder.family.layers)
    return Shards(ranks, inner, layers, added)


def group_weights(inner: Any, attachment: Attachment) -> ParameterGroups:
    """The parameters that require a gradient, by how they are updated."""
    output = inner.get_output_embeddings()
    embeddings = [inner.get_input_embeddings().weight]
    embeddings += [output.weight] if output is not None else []
    return group_parameters(inner, embeddings, list_parameters(attachment))
