"""Training our own model: histories of all rows, and what the loop needs to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack, final

import torch
from torch import Tensor

from memorizing.config import TrainingConfig
from memorizing.data import SegmentBatch, SegmentLoader, Tokenizer
from memorizing.devices import send
from memorizing.errors import CheckpointError, ConfigError, StateError
from memorizing.evaluation import Progress, evaluate_documents
from memorizing.loss import sum_nats
from memorizing.model import Exposed, MemorizingTransformer, ModelState, join_exposed
from memorizing.ranks import ALONE, Shards
from memorizing.storage.tensors import MaybeAwaited
from memorizing.training.checkpoint import load_weights, write_model
from memorizing.training.loop import Histories, LoopOptions, TrainingLoop
from memorizing.training.optimizer import Optimizer, group_parameters
from memorizing.training.precision import Precision, choose_precision
from memorizing.training.reporting import Evaluation, HeldOut


@final
class Rows(Histories):
    """One `ModelState` per accumulation part, of rows / parts rows one after another.

    `read` computes a step's gradient, `commit` makes it part of the history. A step that is read
    and never committed leaves the history usable: what `read` resets in place are rows that start a
    document, and it resets them again.
    """

    def __init__(
        self, model: MemorizingTransformer, num_rows: int, num_parts: int, mine: range
    ) -> None:
        """Start with empty histories, on the device of the weights.

        Args:
            model: made for; its `compute_dtype` must not change afterwards.
            num_rows: rows of the whole batch.
            num_parts: divides num_rows; as many rows are read at once in every process.
            mine: the rows that this process reads.
        """
        self._num_rows, part_len = num_rows, num_rows // num_parts
        self._parts = [mine[first : first + part_len] for first in range(0, len(mine), part_len)]
        self._first = mine.start
        self._states = [model.init_state(len(part)) for part in self._parts]
        self._next: list[ModelState] = []

    def read(
        self,
        model: MemorizingTransformer,
        batches: Sequence[SegmentBatch],
        memory_open: Tensor,
        num_targets: int,
        num_exposed_rows: int = 1,
        restart: Tensor | None = None,
    ) -> float:
        """Forward and backward over a segment of every row; gradients add to the parameters'.

        With several segments, gradients flow between them: each memory layer sees the entries of
        those before (crossbatch, `model/layout.py`), which are not in the memory yet.

        The loss is summed nats / target tokens of all batches, so that parts do not change it.

        Args:
            model: read with.
            batches: the next segment of every own row, or the next few; only in the first a
                document may begin.
            memory_open: (own rows,) bool.
            num_targets: of all rows, those of other processes too.
            num_exposed_rows: with several segments, rows whose entries each row sees.
            restart: (own rows,) bool: rows that see nothing of before.

        Returns:
            Summed nats.
        """
        device = model.embedding.weight.device
        num_targets = max(num_targets, 1)
        totals: list[Tensor] = []
        self._next = []
        for part, state in zip(self._parts, self._states, strict=True):
            rows = slice(part.start - self._first, part.stop - self._first)
            state = state.start_documents(batches[0].doc_start[rows])
            live: list[Mapping[int, Exposed]] = []
            nats: list[Tensor] = []
            for batch in batches:
                valid = batch.valid[rows]
                exposed = {
                    layer: join_exposed([segment[layer] for segment in live], num_exposed_rows)
                    for layer in (live[0] if live else ())
                }
                output = model(
                    send(batch.tokens[rows], device),
                    state,
                    valid=None if bool(valid.all()) else valid,
                    memory_open=memory_open[rows],
                    restart=None if restart is None else restart[rows],
                    exposed=exposed,
                )
                targets = send(batch.targets[rows], device)
                nats.append(sum_nats(output.logits, targets, send(valid, device)))
                live.append(output.live)
                state = output.state
            part_nats = torch.stack(nats).sum()
            (part_nats / num_targets).backward()
            totals.append(part_nats.detach())
            self._next.append(state)
        # One wait for a GPU, after all its work is given to it.
        return sum(torch.stack(totals).tolist(), 0.0)

    def commit(self) -> None:
        """See `Histories`."""
        self._states = [state.commit() for state in self._next]
        self._next = []

    def measure_fill(self) -> dict[int, float]:
        """See `Histories`."""
        sizes = [
            {layer: memory.size for layer, memory in state.memories.items()}
            for state in self._states
        ]
        capacity = {layer: memory.capacity for layer, memory in self._states[0].memories.items()}
        return {
            layer: float(torch.cat([s[layer] for s in sizes]).double().mean()) / c
            for layer, c in capacity.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """See `Histories`."""
        return {
            f"row.{row}.{name}": tensor[row - part.start]
            for part, state in zip(self._parts, self._states, strict=True)
            for name, tensor in state.state_dict().items()
            for row in part
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Histories`; the number of parts must be the same."""
        by_row: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            _, row, name = key.split(".", 2)
            by_row.setdefault(int(row), {})[name] = tensor
        if sorted(by_row) != list(range(self._num_rows)):
            raise CheckpointError(
                f"the checkpoint holds {len(by_row)} rows and this run has {self._num_rows}; "
                "resume with the same training.rows"
            )
        self._states = [
            self._load_part(state, [by_row[row] for row in part])
            for part, state in zip(self._parts, self._states, strict=True)
        ]

    @staticmethod
    def _load_part(state: ModelState, rows: list[dict[str, Tensor]]) -> ModelState:
        device = state.xl_caches[0].keys.device
        try:
            names = dict.fromkeys(name for row in rows for name in row)
            whole = {name: _stack_rows(name, rows) for name in names}
            on_cpu = ("position", "num_appended")
            return state.load_state_dict(
                {n: t if n.rpartition(".")[2] in on_cpu else t.to(device) for n, t in whole.items()}
            )
        except (KeyError, RuntimeError, StateError) as error:
            raise CheckpointError(
                f"the checkpoint's caches and memories do not fit this run: {error}; resume with "
                "its settings"
            ) from error


