"""Other attentions in the model's place: each equals its formula, is causal, forgets and learns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing.config import ModelConfig
from memorizing.errors import CheckpointError, ConfigError
from memorizing.loss import sum_nats
from memorizing.memory import Entries
from memorizing.model import MemorizingTransformer
from memorizing.model.block import AttentionLayer
from memorizing.model.layout import Layout
from memorizing.training import load_model, save_model
from tests.experiments.scripts import EXPERIMENTS
from tests.model.tools import SMALL, make_tokens, read

sys.path.append(str(EXPERIMENTS))

from attentions import choose_model, naive, split_settings  # noqa: E402
from attentions.performer import compute_features, draw_directions  # noqa: E402

SETTINGS = {
    "linformer": ("context=15", "block_len=3", "num_slots=1"),
    "linformer-wide": ("context=12", "block_len=4", "num_slots=2"),
    "compressive": ("num_slots=5", "rate=3", "sample_every=2"),
    "compressive-1": ("num_slots=4", "rate=1", "sample_every=1"),
    "performer": ("num_features=22",),
    "performer-beyond": ("num_features=11",),
}
"""Small ones: what is farther away than slots reach is forgotten within a test's documents."""
CONFIG = replace(SMALL, capacity=0, smear_keys=False, conv_len=3, window=5, scale_init=2.0)


def make(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> MemorizingTransformer:
    """A model whose parameters are all away from their starting values."""
    torch.manual_seed(0)
    model = choose_model(list_settings(name))(replace(CONFIG, **changes)).to(dtype)
    model.compute_dtype = dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def list_settings(name: str) -> list[str]:
    kind = name if name == "performer-beyond" else name.partition("-")[0]
    return [f"attention.{s}" for s in (f"kind={kind}", *SETTINGS[name])]


def attend(model: MemorizingTransformer, x: Tensor) -> tuple[Tensor, AttentionLayer]:
    """What layer 1 makes of x (B, n, d), segment by segment; before the output projection."""
    layer = model.blocks[1].attention
    assert isinstance(layer, AttentionLayer)
    config = model.config
    state = model.init_state(len(x))
    cache, recent, parts = state.xl_caches[1], (state.recent[1] if state.recent else None), []
    seen: list[Tensor] = []
    layer.project_output = lambda attended: seen.append(attended) or attended  # type: ignore
    for part in x.split(config.segment_len, 1):
        tokens = torch.zeros(part.shape[:2], dtype=torch.int64)
        layout = Layout.build(config, state, tokens, None)
        result = layer(part, layout, cache, recent, None)
        cache, recent = result.cache, result.recent
        state = replace(state, position=state.position + part.shape[1])
        parts.append(seen.pop())
    return torch.cat(parts, 2).transpose(1, 2), layer


def find_formula(name: str) -> Callable[..., Tensor]:
    kind = name.partition("-")[0]
    if kind == "performer":
        beyond = name == "performer-beyond"
        formula = naive.attend_by_features_beyond if beyond else naive.attend_by_features
        return lambda layer, p, row: formula(
            layer,
            layer.directions,
            *(t[row].transpose(0, 1) for t in (p.queries, p.keys, p.values)),
        )
    formula = getattr(naive, f"attend_by_{kind}")
    return lambda layer, p, row: formula(
        layer, *(t[row].transpose(0, 1) for t in (p.scaled_queries, p.keys, p.values))
    )


def project_whole(model: MemorizingTransformer, layer: AttentionLayer, x: Tensor) -> Any:
    state = replace(model.init_state(len(x)), segment_len=x.shape[1])
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64)
    layout = Layout.build(replace(model.config, segment_len=x.shape[1]), state, tokens, None)
    return layer.project(x, layout, state.recent[1] if state.recent else None)


