"""What is asked and answered arrives as it was."""

from __future__ import annotations

import pytest
import torch

from memorizing.memory import Memory
from memorizing.ray.shard import pack
from memorizing.ray.wire import decode, encode

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (), (0, 3)])
def test_tensors_of_all_kinds_and_shapes_arrive(dtype, shape):
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    found = decode(encode({"of": [sent, "words"]}))["of"]
    assert found[1] == "words"
    assert (found[0].dtype, found[0].shape) == (dtype, sent.shape)
    assert torch.equal(found[0], sent)


def test_views_arrive_as_what_they_show_and_can_be_changed():
    whole = torch.arange(35).view(5, 7)
    found = decode(encode(whole.T[1:3]))
    assert torch.equal(found, whole.T[1:3])
    found.add_(1)
    assert whole[0, 1] == 1
    assert len(encode(whole[:1])) < len(encode(whole))


def test_numbers_that_are_not_finite_and_gradients_arrive_as_numbers():
    sent = torch.tensor([torch.inf, -torch.inf, 0.0], requires_grad=True)
    found = decode(encode(sent))
    assert found.tolist() == sent.tolist()
    assert not found.requires_grad


def test_what_a_shard_found_arrives():
    memory = Memory(1, 3, 13, 5, torch.bfloat16)
    entries = torch.randn(2, 1, 3, 11, 5, generator=torch.Generator().manual_seed(1))
    memory.append(*entries)
    sent = pack(memory.retrieve(torch.randn(1, 3, 2, 5), 4))
    found = decode(encode(sent))
    assert torch.equal(found.fetch_values(), sent.fetch_values())
    assert torch.equal(found.neighbors.scores, sent.neighbors.scores)
