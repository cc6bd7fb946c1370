from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from memorizing.knn import is_emulated
from memorizing.training import muon
from memorizing.training.muon import Muon, choose_product_dtype, orthogonalize

SHAPES = [(31, 53), (53, 31), (37, 37), (31, 53), (37, 37), (41, 1), (1, 7)]
RATE, DECAY = 0.03, 0.4


def make_parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def fill_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(optimizer: torch.optim.Optimizer, num_steps: int = 5) -> list[Tensor]:
    """Weights after some steps with gradients that depend on the step only."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(num_steps):
        fill_gradients(parameters, 100 + step)
        optimizer.step()
    return [p.detach() for p in parameters]


def states_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]


def orthogonalize_naively(matrix: Tensor) -> Tensor:
    """One matrix at a time, as Jordan et al. write it."""
    x = matrix / matrix.square().sum().sqrt()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def step_naively(weight: Tensor, momentum: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and momentum after a step, tall matrices not transposed."""
    momentum = 0.95 * momentum + 0.05 * gradient
    direction = orthogonalize_naively(0.95 * momentum + 0.05 * gradient)
    scale = 0.2 * max(weight.shape) ** 0.5
    return weight - RATE * DECAY * weight - RATE * scale * direction, momentum


def use_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(muon, "choose_product_dtype", lambda device: dtype)


def test_steps_in_fp32_are_those_of_the_plain_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    use_dtype(monkeypatch, torch.float32)
    expected = [p.detach().clone() for p in make_parameters()]
    momenta = [torch.zeros_like(weight) for weight in expected]
    for step in range(5):
        gradients = make_parameters()
        fill_gradients(gradients, 100 + step)
        for i, parameter in enumerate(gradients):
            assert parameter.grad is not None
            expected[i], momenta[i] = step_naively(expected[i], momenta[i], parameter.grad)
    actual = run(Muon(make_parameters(), lr=RATE, weight_decay=DECAY))
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_steps_in_bf16_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    use_dtype(monkeypatch, torch.bfloat16)
    theirs = torch.optim.Muon(
        make_parameters(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    ours = Muon(make_parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(5):
        results = []
        for optimizer in (ours, theirs):
            parameters = optimizer.param_groups[0]["params"]
            before = [p.detach().clone() for p in parameters]
            fill_gradients(parameters, step)
            optimizer.step()
            results.append([p.detach() - b for p, b in zip(parameters, before, strict=True)])
        for mine, reference in zip(*results, strict=True):
            # A step in bf16 is some hundredths from one in fp32.
            assert (mine - reference).norm() < 0.02 * reference.norm()
    for mine, reference in zip(states_of(ours), states_of(theirs), strict=True):
        assert list(mine) == list(reference) == ["momentum_buffer"]
        torch.testing.assert_close(mine["momentum_buffer"], reference["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 31, 53), (2, 37, 37), (1, 1, 7)])
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_singular_values_end_near_one(
    shape: tuple[int, int, int], dtype: torch.dtype, slack: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(-1.5, 0, shape[1])
    x = u * values @ v
    result = torch.linalg.svdvals(orthogonalize(x.to(dtype)).float())
    assert result.min() > 0.68 - slack
    assert result.max() < 1.21 + slack
    # The singular vectors stay, and the size of the input does not matter.
    inner = u.mT @ orthogonalize(1000 * x) @ v.mT
    torch.testing.assert_close(
        inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4
    )


def test_what_is_stepped_together_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    use_dtype(monkeypatch, torch.float32)
    together = run(Muon(make_parameters(), lr=RATE, weight_decay=DECAY))
    groups = [{"params": [p]} for p in make_parameters()]
    apart = run(Muon(groups, lr=RATE, weight_decay=DECAY))
    for weight, alone in zip(together, apart, strict=True):
        torch.testing.assert_close(weight, alone, rtol=0, atol=1e-5)


def test_the_same_gradients_give_the_same_weights_bit_for_bit() -> None:
    first, second = (run(Muon(make_parameters(), lr=RATE, weight_decay=DECAY)) for _ in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


def test_rates_and_decay_are_those_of_the_group() -> None:
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = Muon(
        [
            {"params": parameters[:3], "lr": 0.0},
            {"params": parameters[3:], "lr": 0.5, "weight_decay": 0.25},
        ]
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for i, (new, old) in enumerate(zip(parameters, before, strict=True)):
        torch.testing.assert_close(new.detach(), old if i < 3 else (1 - 0.5 * 0.25) * old)


def test_matrices_without_gradient_are_left_alone() -> None:
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = Muon(parameters, lr=RATE, weight_decay=DECAY)
    optimizer.step()
    assert not optimizer.state
    parameters[3].grad = torch.ones_like(parameters[3])
    optimizer.step()
    assert list(optimizer.state) == [parameters[3]]
    for i, (new, old) in enumerate(zip(parameters, before, strict=True)):
        assert torch.equal(new, old) == (i != 3)


def test_state_saved_and_loaded_goes_on_bit_for_bit() -> None:
    first = Muon(make_parameters(), lr=RATE, weight_decay=DECAY)
    weights = run(first, num_steps=2)
    second = Muon([nn.Parameter(w.clone()) for w in weights], lr=0.7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for ours, theirs in zip(run(first), run(second), strict=True):
        assert torch.equal(ours, theirs)


def test_state_of_torch_goes_on_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    use_dtype(monkeypatch, torch.bfloat16)
    theirs = torch.optim.Muon(
        make_parameters(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    before = [w.clone() for w in run(theirs, num_steps=2)]
    ours = Muon([nn.Parameter(w.clone()) for w in before])
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    after = zip(run(ours, num_steps=1), run(theirs, num_steps=1), before, strict=True)
    for mine, reference, old in after:
        assert (mine - reference).norm() < 0.02 * (reference - old).norm()


def test_a_closure_computes_the_gradients() -> None:
    weight = nn.Parameter(torch.eye(3, 5))
    optimizer = Muon([weight], lr=RATE)

    def compute_loss() -> float:
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(compute_loss) == 3.0
    assert weight.detach().square().sum() < 3.0


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 5, 7\)"):
        Muon([nn.Parameter(torch.zeros(3, 5, 7))])


def test_products_on_this_processor_are_in_bf16_where_it_multiplies_it() -> None:
    expected = torch.float32 if is_emulated(torch.bfloat16) else torch.bfloat16
    assert choose_product_dtype(torch.device("cpu")) == expected
    assert choose_product_dtype(torch.device("meta")) == torch.float32
