"""Weights, gradients and optimizer state in parts: every rank keeps some rows of each large weight.

FSDP2 (`torch.distributed.fsdp.fully_shard`) puts a layer's weights together before it computes, in
the forward and in the backward pass, and sums and deals their gradients afterwards. Small weights
(norms, gates, scales, biases) stay whole in every rank; whether they have a gradient may differ
between ranks, which FSDP2 does not allow.

All ranks must compute the same layers equally often, in the same order.
"""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memorizing.ranks.group import Ranks, hash_tensors
from memorizing.storage.tensors import AwaitedTensor

_MMAP_THRESHOLD, _LARGE = -3, 1 << 20
"""glibc's number for the size, in bytes, from which on what is freed goes back to the system."""


class _Collective:
    """What FSDP2 is given in the place of its own collectives, which wait without end."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Collective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        self._ranks.wait_for(
            dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=True)
        )


class _ReduceScatter(_Collective):
    """Exchange, and sum: the handle of gloo's own `reduce_scatter` never says that it is done."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        parts = torch.empty_like(input_tensor)
        self._ranks.wait_for(
            dist.all_to_all_single(parts, input_tensor, group=group, async_op=True)
        )
        torch.sum(parts.view(self._ranks.size, -1), 0, out=output_tensor)


@final
class Shards:
    """The large weights of a model, in parts: of n rows, rank r has those of the r-th chunk."""

    def __init__(
        self,
        ranks: Ranks,
        model: nn.Module,
        layers: Iterable[nn.Module],
        whole: Collection[nn.Parameter],
    ) -> None:
        """Deal the weights of a model that all ranks have. In place; the model moves to the device.

        Args:
            ranks: two or more.
            model: with gradients of none of its weights.
            layers: whose weights are put together one after another; those outside of all layers
                are put together as long as the model computes.
            whole: parameters that are not dealt, besides vectors.

        Raises:
            RankError: the ranks have other weights.
        """
        # Slow to import, and of no use without it.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self._ranks = ranks
        set_option = (
            getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        )
        if set_option is not None:
            # It grows by itself up to 32 MiB; then layers that were put together stay resident.
            set_option(_MMAP_THRESHOLD, _LARGE)
        ranks.check_equal("set of weights", hash_tensors(model.parameters()))
        device = ranks.find_device()
        kept = {p for p in model.parameters() if p.ndim < 2} | set(whole)
        names = [name for name, p in model.named_parameters() if p not in kept]
        mesh = init_device_mesh(device.type, (ranks.size,))
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, ignored_params=kept, reshard_after_forward=True)
        for parameter in kept:
            parameter.data = parameter.data.to(device)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                module.set_custom_all_gather(cast(Any, _AllGather(ranks)))
                module.set_custom_reduce_scatter(cast(Any, _ReduceScatter(ranks)))
        # What it warns of, operations in place on a layer's output, is not done here.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        weights = dict(model.named_parameters())
        with torch.no_grad():
            self.parts: dict[str, Tensor] = {
                name: cast(Any, weights[name]).to_local() for name in names
            }
        """By the parameter's name, this rank's rows of it, by reference."""
        self.shapes = {name: weights[name].shape for name in names}
        """Of the whole parameters."""

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor, by reference."""
        length = _count_rows(whole.shape, self._ranks.size)
        return whole[self._ranks.rank * length : (self._ranks.rank + 1) * length]

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copy the whole tensors of a model's `state_dict` into it. In place."""
        with torch.no_grad():
            for name, mine in model.state_dict().items():
                part = self.parts.get(name)
                if part is None:
                    mine.copy_(tensors[name])
                else:
                    part.copy_(self.cut(tensors[name]))

    def await_all(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | AwaitedTensor]:
        """A model's `state_dict` with weights that are put together when they are fetched."""
        return {
            name: self.await_whole(name, self.parts[name]) if name in self.parts else tensor
            for name, tensor in tensors.items()
        }

    def await_whole(self, name: str, part: Tensor) -> AwaitedTensor:
        """A tensor like a parameter, of which `part` are this rank's rows.

        All ranks fetch it at the same time; rank 0 gets it, on the CPU, and the others nothing.
        """
        shape = self.shapes[name]
        return AwaitedTensor(part.dtype, tuple(shape), lambda: self._gather(part, shape))

    def _gather(self, part: Tensor, shape: torch.Size) -> Tensor:
        ranks, part = self._ranks, part.detach().cpu()
        length = _count_rows(shape, ranks.size)
        sent = part
        if len(part) < length:
            sent = part.new_zeros(length, *shape[1:])
            sent[: len(part)] = part
        whole = part.new_empty(ranks.size * length if ranks.is_main else 0, *shape[1:])
        places = list(whole.split(length)) if ranks.is_main else None
        ranks.wait_for(dist.gather(sent.contiguous(), places, 0, async_op=True))
        return whole[: shape[0]]

    def sum_squares(self, parts: Iterable[Tensor]) -> float:
        """The sum of the squares of all numbers that all ranks have in their parts."""
        mine = [torch.linalg.vector_norm(part).double() ** 2 for part in parts]
        return self._ranks.sum([float(torch.stack(mine).sum()) if mine else 0.0])[0]

    def map_whole(
        self, parts: Sequence[Tensor], shape: torch.Size, function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """The rows, of this rank, of a function of whole matrices of one shape.

        Each rank gets some of the matrices whole, one after another, and deals the results: two
        exchanges of all bytes, and of the function's operations each rank has a share.

        Args:
            parts: this rank's rows of every matrix.
            shape: of a whole one.
            function: keeps the shape.
        """
        size, rank = self._ranks.size, self._ranks.rank
        length = _count_rows(shape, size)
        rows = [max(0, min(length, shape[0] - one * length)) for one in range(size)]
        results: list[Tensor] = []
        for first in range(0, len(parts), size):
            asked = parts[first : first + size]
            mine = [len(asked[0]) * shape[1]] * len(asked) + [0] * (size - len(asked))
            theirs = [count * shape[1] if rank < len(asked) else 0 for count in rows]
            sent = torch.cat([part.flatten() for part in asked])
            whole = self._exchange(sent, mine, theirs).view(-1, shape[1])
            result = function(whole) if len(whole) else whole
            dealt = self._exchange(result.flatten(), theirs, mine)
            results += dealt.view(len(asked), len(asked[0]), shape[1]).unbind()
        return results

    def _exchange(self, sent: Tensor, given: list[int], taken: list[int]) -> Tensor:
        """What the ranks send this one: so many numbers from each, for so many to each."""
        found = sent.new_empty(sum(taken))
        work = dist.all_to_all_single(found, sent.contiguous(), taken, given, async_op=True)
        self._ranks.wait_for(work)
        return found


def _count_rows(shape: Sequence[int], size: int) -> int:
    """Rows of a chunk, of which the last ones may be shorter, or empty."""
    return math.ceil(shape[0] / size)
