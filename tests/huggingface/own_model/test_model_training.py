"""Loss and gradient of our own model in the ecosystem, and `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from memorizing.errors import ConfigError, StateError
from memorizing.huggingface.own_model.model import MemorizingTransformerForCausalLM
from memorizing.loss import sum_nats
from memorizing.training import load_model
from tests.huggingface.own_model.tools import SEGMENT_LEN, make_own
from tests.model.tools import make_tokens


def compute_gradients_segment_by_segment(
    model: MemorizingTransformerForCausalLM, tokens: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """As our own training does it: forward, backward, commit."""
    targets = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[:, -1] = False
    state, total = model.model.init_state(len(tokens)), 0.0
    model.zero_grad()
    for start in range(0, tokens.shape[1], SEGMENT_LEN):
        part = slice(start, start + SEGMENT_LEN)
        output = model.model(tokens[:, part], state)
        loss = sum_nats(output.logits, targets[:, part], valid[:, part]) / valid.sum()
        loss.backward()
        total += float(loss.detach())
        state = output.state.commit()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def check_gradients(model: MemorizingTransformerForCausalLM, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_our_own() -> None:
    model = make_own()
    tokens = make_tokens(3, 7)
    labels = tokens.clone()
    labels[0, 3] = -100
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    with torch.no_grad():
        output = model(tokens, attention_mask=mask, labels=labels)
        divided = model(
            tokens, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(100)
        )
    counted = torch.ones(3, 6, dtype=torch.bool)
    counted[0, 2] = False
    counted[1, :4] = False  # Column 4 is the first that is seen: nothing predicts it.
    nats = sum_nats(output.logits[:, :-1], tokens[:, 1:], counted)
    torch.testing.assert_close(output.loss, nats / 13)
    torch.testing.assert_close(divided.loss, nats / 100)
    torch.testing.assert_close(
        output.loss,
        nn.functional.cross_entropy(output.logits[:, :-1][counted], tokens[:, 1:][counted]),
    )


def test_labels_that_count_nothing_give_a_loss_of_0() -> None:
    tokens = make_tokens(1, 5)
    assert make_own()(tokens, labels=torch.full_like(tokens, -100)).loss == 0


@pytest.mark.parametrize("combine", ["gate", "joint"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_several_segments_have_the_gradient_of_our_own_training(
    combine: str, checkpointing: bool
) -> None:
    model = make_own(combine=combine)
    tokens = make_tokens(2, 31)
    total, expected = compute_gradients_segment_by_segment(model, tokens)
    if checkpointing:
        # transformers 5.21 has it under its old name only.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
        assert model.model.gradient_checkpointing
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    check_gradients(model, expected)


def test_left_padding_changes_no_gradient() -> None:
    model = make_own()
    tokens = make_tokens(1, 19)
    model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    padded = torch.cat([tokens.new_zeros(1, 5), tokens], 1)
    mask = (torch.arange(24) >= 5).long().unsqueeze(0)
    model(padded, attention_mask=mask, labels=padded).loss.backward()
    check_gradients(model, expected)


def test_a_document_may_be_trained_on_in_several_calls() -> None:
    model = make_own()
    tokens = make_tokens(1, 28)
    with torch.no_grad():
        expected = model(tokens).logits
    cache = model.init_cache(1)
    for start in (0, 14):
        part = tokens[:, start : start + 14]
        output = model(part, past_key_values=cache, labels=part)
        output.loss.backward()
        torch.testing.assert_close(output.logits, expected[:, start : start + 14])
    assert cache.state.memories[1].num_appended.tolist() == [21]


def test_a_history_that_goes_on_before_the_backward_pass_is_noticed() -> None:
    model = make_own()
    cache = model.init_cache(1)
    tokens = make_tokens(1, 28)
    loss = model(tokens[:, :14], past_key_values=cache, labels=tokens[:, :14]).loss
    model(tokens[:, 14:], past_key_values=cache)
    with pytest.raises(StateError, match="after backward"):
        loss.backward()


@pytest.mark.parametrize("name", ["embedding", "blocks.1.attention.query"])
def test_adapters_that_would_have_no_effect_are_refused(name: str) -> None:
    model = make_own()
    model.model.set_submodule(name, nn.Sequential(model.model.get_submodule(name)))
    with pytest.raises(ConfigError, match=rf"{name} was replaced by a .*Sequential"):
        model(make_tokens(1, 3))


def make_examples(num_examples: int, num_tokens: int) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": row, "labels": row.clone()} for row in make_tokens(num_examples, num_tokens)
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_of_transformers_takes_the_steps_that_we_would(
    tmp_path: Path, accumulation: int
) -> None:
    examples = make_examples(4, 17)
    examples[0]["labels"][:9] = -100  # Rows of unlike weight: the mean of means would be another.
    model, other = make_own(), make_own()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=1e9,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_steps=2,
        ),
        train_dataset=examples,  # type: ignore[arg-type]
        eval_dataset=examples,  # type: ignore[arg-type]
    )
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]

    inputs = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        other(**inputs).loss.backward()
        optimizer.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert evaluated == pytest.approx(float(other(**inputs).loss), rel=1e-4)
    saved = load_model(tmp_path / "checkpoint-2").model.state_dict()
    assert torch.equal(saved["final_norm.gain"], model.model.final_norm.gain)


def test_the_trainer_computes_in_bf16_where_it_is_told(tmp_path: Path) -> None:
    model = make_own()
    before = model.model.final_norm.gain.clone()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, bf16=True, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=make_examples(2, 17)).train()  # type: ignore[arg-type]
    assert model.model.compute_dtype == torch.bfloat16
    assert model.model.final_norm.gain.dtype == torch.float32
    assert not torch.equal(model.model.final_norm.gain, before)
