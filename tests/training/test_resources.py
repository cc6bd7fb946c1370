from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memorizing.config import ModelConfig, TrainingConfig
from memorizing.errors import ResourceError
from memorizing.model import MemorizingTransformer
from memorizing.training import check_resources, estimate_needs, measure_available
from memorizing.training.resources import Needs

GIB = 2**30


def test_the_memories_of_the_paper_take_what_the_paper_says() -> None:
    model = ModelConfig(memory_layers=(8,), capacity=262_144)
    needs = estimate_needs(model, TrainingConfig(rows=1), num_weights=0)
    assert needs.memories == GIB  # 8 heads x 128, keys and values, 16 bit, 262,144 entries


def test_weights_count_with_their_gradients_and_moments(model_config: ModelConfig) -> None:
    for optimizer, bytes_per_weight in (("adamw", 16), ("adafactor", 12)):
        training = TrainingConfig(optimizer=optimizer)  # type: ignore[arg-type]
        assert estimate_needs(model_config, training, 1000).weights == 1000 * bytes_per_weight


def test_accumulation_and_checkpointing_save_activations_only(model_config: ModelConfig) -> None:
    training = TrainingConfig(rows=6)
    whole = estimate_needs(model_config, training, 1000)
    parts = estimate_needs(model_config, replace(training, accumulation=3), 1000)
    saving = estimate_needs(model_config, replace(training, gradient_checkpointing=True), 1000)
    assert parts.activations == whole.activations // 3
    assert saving.activations < whole.activations
    for other in (parts, saving):
        assert (other.weights, other.memories) == (whole.weights, whole.memories)


def test_the_boundary_is_what_is_free(model_config: ModelConfig) -> None:
    needs = Needs(weights=3, activations=5, memories=7)
    check_resources(needs, model_config, TrainingConfig(), available=15)
    with pytest.raises(ResourceError):
        check_resources(needs, model_config, TrainingConfig(), available=14)


def test_the_refusal_says_how_much_is_needed_for_what() -> None:
    model = ModelConfig(memory_layers=(8,), capacity=262_144)
    needs = estimate_needs(model, TrainingConfig(rows=256), num_weights=184_000_000)
    with pytest.raises(ResourceError) as error:
        check_resources(needs, model, TrainingConfig(rows=256), available=24 * GIB)
    message = str(error.value)
    assert "256.0 GiB for memories of capacity 262,144 in 256 rows" in message
    assert "24.0 GiB are free" in message
    assert "model.capacity" in message
    assert "\n" not in message


def test_something_is_free_on_this_machine() -> None:
    assert 2**20 < measure_available() < 2**50


def test_the_estimate_is_near_what_a_backward_pass_keeps() -> None:
    model = ModelConfig(
        vocab_size=499, num_layers=5, model_dim=64, num_heads=4, head_dim=16, ffn_dim=256,
        segment_len=128, window=128,
    )  # fmt: skip
    network = MemorizingTransformer(model)
    state = network.init_state(3)
    state = network(torch.zeros(3, 128, dtype=torch.int64), state).state.commit()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(torch.zeros(3, 128, dtype=torch.int64), state)
    measured = sum(kept.values()) - sum(p.nbytes for p in network.parameters())
    measured += 2 * output.logits.nbytes
    estimate = estimate_needs(model, TrainingConfig(rows=3), num_weights=0).activations
    assert 0.8 * measured < estimate < 1.5 * measured
