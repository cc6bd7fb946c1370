"""Muon: momentum for matrices, every step of which has singular values near 1."""

# torch calls the operations on lists of tensors beta, and does not export them.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memorizing.knn import multiplies_bf16
from memorizing.ranks import Shards

MOMENTUM = 0.95
STEP_RMS = 0.2
"""RMS of the entries of a step at a rate of 1: about that of AdamW."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
MIN_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices (Jordan et al. 2024; Liu et al. 2025).

    With the gradient G and the momentum M of a matrix W of shape (rows, columns)::

        M <- 0.95 M + 0.05 G
        O  = orthogonalize(0.95 M + 0.05 G)
        W <- (1 - rate decay) W - rate 0.2 sqrt(max(rows, columns)) O

    The last factor gives a step the RMS of one of AdamW, so that rates tuned for AdamW transfer
    (arXiv 2502.16982, section 2.2). The rule is that of `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`, and so is the state, `momentum_buffer`.

    **Deviation** from torch's: matrices of one shape, transposed or not, are orthogonalized in one
    batched product instead of one after another, and in fp32 on devices that do not multiply bf16
    (torch's is in bf16 on all, and takes eight times as long as the rest of the demo's step there).

    Of matrices in parts each rank keeps its rows of momentum; for the second line it gets some of
    the matrices whole, and deals the results (`Shards.map_whole`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        shards: Shards | None = None,
    ) -> None:
        """Make an optimizer of matrices, or of groups of them with `lr` and `weight_decay`.

        With `shards` the parameters are rows of matrices, whose shapes a group lists as `shapes`.

        Raises:
            ValueError: a parameter is not a matrix.
        """
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._shards = shards
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon updates matrices, and a parameter has shape "
                        f"{tuple(parameter.shape)}; give it to another optimizer"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the matrices that have a gradient, in place.

        Args:
            closure: computes the loss and the gradients first.

        Returns:
            What `closure` gave.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = group.get("shapes") or [p.shape for p in group["params"]]
            apart = self._shards is not None
            for shape, parameters in _group_by_shape(group["params"], shapes, apart):
                self._update(parameters, shape, group["lr"], group["weight_decay"])
        return loss

    def _update(
        self, parameters: list[Tensor], shape: torch.Size, rate: float, weight_decay: float
    ) -> None:
        """Update matrices of one shape, transposed or not, or rows of such of one shape."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self._momentum_of(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        if self._shards is None:
            steps = orthogonalize_together(directions)
        else:
            steps = self._shards.map_whole(
                directions, shape, lambda one: orthogonalize_together([one])[0]
            )
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
        scale = STEP_RMS * max(shape) ** 0.5
        torch._foreach_add_(parameters, steps, alpha=-rate * scale)

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _group_by_shape(
    parameters: Sequence[Tensor], shapes: Sequence[torch.Size], apart: bool
) -> list[tuple[torch.Size, list[Tensor]]]:
    """Those with a gradient, by shape, device and dtype; wide ones first.

    Transposed ones are among them, unless they are wanted `apart`.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    kinds: dict[Any, torch.Size] = {}
    for p, shape in sorted(zip(parameters, shapes, strict=True), key=lambda one: _is_tall(one[1])):
        if p.grad is not None:
            kind = (shape if apart else (min(shape), max(shape))), p.device, p.dtype
            groups[kind].append(p)
            kinds.setdefault(kind, shape)
    return [(kinds[kind], group) for kind, group in groups.items()]


def _is_tall(shape: torch.Size) -> bool:
    return shape[0] > shape[1]


def orthogonalize_together(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalize` of several matrices of one shape, some of them transposed: tall ones last."""
    num_wide = sum(not _is_tall(m.shape) for m in matrices)
    stack = torch.stack([*matrices[:num_wide], *(m.mT for m in matrices[num_wide:])])
    result = orthogonalize(stack.to(choose_product_dtype(stack.device))).to(stack.dtype)
    return [*result[:num_wide].unbind(), *result[num_wide:].mT.contiguous().unbind()]


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices with the singular vectors of `x`, and singular values near 1.

    Newton-Schulz: five times X <- a X + (b X X^T + c (X X^T)^2) X, starting from x / |x|, with
    coefficients that raise small singular values fastest and do not converge to 1 (Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon). Singular values of 1/500 of the norm |x| and
    more end between 0.68 and 1.21, smaller ones below that.

    Args:
        x: (matrices, rows, columns), rows <= columns for speed. Products are in its dtype.
    """
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=MIN_NORM)
    for _ in range(NUM_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def choose_product_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it in hardware, else fp32."""
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
