"""Documents read at many places at once have the entries of documents read in order."""

import dataclasses

import pytest
import torch

from memorizing.config import ModelConfig
from memorizing.evaluation import lanes
from memorizing.evaluation.lanes import count_warm_up, read_in_lanes
from memorizing.model import MemorizingTransformer

SEGMENT_LEN = 7
CONFIG = ModelConfig(
    vocab_size=13,
    num_layers=3,
    model_dim=22,
    num_heads=2,
    head_dim=11,
    ffn_dim=17,
    segment_len=SEGMENT_LEN,
    window=SEGMENT_LEN,
    xl_cache=False,
    memory_layers=(1,),
    capacity=5,
    num_neighbors=5,
    pointer=True,
    memory_dtype="float32",
    conv_len=5,
)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def make_model(**changes) -> MemorizingTransformer:
    torch.manual_seed(0)
    model = MemorizingTransformer(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mix_" in name or name.endswith("smear"):
                parameter.add_(torch.randn_like(parameter))
    return model


@torch.no_grad()
def read_in_order(model: MemorizingTransformer, tokens: torch.Tensor, state):
    for part in tokens.split(SEGMENT_LEN, 1):
        part = part.to(model.embedding.weight.device)
        state = model(part, state, memory_open=False).state.commit()
    return state


@pytest.mark.parametrize(
    "changes",
    [{}, {"conv_len": 0, "smear_keys": True}, {"conv_len": 0}, {"memory_layers": (2,)}],
    ids=["convolution", "smeared keys", "nothing mixed", "memory in the last layer"],
)
@pytest.mark.parametrize("capacity", [1000, 53], ids=["all fits", "the ring goes round"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_lanes_write_what_segments_in_order_write(monkeypatch, changes, capacity, device):
    # Two rounds of 3 lanes of 2 segments, and segments that are left.
    monkeypatch.setattr(lanes, "LANE_SEGMENTS", 2)
    for name in ("_TOKENS_ON_CPU", "_TOKENS_ON_GPU"):
        monkeypatch.setattr(lanes, name, 2 * 3 * SEGMENT_LEN)
    model = make_model(**changes).to(device)
    warm_up = count_warm_up(model.config)
    assert warm_up is not None
    assert warm_up == (0 if changes == {"conv_len": 0} else 3)
    tokens = torch.randint(13, (2, (warm_up + 12 + 1) * SEGMENT_LEN))
    state, num_done = read_in_lanes(model, tokens, model.init_state(2, capacity))
    assert num_done == (warm_up + 12) * SEGMENT_LEN
    assert state.position.tolist() == [num_done] * 2
    state = read_in_order(model, tokens[:, num_done:], state)
    expected = read_in_order(model, tokens, model.init_state(2, capacity))
    torch.testing.assert_close(state.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("changes", "num_segments"),
    [({}, 3 + 2 * 2 - 1), ({"xl_cache": True}, 50), ({"memory_layers": (1, 2)}, 50)],
    ids=["too short for two lanes", "a cache over segments", "entries depend on a memory"],
)
def test_what_lanes_cannot_read_is_left(monkeypatch, changes, num_segments):
    monkeypatch.setattr(lanes, "LANE_SEGMENTS", 2)
    model = make_model(**changes)
    state = model.init_state(1)
    tokens = torch.zeros((1, num_segments * SEGMENT_LEN), dtype=torch.int64)
    assert read_in_lanes(model, tokens, state) == (state, 0)