def _stack_rows(name: str, rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """A tensor of rows that may have been read in different parts, or by different processes.

    What waits to be written, and the caches, are as long as the longest of the rows that are read
    together; where nothing waits there is nothing.
    """
    kind = name.partition(".")[0]
    if kind not in ("staged", "xl_caches"):
        return torch.stack([row[name] for row in rows])
    dim = 0 if name.endswith((".valid", ".tokens")) else 1
    like = next(row[name] for row in rows if name in row)
    nothing = like.narrow(dim, 0, 0)
    found = [row.get(name, nothing) if kind == "staged" else row[name] for row in rows]
    longest = max(tensor.shape[dim] for tensor in found)
    padded = []
    for tensor in found:
        shape = list(tensor.shape)
        shape[dim] = longest - shape[dim]
        # Not valid; a cache is aligned on the right, and what is new follows what waits.
        padded.append(torch.cat([tensor.new_zeros(shape), tensor], dim))
    return torch.stack(padded)


@final
class Trainer(TrainingLoop):
    """Trains our own model.

    `train` builds one from a configuration; experiments make their own. Without `run_dir` nothing
    is written to disk.
    """

    settings_prefix = "training."

    def __init__(
        self,
        model: MemorizingTransformer,
        loader: SegmentLoader,
        config: TrainingConfig,
        *,
        tokenizer: Tokenizer | None = None,
        precision: Precision | None = None,
        **options: Unpack[LoopOptions],
    ) -> None:
        """Prepare to train from the beginning; `load` goes on from a checkpoint.

        Args:
            model: trained in place, on the device it is on. Its compute dtype is set.
            loader: see `TrainingLoop`.
            config: how to train.
            tokenizer: saved with every checkpoint.
            precision: of products and activations; None follows `config.precision`.
            options: see `LoopOptions`.
        """
        shape, ranks = model.config, options.get("ranks", ALONE)
        if config.shard and ranks.size > 1:
            if config.crossbatch_segments:
                raise ConfigError(
                    f"training.crossbatch_segments is {config.crossbatch_segments} and "
                    "training.shard is true, where a step reads one segment; set one of them to "
                    "0 or false"
                )
            whole = model.memory_parameters()
            # As gates: without a gradient in ranks that read no memory now.
            whole += [] if model.pointer is None else list(model.pointer.parameters())
            options["shards"] = Shards(ranks, model, model.blocks, whole)
        device = model.embedding.weight.device
        self.model, self._tokenizer = model, tokenizer
        self.precision = precision or choose_precision(
            config.precision, shape.model_dim, shape.ffn_dim, device
        )
        model.compute_dtype = self.precision.dtype
        model.gradient_checkpointing = config.gradient_checkpointing
        groups = group_parameters(model, [model.embedding.weight], model.memory_parameters())
        if ranks.size > 1 and config.crossbatch_segments and config.crossbatch_rows > 1:
            raise ConfigError(
                f"training.crossbatch_rows is {config.crossbatch_rows}, and rows of another "
                "process are not seen; set it to 1, or train in one process"
            )
        rows = Rows(model, config.rows, config.accumulation, ranks.deal(config.rows))
        optimizer = Optimizer(groups, config, options.get("shards"))
        super().__init__(config, loader, optimizer, rows, device, **options)

    @contextmanager
    def _open(self) -> Iterator[None]:
        self.model.train()
        yield

    def _read(self, batches: Sequence[SegmentBatch], num_targets: int) -> float:
        rows = self._rows
        assert isinstance(rows, Rows)
        mine = slice(self._mine.start, self._mine.stop)
        is_open, restart = self._draw_open_rows()[mine], self._draw_restarts()
        return rows.read(
            self.model,
            batches,
            is_open,
            num_targets,
            self.config.crossbatch_rows,
            None if restart is None else restart[mine],
        )

    def _draw_open_rows(self) -> Tensor:
        """Which rows read their memory in this segment."""
        if self.step < self.config.memory_start_step:
            return torch.zeros(self.config.rows, dtype=torch.bool)
        draws = torch.rand(self.config.rows, generator=self._draws)
        return draws >= self.config.memory_closed_share

    def _draw_restarts(self) -> Tensor | None:
        """Which rows read this segment as if their document began with it."""
        share = self.config.restart_share
        if not share or not self.model.config.has_memory:
            return None
        return torch.rand(self.config.rows, generator=self._draws) < share

    def _identify(self) -> dict[str, Any]:
        return {"training.precision": self.precision.name}

    def _write_model(self, folder: Path) -> None:
        write_model(folder, self.model, self._list_weights(), self._tokenizer)

    def _list_weights(self) -> MaybeAwaited:
        tensors = self.model.state_dict()
        return tensors if self._shards is None else self._shards.await_all(tensors)

    def _load_model(self, folder: Path) -> None:
        self.load_weights(folder)

    def load_weights(self, folder: Path, *, may_lack_memory: bool = False) -> None:
        """Take over the weights of a checkpoint of the same model and tokenizer; see there."""
        load_weights(
            folder,
            self.model,
            self._tokenizer,
            may_lack_memory=may_lack_memory,
            shards=self._shards,
        )

    def _evaluate(self, held_out: HeldOut, progress: Progress) -> Evaluation:
        shape = self.model.config
        is_open = shape.has_memory and self.step > self.config.memory_start_step
        return Evaluation(
            evaluate_documents(
                self.model,
                held_out.documents,
                held_out.start_token,
                capacity=shape.capacity if is_open else 0,
                rows=len(self._mine) if self._shards else self.config.rows,
                max_tokens=held_out.max_tokens,
                progress=progress,
                ranks=self._evaluating,
            )
        )

    def _describe_heads(self) -> dict[str, Any]:
        # Gates of a model that reads no memory say nothing.
        gates = self.model.gates() if self.model.config.has_memory else {}
        return {"gate": {str(layer): gate.tolist() for layer, gate in gates.items()}}
