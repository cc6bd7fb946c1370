"""Parameter groups, their rates, and torch optimizers behind one small class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from memorizing.config import TrainingConfig
from memorizing.errors import CheckpointError, ConfigError
from memorizing.ranks import Ranks, Shards, hash_tensors
from memorizing.storage.tensors import AwaitedTensor, MaybeAwaited, fetch_tensors
from memorizing.training.muon import Muon

Parameters = dict[str, nn.Parameter]
GroupName = Literal["matrices", "embedding", "vectors", "memory"]
ParameterGroups = dict[GroupName, Parameters]
"""The parameters of a model by how they are updated, every trainable one in one group: weights of
linear maps in the blocks; the tied embedding; norm gains, position-bias tables, smears; gates and
scales, which have a rate of their own and no weight decay, or they may never move."""

ADAM_BETAS = (0.9, 0.95)
_PLANS: dict[str, dict[str, tuple[GroupName, ...]]] = {
    "adafactor": {"adafactor": ("matrices", "embedding", "vectors"), "adamw": ("memory",)},
    "adamw": {"adamw": ("matrices", "embedding", "vectors", "memory")},
    "muon": {"muon": ("matrices",), "adamw": ("embedding", "vectors", "memory")},
}
"""Which optimizers a setting stands for, and the groups of each."""


def group_parameters(
    model: nn.Module, embedding: Iterable[Tensor], memory: Iterable[Tensor]
) -> ParameterGroups:
    """Sort the trainable parameters of a model into groups.

    Weights of `nn.Linear` are matrices; what is neither that, nor in `embedding`, nor in `memory`
    is a vector (a table of position bias too: its rows are looked up, not multiplied).
    """
    members: dict[GroupName, Iterable[Tensor]] = {
        "matrices": [m.weight for m in model.modules() if isinstance(m, nn.Linear)],
        "embedding": embedding,
        "memory": memory,
    }
    kinds: dict[int, GroupName] = {
        id(tensor): kind for kind, tensors in members.items() for tensor in tensors
    }
    groups: ParameterGroups = {"matrices": {}, "embedding": {}, "vectors": {}, "memory": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds.get(id(parameter), "vectors")][name] = parameter
    return groups


class Optimizer:
    """Several torch optimizers that step as one; each group has a peak rate of its own.

    - `adafactor`: Adafactor scaled by the RMS of the parameter, first moment 0.9, for matrices,
      embedding and vectors (paper, section 4; Shazeer & Stern 2018, arXiv 1804.04235).
      **Deviation:** gates and scales use AdamW.
    - `adamw`: AdamW, betas (0.9, 0.95), for all groups.
    - `muon`: `Muon` for the matrices and AdamW for the rest (Jordan et al. 2024). Ours and not
      torch's, which is in bf16 also where that is emulated and slow. Its step is scaled by 0.2
      sqrt(max(rows, columns)), so that its RMS is that of an AdamW step and a learning rate tuned
      for AdamW transfers (Liu et al. 2025, arXiv 2502.16982).

    Weight decay applies to matrices and the embedding. State is exact in `state_dict` and needs no
    pickle.

    Parameters in bf16 or fp16 have a copy in fp32, which is what is updated, and rounded into the
    parameter after every step: a step is often too small for bf16 to show it, and would be lost.

    Of parameters in parts (`Shards`) the rows of this rank are updated, with state for these only.
    """

    def __init__(
        self, groups: ParameterGroups, config: TrainingConfig, shards: Shards | None = None
    ) -> None:
        """Make the optimizers that `config.optimizer` names; rates are those of step 1.

        Raises:
            ConfigError: Adafactor of parts, whose factors are of whole matrices.
        """
        if shards is not None and config.optimizer == "adafactor":
            raise ConfigError(
                "training.optimizer is 'adafactor', which needs whole matrices, and training.shard "
                "is true; use 'adamw' or 'muon', or set training.shard to false"
            )
        self._config, self._shards = config, shards
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        """Parameters that are not updated themselves, and what is: a copy in fp32, or this rank's
        rows, or a copy of these."""
        exact = {
            group: {name: self._make_exact(name, p) for name, p in parameters.items()}
            for group, parameters in groups.items()
        }
        self._names = {id(p): name for group in exact.values() for name, p in group.items()}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        for kind, names in _PLANS[config.optimizer].items():
            made = [self._make_group(name, exact[name]) for name in names if exact.get(name)]
            if made:
                self._optimizers[kind] = _build_optimizer(kind, made, shards)
        self.set_step(1)

    def _make_group(self, name: GroupName, parameters: Parameters) -> dict[str, Any]:
        config = self._config
        own_rates = {
            "embedding": config.embedding_learning_rate,
            "vectors": config.vector_learning_rate,
        }
        own_rate = 0.0 if config.optimizer == "adafactor" else own_rates.get(name, 0.0)
        rate = compute_peak_rate(config, own_rate or config.learning_rate)
        if name == "memory":
            rate = config.gate_learning_rate
        shapes = {} if self._shards is None else self._shards.shapes
        return {
            "name": name,
            "params": list(parameters.values()),
            "shapes": [shapes.get(one, p.shape) for one, p in parameters.items()],
            "peak_lr": rate,
            "lr": rate,
            "weight_decay": config.weight_decay if name in ("matrices", "embedding") else 0.0,
        }

    def _make_exact(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        is_exact = parameter.dtype in (torch.float32, torch.float64)
        part = self._find_part(name)
        if is_exact and part is None:
            return parameter
        mine = parameter.detach() if part is None else part
        copy = nn.Parameter(mine if is_exact else mine.float())
        self._pairs.append((parameter, copy))
        return copy

    def _find_part(self, name: str) -> Tensor | None:
        return None if self._shards is None else self._shards.parts.get(name)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [
            group for optimizer in self._optimizers.values() for group in optimizer.param_groups
        ]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that are updated: the copies where there are some."""
        return [p for group in self._groups for p in group["params"]]

    def hash_whole(self) -> str:
        """A number for the values of all that is not in parts."""
        return hash_tensors(self._split()[0])

    def _split(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is updated: whole parameters, and rows of this rank."""
        whole, parts = [], []
        for p in self.parameters():
            (whole if self._find_part(self._names[id(p)]) is None else parts).append(p)
        return whole, parts

    def find_exact(self, parameter: Tensor) -> Tensor:
        """The copy of a parameter in fp32, or the parameter itself where it has none.

        Of one in parts, that of this rank's rows.
        """
        return next((copy for mine, copy in self._pairs if mine is parameter), parameter)

    def await_exact(self, parameter: Tensor) -> Tensor | AwaitedTensor:
        """The same, whole, without gradient."""
        exact = self.find_exact(parameter)
        return self._await_whole(self._names.get(id(exact), ""), exact.detach())

    def _await_whole(self, name: str, tensor: Tensor) -> Tensor | AwaitedTensor:
        """A tensor that is a parameter, or like one, or a number for it."""
        if self._shards is None or not self._is_part(name, tensor):
            return tensor
        return self._shards.await_whole(name, tensor)

    def _is_part(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor of a parameter is this rank's rows of it, and not a number for it."""
        return self._find_part(name) is not None and tensor.ndim > 0

    def load_exact(self, parameter: Tensor, whole: Tensor) -> None:
        """Give a parameter its value, in fp32. In place; the model has it after `give_back`."""
        exact = self.find_exact(parameter)
        part = self._find_part(self._names.get(id(exact), ""))
        with torch.no_grad():
            exact.copy_(whole if part is None or not self._shards else self._shards.cut(whole))

    def give_back(self) -> None:
        """Round the copies into the model. In place."""
        with torch.no_grad():
            for parameter, copy in self._pairs:
                part = self._find_part(self._names[id(copy)])
                mine = parameter if part is None else part
                if mine.dtype != copy.dtype:
                    mine.copy_(copy)

    def sum_gradients(self, ranks: Ranks) -> None:
        """Sum the gradients of several processes. In place; those of parts are summed already."""
        self._take_gradients()
        ranks.sum_gradients(self._split()[0])

    def clip_gradients(self, clip_norm: float) -> float:
        """Clip the gradients in place, where `clip_norm` is not 0; their norm before that.

        0 where there is none: only gates are trained, and no memory holds anything yet.
        """
        self._take_gradients()
        parameters = self.parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return 0.0
        norm = get_total_norm(gradients)
        if self._shards is not None:
            whole, parts = ([p.grad for p in some if p.grad is not None] for some in self._split())
            squares = get_total_norm(whole).double() ** 2 + self._shards.sum_squares(parts)
            norm = squares.sqrt().to(norm.dtype)
        if clip_norm:
            clip_grads_with_norm_(parameters, clip_norm, norm)
        return norm.item()

    def _take_gradients(self) -> None:
        """Move the gradients of the model's parameters to the copies."""
        for parameter, copy in self._pairs:
            gradient: Any = parameter.grad
            if gradient is None:
                continue
            if self._find_part(self._names[id(copy)]) is not None:
                gradient = gradient.to_local()
            copy.grad, parameter.grad = gradient.to(copy.dtype), None

    def set_step(self, step: int) -> None:
        """Give every group its rate for a step, counted from 1."""
        share = compute_schedule(self._config, step)
        for group in self._groups:
            group["lr"] = group["peak_lr"] * share

    def rates(self) -> dict[str, float]:
        """The present rate of every group that has parameters, by its name."""
        return {group["name"]: group["lr"] for group in self._groups}

    def step(self) -> None:
        """Update the parameters from their gradients, in place."""
        self._take_gradients()
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.give_back()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for parameter, _ in self._pairs:
            parameter.grad = None

    def state_dict(self) -> tuple[dict[str, Tensor | AwaitedTensor], dict[str, Any]]:
        """Everything that the next step depends on besides weights and gradients.

        Returns:
            Tensors by `<optimizer>|<parameter>|<key>`, those of parts to be put together, and under
            the same names the plain numbers (for JSON).
        """
        tensors: dict[str, Tensor | AwaitedTensor] = {}
        numbers: dict[str, Any] = {}
        for kind, optimizer in self._optimizers.items():
            for parameter, state in optimizer.state.items():
                own = self._names[id(parameter)]
                for key, value in state.items():
                    name = f"{kind}|{own}|{key}"
                    if isinstance(value, Tensor):
                        tensors[name] = self._await_whole(own, value)
                    else:
                        numbers[name] = value
        return tensors, numbers

    def load_state_dict(self, tensors: MaybeAwaited, numbers: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, bit for bit. In place; rates follow with `set_step`.

        Raises:
            CheckpointError: the state is of another optimizer or of other parameters.
        """
        owners = {
            f"{kind}|{self._names[id(p)]}": (optimizer, p)
            for kind, optimizer in self._optimizers.items()
            for group in optimizer.param_groups
            for p in group["params"]
        }
        values = {**dict(fetch_tensors(tensors)), **numbers}
        for name in values:
            owner = name.rpartition("|")[0]
            if owner not in owners:
                kind, _, parameter_name = owner.partition("|")
                raise CheckpointError(
                    f"the checkpoint holds state of {kind} for {parameter_name!r}, which this run "
                    "does not have; resume with the same model and training.optimizer"
                )
        for optimizer in self._optimizers.values():
            optimizer.state.clear()
        for name, value in values.items():
            owner, _, key = name.rpartition("|")
            optimizer, parameter = owners[owner]
            if isinstance(value, Tensor):
                if self._shards is not None and self._is_part(self._names[id(parameter)], value):
                    value = self._shards.cut(value)
                value = value.to(parameter.device, copy=True)
            elif not math.isfinite(value):
                raise CheckpointError(f"the checkpoint holds {value} as {name}; it was altered")
            optimizer.state[parameter][key] = value


def _build_optimizer(
    kind: str, groups: list[dict[str, Any]], shards: Shards | None
) -> torch.optim.Optimizer:
    if kind == "adafactor":
        # Here, because its import takes a third of a second that the others need not pay.
        from transformers.optimization import Adafactor

        return Adafactor(
            groups, scale_parameter=True, relative_step=False, warmup_init=False, beta1=0.9
        )
    if kind == "muon":
        return Muon(groups, shards=shards)
    return torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=True)


def compute_schedule(config: TrainingConfig, step: int) -> float:
    """Share of its peak that every rate has at a step: warm-up, then the schedule's decay.

    With w = max(warmup_steps, 1), n = step, N = config.steps, f = final_share and p = (n - w) / (N
    - w) in [0, 1]:

        inverse_sqrt   min(n / w, 1) * sqrt(w / max(n, w))
        cosine         n / w up to w, then f + (1 - f) * (1 + cos(pi * p)) / 2
        linear         n / w up to w, then 1 - (1 - f) * p
        constant       min(n / w, 1)

    Args:
        config: the schedule and its lengths.
        step: the step about to be taken, counted from 1.
    """
    warmup = max(config.warmup_steps, 1)
    if step < warmup:
        return step / warmup
    if config.schedule == "inverse_sqrt":
        return math.sqrt(warmup / step)
    if config.schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(config.steps - warmup, 1), 1.0)
    share = (
        (1.0 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1.0 - progress
    )
    return config.final_share + (1.0 - config.final_share) * share


def compute_peak_rate(config: TrainingConfig, learning_rate: float) -> float:
    """The highest rate that a setting of the configuration stands for.

    `inverse_sqrt` is the paper's lr(n) = lr * min(n / w, 1) / sqrt(max(n, w)), whose peak is lr /
    sqrt(w), at n = w; the peak of the other schedules is the setting itself. Rates of gates and
    scales are peaks already.
    """
    if config.schedule == "inverse_sqrt":
        return learning_rate / math.sqrt(max(config.warmup_steps, 1))
    return learning_rate