@pytest.mark.parametrize("window", [3, 7, 11])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_its_formula_token_by_token_in_value_and_gradient(name: str, window: int) -> None:
    # Without the short convolution, whose gradient across segments the formulas do not know.
    model = make(name, conv_len=0, window=window)
    torch.manual_seed(1)
    x = torch.randn(1, 41, SMALL.model_dim, dtype=torch.float64)
    found, layer = attend(model.eval(), x)
    projected = project_whole(model, layer, x)
    wanted = find_formula(name)(layer, projected, 0).unsqueeze(0)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(found)
    names, parameters = zip(
        *((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True
    )
    grads = [
        torch.autograd.grad((out * direction).sum(), parameters, allow_unused=True)
        for out in (found, wanted)
    ]
    for parameter_name, mine, theirs in zip(names, *grads, strict=True):
        if theirs is None:
            assert mine is None or not mine.any(), parameter_name
            continue
        assert mine is not None, parameter_name
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9, msg=parameter_name)
    taught = {n for n, g in zip(names, grads[0], strict=True) if g is not None and g.any()}
    assert {"query.weight", "key.weight", "value.weight", "scale"} <= taught
    if name.startswith("linformer"):
        assert {"project_keys", "project_values"} <= taught


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("chunk_len", [1, 2, 5, 7])
def test_any_chunking_of_calls_gives_the_same_logits(name: str, chunk_len: int) -> None:
    model, tokens = make(name).eval(), make_tokens(2, 53)
    with torch.no_grad():
        whole, state = read(model, tokens)
        parts, other = read(model, tokens, chunk_len=chunk_len)
    torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-8)
    for mine, theirs in zip(state.xl_caches, other.xl_caches, strict=True):
        assert mine.keys.shape == theirs.keys.shape


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("place", [0, 6, 7, 19, 51])
def test_a_changed_token_changes_nothing_before_it(name: str, place: int) -> None:
    model, tokens = make(name).eval(), make_tokens(1, 53)
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % SMALL.vocab_size
    with torch.no_grad():
        one, other = (read(model, t)[0] for t in (tokens, changed))
    # Sums of chunks may be added in another order: the tokens themselves are not.
    torch.testing.assert_close(one[:, :place], other[:, :place], rtol=0, atol=1e-12)
    assert not torch.allclose(one[:, place], other[:, place])


@pytest.mark.parametrize(
    ("name", "reach"),
    [("linformer", 4 + 15 + 2), ("compressive", 4 + 15 + 2), ("performer", 52)],
)
def test_it_sees_as_far_as_it_says(name: str, reach: int) -> None:
    """In one layer, without convolutions: beyond the window, slots and tokens of no whole slot."""
    model = make(name, num_layers=1, memory_layers=(), conv_len=0).eval()
    tokens = make_tokens(1, 53)
    with torch.no_grad():
        last = read(model, tokens)[0][:, -1]
        farthest = 0
        for place in range(53):
            changed = tokens.clone()
            changed[0, place] = (changed[0, place] + 1) % SMALL.vocab_size
            if not torch.equal(read(model, changed)[0][:, -1], last):
                farthest = max(farthest, 52 - place)
    assert reach - 2 <= farthest <= reach


