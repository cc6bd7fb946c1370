"""Parameter groups, and the torch optimizers that update them, behind one small class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from memorizing.config import TrainingConfig
from memorizing.errors import CheckpointError
from memorizing.training.muon import Muon
from memorizing.training.schedule import compute_peak_rate, compute_schedule

Parameters = dict[str, nn.Parameter]

ADAM_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class ParameterGroups:
    """The parameters of a model by how they are updated: every trainable one in one group."""

    matrices: Parameters = field(default_factory=dict)
    """Weights of linear maps in the blocks."""
    embedding: Parameters = field(default_factory=dict)
    """The tied embedding."""
    vectors: Parameters = field(default_factory=dict)
    """Norm gains, position-bias tables, smears."""
    memory: Parameters = field(default_factory=dict)
    """Gates and scales: a rate of their own and no weight decay, or they may never move."""


def group_parameters(
    model: nn.Module, embedding: Iterable[Tensor], memory: Iterable[Tensor]
) -> ParameterGroups:
    """Sort the trainable parameters of a model into groups.

    Weights of `nn.Linear` are matrices; what is neither that, nor in `embedding`, nor in `memory`
    is a vector (a table of position bias too: its rows are looked up, not multiplied).
    """
    embedding_ids, memory_ids = {id(p) for p in embedding}, {id(p) for p in memory}
    matrix_ids = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups = ParameterGroups()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in memory_ids:
            groups.memory[name] = parameter
        elif id(parameter) in embedding_ids:
            groups.embedding[name] = parameter
        elif id(parameter) in matrix_ids:
            groups.matrices[name] = parameter
        else:
            groups.vectors[name] = parameter
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
    """

    def __init__(self, groups: ParameterGroups, config: TrainingConfig) -> None:
        """Make the optimizers that `config.optimizer` names; rates are those of step 1."""
        self._config = config
        self._names = {id(p): name for group in vars(groups).values() for name, p in group.items()}
        main = compute_peak_rate(config, config.learning_rate)
        embedding = compute_peak_rate(
            config, config.embedding_learning_rate or config.learning_rate
        )
        vector = compute_peak_rate(config, config.vector_learning_rate or config.learning_rate)
        decay = config.weight_decay
        gate_group = _make_group("memory", groups.memory, config.gate_learning_rate, 0.0)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if config.optimizer == "adafactor":
            self._add(
                "adafactor",
                [
                    _make_group("matrices", groups.matrices, main, decay),
                    _make_group("embedding", groups.embedding, main, decay),
                    _make_group("vectors", groups.vectors, main, 0.0),
                ],
            )
            self._add("adamw", [gate_group])
        else:
            matrices = _make_group("matrices", groups.matrices, main, decay)
            others = [
                _make_group("embedding", groups.embedding, embedding, decay),
                _make_group("vectors", groups.vectors, vector, 0.0),
                gate_group,
            ]
            if config.optimizer == "muon":
                self._add("muon", [matrices])
                self._add("adamw", others)
            else:
                self._add("adamw", [matrices, *others])
        self.set_step(1)

    def _add(self, kind: str, groups: list[dict[str, Any]]) -> None:
        groups = [group for group in groups if group["params"]]
        if groups:
            self._optimizers[kind] = _build_optimizer(kind, groups)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [
            group for optimizer in self._optimizers.values() for group in optimizer.param_groups
        ]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that are updated."""
        return [p for group in self._groups for p in group["params"]]

    def set_step(self, step: int) -> None:
        """Give every group its rate for a step, counted from 1."""
        share = compute_schedule(self._config, step)
        for group in self._groups:
            group["lr"] = group["peak_lr"] * share

    def rates(self) -> dict[str, float]:
        """The present rate of every group that has parameters, by its name in `ParameterGroups`."""
        return {group["name"]: group["lr"] for group in self._groups}

    def step(self) -> None:
        """Update the parameters from their gradients, in place."""
        for optimizer in self._optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on besides weights and gradients.

        Returns:
            Tensors by `<optimizer>|<parameter>|<key>`, and under the same names the plain numbers
            (for JSON).
        """
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for kind, optimizer in self._optimizers.items():
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    name = f"{kind}|{self._names[id(parameter)]}|{key}"
                    if isinstance(value, Tensor):
                        tensors[name] = value
                    else:
                        numbers[name] = value
        return tensors, numbers

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, bit for bit. In place; rates follow with `set_step`.

        Raises:
            CheckpointError: the state is of another optimizer or of other parameters.
        """
        parameters = {
            f"{kind}|{self._names[id(p)]}": p
            for kind, optimizer in self._optimizers.items()
            for group in optimizer.param_groups
            for p in group["params"]
        }
        states: dict[str, dict[Tensor, dict[str, Any]]] = {kind: {} for kind in self._optimizers}
        for name, value in {**tensors, **numbers}.items():
            owner, _, key = name.rpartition("|")
            if owner not in parameters:
                kind, _, parameter_name = owner.partition("|")
                raise CheckpointError(
                    f"the checkpoint holds state of {kind} for {parameter_name!r}, which this run "
                    "does not have; resume with the same model and training.optimizer"
                )
            parameter = parameters[owner]
            if isinstance(value, Tensor):
                value = value.to(parameter.device, copy=True)
            states[owner.partition("|")[0]].setdefault(parameter, {})[key] = value
        for kind, optimizer in self._optimizers.items():
            optimizer.state.clear()
            optimizer.state.update(states[kind])


def _make_group(
    name: str, parameters: Parameters, peak_rate: float, weight_decay: float
) -> dict[str, Any]:
    return {
        "name": name,
        "params": list(parameters.values()),
        "peak_lr": peak_rate,
        "lr": peak_rate,
        "weight_decay": weight_decay,
    }


def _build_optimizer(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if kind == "adafactor":
        # Here, because its import takes a third of a second that the others need not pay.
        from transformers.optimization import Adafactor

        return Adafactor(
            groups, scale_parameter=True, relative_step=False, warmup_init=False, beta1=0.9
        )
    if kind == "muon":
        return Muon(groups)
    return torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=True)


def clip_gradients(parameters: Sequence[Tensor], clip_norm: float) -> float:
    """Clip the gradients in place, where `clip_norm` is not 0; their norm before that.

    0 where there is none: only gates are trained, and no memory holds anything yet.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = get_total_norm(gradients)
    if clip_norm:
        clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm.item()
