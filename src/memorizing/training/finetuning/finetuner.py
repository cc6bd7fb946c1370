"""Training a model of `transformers` with memory: its histories, and what the loop needs to know.

A checkpoint is an adapter folder with what training needs to go on beside it:

    step-000100/
    ├── memory_settings.json, memory_heads.safetensors, adapter_*   as `save_adapter` writes them
    ├── config.json, model.safetensors, tokenizer.json, ...   with train = "all": the whole model,
    │                                                         in fp32, with its tokenizer
    └── manifest.json, trainer.json, optimizer.safetensors, state.safetensors   as for our own model
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack, final

import torch
from torch import Tensor

from memorizing.data import SegmentBatch, SegmentLoader, TokenizedDocument
from memorizing.errors import CheckpointError, ConfigError
from memorizing.evaluation import Progress
from memorizing.huggingface.attaching.attachment import Attachment, get_attachment, unwrap
from memorizing.huggingface.attaching.fingerprint import hash_model
from memorizing.huggingface.attaching.passage_room import look_up_start_token
from memorizing.huggingface.learning.adapter import (
    HEADS_FILE,
    SETTINGS_FILE,
    list_parameters,
    train_only,
    write_adapter,
)
from memorizing.huggingface.learning.lora import LORA_FILE, add_lora, find_lora, load_lora_weights
from memorizing.ranks import ALONE, Ranks, Shards
from memorizing.storage.folders import verify_folder, write_folder
from memorizing.storage.tensors import (
    MaybeAwaited,
    check_shapes,
    fetch_tensors,
    read_tensors,
)
from memorizing.training.checkpoint import MODEL_FILE, advise
from memorizing.training.finetuning.passage_rows import PassageLoader, PassageRows
from memorizing.training.finetuning.rows import FinetuneRows, SegmentRows
from memorizing.training.finetuning.settings import FinetuneSettings
from memorizing.training.loop import LoopOptions, TrainingLoop
from memorizing.training.optimizer import Optimizer, ParameterGroups, group_parameters
from memorizing.training.reporting import Evaluation, HeldOut


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
            documents: read in an order that follows `settings.seed`, again and again; or what texts
                are drawn from, where passages are read.
            start_token: precedes every document; a text behind passages, where the model has none.
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
        ranks = options.get("ranks", ALONE)
        if settings.shard and ranks.size > 1:
            options["shards"] = shard_model(inner, attachment, settings, ranks)
        mine = ranks.deal(settings.rows)
        self._reader = make_rows(inner, attachment, documents, start_token, settings, mine)
        optimizer = Optimizer(group_weights(inner, attachment), config, options.get("shards"))
        device = inner.get_input_embeddings().weight.device
        super().__init__(config, self._reader.loader, optimizer, self._reader, device, **options)

    @contextmanager
    def _open(self) -> Iterator[None]:
        self.model.train()
        try:
            with self._reader.open():
                yield
        finally:
            self.model.eval()

    def _read(self, batches: Sequence[SegmentBatch], num_targets: int) -> float:
        (batch,) = batches
        return self._reader.read(batch, num_targets)

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
        return self._reader.evaluate(held_out, progress, self._evaluating)

    def _describe_heads(self) -> dict[str, Any]:
        return {"heads": self.attachment.dump_heads() if has_gates(self.attachment) else {}}


def make_rows(
    inner: Any,
    attachment: Attachment,
    documents: Sequence[TokenizedDocument],
    start_token: int,
    settings: FinetuneSettings,
    mine: range,
) -> FinetuneRows:
    """What is read in the rows of `mine`: segments with memory, or texts behind passages.

    Raises:
        CorpusError: there are no documents.
    """
    if attachment.settings.read == "passages":
        # What passages of a memory stand behind.
        own = look_up_start_token(attachment.decoder.base.config)
        first = start_token if own is None else own
        texts = PassageLoader(documents, attachment.settings, settings.rows, first, settings.seed)
        return PassageRows(inner, attachment, texts, settings.evaluate_tokens)
    segment_len = attachment.settings.segment_len
    loader = SegmentLoader(
        documents, settings.rows, segment_len, start_token, settings.seed, repeat=True
    )
    return SegmentRows(inner, attachment, loader, mine)


def has_gates(attachment: Attachment) -> bool:
    """Whether gates and scales of a memory do something."""
    return attachment.settings.read != "passages" and attachment.settings.capacity > 0


def prepare_weights(inner: Any, attachment: Attachment, settings: FinetuneSettings) -> None:
    """Add LoRA where it is wanted and missing, and say which parameters are trained. In place.

    Raises:
        ConfigError: nothing would be trained, or LoRA is in the way.
    """
    lora = find_lora(inner)
    settings.check_memory(attachment.settings)
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
        memory=has_gates(attachment),
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
    if settings.train == "gates" or attachment.settings.read == "both":
        raise ConfigError(
            f"finetune.shard is true with train {settings.train!r} and read "
            f"{attachment.settings.read!r}: processes that hold a model in parts must all compute "
            "the same; train 'lora' or 'all' and read entries or passages, or set "
            "finetune.shard to false"
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
