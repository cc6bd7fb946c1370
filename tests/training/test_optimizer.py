from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from memorizing.config import ModelConfig, TrainingConfig
from memorizing.errors import CheckpointError
from memorizing.model import MemorizingTransformer
from memorizing.model.pointer import POINTER_PARAMETERS
from memorizing.training.optimizer import Optimizer, ParameterGroups, group_parameters

Kind = Literal["adafactor", "adamw", "muon"]
KINDS: tuple[Kind, ...] = ("adafactor", "adamw", "muon")


def group(model: MemorizingTransformer) -> ParameterGroups:
    return group_parameters(model, [model.embedding.weight], model.memory_parameters())


def fill_gradients(model: MemorizingTransformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steady(**settings: object) -> TrainingConfig:
    values = {"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.01, **settings}
    return TrainingConfig(**values)  # type: ignore[arg-type]


def test_every_parameter_is_in_the_group_it_belongs_to(model_config: ModelConfig) -> None:
    model = MemorizingTransformer(model_config)
    groups = group(model)
    names = [name for part in groups.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert list(groups["embedding"]) == ["embedding.weight"]
    assert len(groups["matrices"]) == 3 * 6
    assert {name.rpartition(".")[2] for name in groups["memory"]} == {"scale", "gate_bias"}
    vectors = {name.rpartition(".")[2] for name in groups["vectors"]}
    assert vectors == {"gain", "table", "smear", *POINTER_PARAMETERS}


@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_scales_have_their_own_rate_and_no_decay(
    kind: Kind, model_config: ModelConfig
) -> None:
    model = MemorizingTransformer(replace(model_config, gate_bias_init=1.5))
    before = copy.deepcopy(model)
    optimizer = Optimizer(
        group(model), steady(optimizer=kind, gate_learning_rate=0.25, weight_decay=0.5)
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gate = model.blocks[1].attention.gate_bias
    gate.grad = torch.tensor([3.0, -0.7])
    optimizer.set_step(1)
    optimizer.step()
    # The first AdamW step moves by the rate against the sign of the gradient, whatever its size.
    torch.testing.assert_close(gate.detach(), torch.tensor([1.25, 1.75]))
    assert optimizer.rates()["memory"] == 0.25
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if name in group(model)["matrices"] or name == "embedding.weight":
            assert new.norm() < old.norm(), name
        elif new is not gate:
            assert torch.equal(new, old), name


def test_embedding_and_vectors_take_rates_of_their_own(model_config: ModelConfig) -> None:
    model = MemorizingTransformer(model_config)
    config = steady(optimizer="muon", embedding_learning_rate=0.3, vector_learning_rate=0.07)
    optimizer = Optimizer(group(model), config)
    assert optimizer.rates() == {
        "matrices": 0.01,
        "embedding": 0.3,
        "vectors": 0.07,
        "memory": 0.01,
    }
    fallback = Optimizer(group(model), steady(gate_learning_rate=0.02))
    assert fallback.rates() == {
        "matrices": 0.01,
        "embedding": 0.01,
        "vectors": 0.01,
        "memory": 0.02,
    }


def test_rates_follow_the_schedule(model_config: ModelConfig) -> None:
    model = MemorizingTransformer(model_config)
    config = TrainingConfig(
        schedule="inverse_sqrt", warmup_steps=4, learning_rate=1.0, gate_learning_rate=0.1
    )
    optimizer = Optimizer(group(model), config)
    assert optimizer.rates()["matrices"] == pytest.approx(1 / 8)  # (1 / 4) / sqrt(4)
    optimizer.set_step(16)
    assert optimizer.rates()["matrices"] == pytest.approx(1 / 4)  # 1 / sqrt(16)
    assert optimizer.rates()["memory"] == pytest.approx(0.05)  # half of its peak


def test_adafactor_steps_by_the_rate_times_the_size_of_the_parameter() -> None:
    weight = torch.nn.Parameter(torch.full((3, 5), 2.0))
    optimizer = Optimizer({"matrices": {"w": weight}}, steady(optimizer="adafactor"))
    weight.grad = torch.where(torch.arange(15).view(3, 5) % 2 == 0, 0.7, -0.7)
    optimizer.step()
    # Update of RMS 1, times rate 0.01, times RMS of the parameter 2, times 1 - 0.9 of the moment.
    torch.testing.assert_close(weight.detach(), 2.0 - weight.grad.sign() * 0.002)


def test_muon_steps_have_a_fifth_of_the_rate_as_rms_whatever_the_shape() -> None:
    weight = torch.nn.Parameter(torch.zeros(53, 31))
    optimizer = Optimizer({"matrices": {"w": weight}}, steady(optimizer="muon"))
    weight.grad = torch.randn(53, 31, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    # 31 singular values near 1 (Newton-Schulz leaves them between 0.7 and 1.2) over 53 x 31
    # entries, scaled by 0.2 sqrt(53).
    rms = weight.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.01 * 0.2, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_optimizer_steps_bit_for_bit_alike(
    kind: Kind, model_config: ModelConfig
) -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer(model_config)
    config = steady(optimizer=kind, weight_decay=0.1)
    optimizer = Optimizer(group(model), config)
    for seed in (1, 2):
        fill_gradients(model, seed)
        optimizer.step()
    tensors, numbers = optimizer.state_dict()
    copied = {name: tensor.clone() for name, tensor in tensors.items()}
    other = copy.deepcopy(model)
    restored = Optimizer(group(other), config)
    restored.load_state_dict(copied, json.loads(json.dumps(numbers)))
    start = [p.detach().clone() for p in model.parameters()]
    for network, each in ((model, optimizer), (other, restored)):
        fill_gradients(network, 3)
        each.step()
    for ours, theirs, before in zip(model.parameters(), other.parameters(), start, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, before)


def test_state_of_another_optimizer_is_refused(model_config: ModelConfig) -> None:
    model = MemorizingTransformer(model_config)
    fill_gradients(model, 0)
    adamw = Optimizer(group(model), steady())
    adamw.step()
    tensors, numbers = adamw.state_dict()
    with pytest.raises(CheckpointError, match=r"training\.optimizer"):
        Optimizer(group(model), steady(optimizer="muon")).load_state_dict(tensors, numbers)


def test_frozen_parameters_are_left_alone(model_config: ModelConfig) -> None:
    model = MemorizingTransformer(model_config)
    model.embedding.weight.requires_grad_(False)
    parameters: list[Tensor] = list(Optimizer(group(model), steady()).parameters())
    assert all(p is not model.embedding.weight for p in parameters)
    assert len(parameters) == len(list(model.parameters())) - 1
