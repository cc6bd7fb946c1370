"""Questions and answers as bytes.

Torch pickles every tensor as a file of its own, which takes a quarter of a millisecond; an answer
has eight. Here they are their bytes.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Take the bytes of a tensor."""
        if type(obj) is not Tensor:
            return NotImplemented
        content = obj.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return _restore, (content, obj.dtype, tuple(obj.shape))


def _restore(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def encode(value: Any) -> bytes:
    """What `decode` makes the same again; tensors are on the CPU, and arrive without gradient."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def decode(content: bytes) -> Any:
    """What was encoded, by a process of the same cluster: it may run code, as all of Ray may."""
    return pickle.loads(content)