@pytest.mark.parametrize("name", SETTINGS)
def test_a_documents_start_forgets_what_the_row_has_read(name: str) -> None:
    model, tokens = make(name).eval(), make_tokens(2, 31)
    with torch.no_grad():
        fresh, _ = read(model, tokens)
        _, state = read(model, make_tokens(2, 40, seed=3))
        state = state.start_documents(torch.tensor([True, False]))
        # Row 1 goes on, at another place than row 0.
        position = state.position.clone()
        again = model(tokens[:, :2], state).logits
    assert position.tolist() == [0, 40]
    torch.testing.assert_close(again[0], fresh[0, :2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(again[1], fresh[1, :2])


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_do_not_depend_on_one_another_nor_on_padding(name: str) -> None:
    """As in an evaluation: documents of unequal lengths beside each other, padded on the right."""
    model, lengths = make(name).eval(), (53, 23, 40)
    tokens = [make_tokens(1, n, seed=n)[0] for n in lengths]
    state, found = model.init_state(3), [[] for _ in lengths]
    with torch.no_grad():
        for begin in range(0, 53, 7):
            counts = torch.tensor([min(max(n - begin, 0), 7) for n in lengths])
            block = torch.zeros(3, int(counts.max()), dtype=torch.int64)
            for row, part in enumerate(tokens):
                block[row, : counts[row]] = part[begin : begin + int(counts[row])]
            valid = torch.arange(block.shape[1]) < counts.unsqueeze(1)
            output = model(block, state, valid=valid)
            state = output.state.commit()
            for row, count in enumerate(counts.tolist()):
                found[row].append(output.logits[row, :count])
        for row, part in enumerate(tokens):
            alone, _ = read(model, part.unsqueeze(0))
            torch.testing.assert_close(torch.cat(found[row]), alone[0], rtol=1e-9, atol=1e-9)
        # Rows at other places than their neighbors go on as they would alone.
        more = make_tokens(3, 2, seed=5)
        state = replace(state, position=torch.tensor(lengths))
        together = model(more, state).logits
        for row, part in enumerate(tokens):
            _, own = read(model, part.unsqueeze(0))
            torch.testing.assert_close(together[row], model(more[row : row + 1], own).logits[0])


@pytest.mark.parametrize("name", SETTINGS)
def test_bf16_is_near_fp32(name: str) -> None:
    tokens = make_tokens(2, 47)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make(name, torch.float32).eval()
        model.compute_dtype = dtype
        with torch.no_grad():
            logits[dtype] = read(model, tokens)[0].float()
    plain = MemorizingTransformer(CONFIG)
    plain.load_state_dict(make(name, torch.float32).state_dict(), strict=False)
    own = {}
    for dtype in (torch.float32, torch.bfloat16):
        plain.compute_dtype = dtype
        with torch.no_grad():
            own[dtype] = read(plain.eval(), tokens)[0].float()
    errors = [
        (pair[torch.float32] - pair[torch.bfloat16]).square().mean().sqrt()
        for pair in (logits, own)
    ]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_random_features_overflow_for_no_scale_and_no_length(scale: float) -> None:
    model = make("performer", torch.float32, num_layers=1, memory_layers=())
    (attention,) = (block.attention for block in model.blocks)
    with torch.no_grad():
        attention.scale.fill_(scale)
        attention.directions.copy_(draw_directions(2, 22, 11, 0) * 3)  # norms up to those of 64
        state = model.init_state(1)
        for _ in range(100):
            output = model(make_tokens(1, 7), state)
            assert output.logits.isfinite().all()
            state = output.state.commit()
        assert state.xl_caches[0].keys.isfinite().all()


def test_random_features_estimate_the_softmax_kernel() -> None:
    directions = draw_directions(1, 50_000, 10, seed=0)
    blocks = directions[0, :20].unflatten(0, (2, 10))
    products = torch.matmul(blocks, blocks.transpose(1, 2))
    assert products.sub(torch.diag_embed(products.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(1, 1, 7, 10), dim=-1)
    scale = torch.tensor([0.7])
    keys, _ = compute_features(x, directions, scale, is_query=False)
    queries, log_factor = compute_features(x, directions, scale, is_query=True)
    estimate = (queries * log_factor.exp().unsqueeze(-1)) @ keys.transpose(-1, -2)
    wanted = torch.exp(0.7 * x @ x.transpose(-1, -2))
    torch.testing.assert_close(estimate, wanted, rtol=0.07, atol=0)


@pytest.mark.parametrize("name", ["compressive", "compressive-1"])
def test_convolutions_learn_to_reconstruct_and_by_nothing_else(name: str) -> None:
    model = make(name, num_layers=1, memory_layers=(), conv_len=0)
    (block,) = model.blocks
    layer, tokens = block.attention, make_tokens(1, 28)
    state = model.init_state(1)
    for part in tokens.split(7, 1)[:3]:
        state = model(part, state).state.commit()
    model.zero_grad()
    sum_nats(
        model(tokens[:, 21:], state).logits, tokens[:, 21:], torch.ones(1, 7, dtype=torch.bool)
    ).backward()
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    x = block.attention_norm(model.embedding(tokens))
    p = project_whole_of_one(model, layer, x)
    q, k, v = (t[0].transpose(0, 1) for t in (p.scaled_queries, p.keys, p.values))
    loss = naive.reconstruct(layer, q, k, v, 21, 28)
    wanted = torch.autograd.grad(loss, [layer.compress_keys, layer.compress_values])
    for parameter, gradient in zip(("compress_keys", "compress_values"), wanted, strict=True):
        assert gradient.any() or name == "compressive-1"
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-7, atol=1e-12)
    model.eval()
    model.zero_grad()
    sum_nats(
        model(tokens[:, 21:], state).logits, tokens[:, 21:], torch.ones(1, 7, dtype=torch.bool)
    ).backward()
    assert layer.compress_keys.grad is None
    for parameter, gradient in found.items():
        if not parameter.startswith("compress"):
            torch.testing.assert_close(dict(layer.named_parameters())[parameter].grad, gradient)


def project_whole_of_one(model: MemorizingTransformer, layer: AttentionLayer, x: Tensor) -> Any:
    state = replace(model.init_state(1), segment_len=x.shape[1])
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64)
    layout = Layout.build(replace(model.config, segment_len=x.shape[1]), state, tokens, None)
    return layer.project(x, layout, None)


@pytest.mark.parametrize("name", SETTINGS)
def test_model_and_state_are_saved_and_go_on(name: str, tmp_path: Path) -> None:
    model, tokens = make(name, torch.float32).eval(), make_tokens(2, 30)
    save_model(tmp_path, model, None)
    loaded = load_model(tmp_path, make_model=choose_model(list_settings(name))).model
    with pytest.raises(CheckpointError, match="make_model"):
        load_model(tmp_path)
    with torch.no_grad():
        _, state = read(model, tokens)
        own = loaded.init_state(2).load_state_dict(state.state_dict())
        more = make_tokens(2, 5, seed=4)
        assert torch.equal(loaded(more, own).logits, model(more, state).logits)


def test_an_unknown_attention_and_one_with_a_memory_are_refused() -> None:
    assert split_settings(["a.b=1", "attention.kind=x"]) == (["attention.kind=x"], ["a.b=1"])
    assert choose_model(["model.capacity=0"]) is MemorizingTransformer
    with pytest.raises(ConfigError, match=r"kind is 'fourier'; allowed: linformer, performer"):
        choose_model(["attention.kind=fourier"])
    with pytest.raises(ConfigError, match=r"capacity is 8192, and performer reads no memory"):
        choose_model(["attention.kind=performer"])(ModelConfig(memory_layers=(1,), capacity=8192))


@pytest.mark.parametrize("name", SETTINGS)
def test_it_has_the_parameters_of_the_model_but_for_two_percent(name: str) -> None:
    plain = MemorizingTransformer(CONFIG)
    own = {n: p.shape for n, p in make(name).named_parameters()}
    assert {n: p.shape for n, p in plain.named_parameters()}.items() <= own.items()


def test_sums_of_features_are_kept_in_fp32_and_the_window_in_bf16() -> None:
    model, tokens = make("performer-beyond", torch.float32), make_tokens(3, 7)
    model.compute_dtype = torch.bfloat16
    cache = model(tokens, model.init_state(3)).state.xl_caches[0]
    assert isinstance(cache, Entries)
    assert (cache.keys.dtype, cache.keys.shape) == (torch.float32, (3, 2, 11 + 1, 11))
    assert (cache.values.dtype, cache.values.shape) == (torch.bfloat16, (3, 2, 2 * 5, 11))
