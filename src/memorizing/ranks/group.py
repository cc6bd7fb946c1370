"""What ranks do together. Everything here is called by all of them, in the same order.

**Not torch's DistributedDataParallel**, which averages over ranks as the backward pass goes: a step
here is several backward passes (parts of a batch, rows of a finetuning), of which a rank may have
none (only gates are trained, and its rows' memories are empty); and where no rank has a gradient,
an optimizer must not count a step. So gradients are summed once, after the backward pass: the loss
is nats / target tokens of all ranks, and a parameter's gradient is that of one process with all
rows. The same sums of the same numbers give the same bits, from the first step of a resumed run on.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from memorizing.devices import find_device
from memorizing.errors import ConfigError, RankError
from memorizing.ranks.pulse import Pulse

_BUCKET = 1 << 24
"""Numbers that are summed at once: 64 MiB of fp32."""
_POLL_S = (0.0002, 0.002)
"""What a step waits for comes soon; what takes long may be seen later."""
_ALIGNMENT = 16


@final
class Ranks:
    """This process among those that train or evaluate together; `ALONE` is a process by itself."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
        pulse: Pulse | None = None,
        num_here: int = 1,
    ) -> None:
        """Describe a process.

        Args:
            rank: its number, from 0.
            size: how many there are.
            device: where it computes; None leaves the choice.
            pulse: of the ranks; needed where there are several.
            num_here: how many run on this machine.
        """
        self.rank, self.size, self.num_here = rank, size, num_here
        self._device, self._pulse = device, pulse
        self.has_failed = False
        """Whether another rank ended this one."""
        self.is_told = False
        """Whether rank 0 tells why this one ended."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def find_device(self, wanted: torch.device | str | None = None) -> torch.device:
        """Where this process computes; a device that is wanted is for one process only."""
        return find_device(wanted) if self._device is None else self._device

    def deal(self, num_rows: int) -> range:
        """The rows that are this rank's, of all rows in order, as equal as can be.

        Raises:
            ConfigError: there are fewer rows than ranks.
        """
        if num_rows < self.size:
            raise ConfigError(
                f"there are {self.size} processes and {num_rows} rows; start at most one process "
                "per row, or raise the rows"
            )
        return range(self.rank * num_rows // self.size, (self.rank + 1) * num_rows // self.size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, each number by itself, in fp64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self.wait_for(dist.all_reduce(total, async_op=True))
        return total.tolist()

    def is_any(self, value: bool) -> bool:
        """Whether it is so in any rank."""
        return value if self.size == 1 else self.sum([float(value)])[0] > 0

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.sum([0.0])

    def share(self, value: Any) -> Any:
        """The value of rank 0, as JSON holds it."""
        if self.size == 1:
            return value
        data = _encode(value)
        length = torch.tensor([len(data)])
        self.wait_for(dist.broadcast(length, 0, async_op=True))
        data = data if self.is_main else torch.empty(int(length), dtype=torch.uint8)
        self.wait_for(dist.broadcast(data, 0, async_op=True))
        return json.loads(data.numpy().tobytes())

    def check_equal(self, what: str, value: Any) -> None:
        """Refuse ranks that would not do the same.

        Args:
            what: is compared.
            value: as JSON holds it; that of rank 0 is right.

        Raises:
            RankError: in all ranks, with those that have another value.
        """
        if self.size == 1:
            return
        mine = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        differs = [0.0] * self.size
        differs[self.rank] = float(self.share(mine) != mine)
        wrong = [str(rank) for rank, count in enumerate(self.sum(differs)) if count]
        if wrong:
            raise RankError(
                f"rank {', '.join(wrong)} of {self.size} has another {what} than rank 0; give all "
                "processes the same command, files and versions"
            )

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients over the ranks. In place; what has none in any rank keeps none."""
        if self.size == 1:
            return
        counts = self.sum([float(p.grad is not None) for p in parameters])
        shared = [p for p, count in zip(parameters, counts, strict=True) if count]
        for bucket in _fill_buckets(shared):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self.wait_for(dist.all_reduce(flat, async_op=True))
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)

    def gather_all(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape: (ranks, ...), in every rank."""
        found = tensor.new_empty(self.size, *tensor.shape)
        work = dist.all_gather_single(found.flatten(), tensor.contiguous().flatten(), async_op=True)
        self.wait_for(work)
        return found

    def add_up(self, tensor: Tensor) -> None:
        """Sum tensors of one shape over the ranks. In place."""
        self.wait_for(dist.all_reduce(tensor, async_op=True))

    def join_arrays(
        self, arrays: Mapping[int, NDArray[np.float32]], lengths: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        """Arrays that each rank has some of, by their number: all of them, in every rank.

        Args:
            arrays: those of this rank.
            lengths: of all arrays.
        """
        if self.size == 1:
            return [arrays[index] for index in range(len(lengths))]
        places = np.cumsum([0, *lengths])
        flat = np.zeros(places[-1], dtype=np.float32)
        for index, array in arrays.items():
            flat[places[index] : places[index + 1]] = array
        self.wait_for(dist.all_reduce(torch.from_numpy(flat), async_op=True))
        return np.split(flat, places[1:-1])

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all ranks, whose names differ: in rank 0 and on the CPU; none elsewhere.

        Nothing is broadcast: each rank's go to rank 0.
        """
        if self.size == 1:
            return dict(tensors)
        mine = {} if self.is_main else {n: t.detach().cpu() for n, t in tensors.items()}
        described = [
            [name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in mine.items()
        ]
        headers = self._gather(_encode(described))
        contents = self._gather(_join_bytes(mine.values()))
        found = dict(tensors) if self.is_main else {}
        for header, content in zip(headers, contents, strict=True):
            start = 0
            for name, dtype, shape in json.loads(header.numpy().tobytes()):
                kind = getattr(torch, dtype)
                num_bytes = math.prod(shape) * kind.itemsize
                found[name] = content[start : start + num_bytes].view(kind).view(shape)
                start += _pad(num_bytes)
        return found

    def _gather(self, data: Tensor) -> list[Tensor]:
        """Bytes of every rank, in rank 0; none elsewhere."""
        lengths = [0.0] * self.size
        lengths[self.rank] = len(data)
        counts = [int(length) for length in self.sum(lengths)]
        padded = torch.zeros(max(counts), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in counts] if self.is_main else None
        self.wait_for(dist.gather(padded, parts, 0, async_op=True))
        return [part[:count] for part, count in zip(parts or (), counts, strict=bool(parts))]

    def wait_for(self, work: dist.Work | None) -> None:
        """Wait for something that all ranks do, as long as all are alive.

        Raises:
            RankError: one is not.
        """
        assert work is not None
        assert self._pulse is not None
        look_s = time.monotonic() + self._pulse.interval_s
        poll_s, longest_s = _POLL_S
        while not work.is_completed():
            time.sleep(poll_s)
            poll_s = min(1.05 * poll_s, longest_s)
            if time.monotonic() >= look_s:
                self._pulse.check()
                look_s = time.monotonic() + self._pulse.interval_s
        try:
            work.wait()
        except RuntimeError as error:
            raise self._pulse.explain(error) from error

    def leave(self, error: BaseException) -> None:
        """End with an error that the other ranks are told, unless it is theirs."""
        assert self._pulse is not None
        words = " ".join(str(error).split()) or type(error).__name__
        self.has_failed = isinstance(error, RankError)
        self.is_told = self._pulse.leave(words if self.has_failed else f"rank {self.rank}: {words}")


ALONE = Ranks()


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """A number for the values of tensors in their order."""
    sums = [torch.hash_tensor(tensor.detach()).item() for tensor in tensors]
    return hashlib.sha256(repr(sums).encode()).hexdigest()


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _pad(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _join_bytes(tensors: Iterable[Tensor]) -> Tensor:
    """All bytes one after another, each tensor at a multiple of `_ALIGNMENT`."""
    parts = [t.contiguous().view(-1).view(torch.uint8) for t in tensors]
    whole = torch.zeros(sum(_pad(len(part)) for part in parts), dtype=torch.uint8)
    start = 0
    for part in parts:
        whole[start : start + len(part)] = part
        start += _pad(len(part))
    return whole


def _fill_buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in their order, as many at a time as are summed at once, of one kind."""
    bucket: list[Tensor] = []
    for p in parameters:
        is_other = bucket and (bucket[0].dtype, bucket[0].device) != (p.dtype, p.device)
        if is_other or sum(one.numel() for one in bucket) + p.numel() > _BUCKET:
            if bucket:
                yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
