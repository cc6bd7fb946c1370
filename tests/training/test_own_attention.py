"""A model with an attention of one's own is trained, resumed and loaded as the ordinary one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memorizing.config import Config, ModelConfig, TrainingConfig
from memorizing.data import SegmentLoader
from memorizing.errors import CheckpointError
from memorizing.memory import Entries
from memorizing.model import MemorizingTransformer
from memorizing.model.block import AttentionLayer, AttentionResult
from memorizing.training import Trainer, load_model, save_model, train
from tests.training.test_train import compare_checkpoints


class Average(AttentionLayer):
    """The mean of all values of the document so far, times a learned share per head."""

    def __init__(self, config: ModelConfig, has_memory: bool) -> None:
        super().__init__(config, has_memory)
        self.share = torch.nn.Parameter(torch.ones(config.num_heads))

    def init_cache(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> Entries:
        shape = (num_rows, self.config.num_heads, 1, self.config.head_dim)
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        return Entries(total, total[..., :1])

    def forward(self, x, layout, cache, recent, reading) -> AttentionResult:
        new = self.project(x, layout, recent)
        is_first = layout.at_start.view(-1, 1, 1, 1)
        before, count = (part.masked_fill(is_first, 0) for part in (cache.keys, cache.values))
        valid = layout.valid[:, None, :, None]
        totals = before + (new.values * valid).cumsum(2)
        counts = count + valid.cumsum(2)
        output = self.project_output(self.share.view(-1, 1, 1) * (totals / counts).to(x.dtype))
        kept = Entries(totals[:, :, -1:].detach(), counts[:, :, -1:].expand_as(count))
        live = Entries(new.keys, new.values) if self.has_memory else None
        return AttentionResult(output, kept, live, new.recent, None, None)


def make_average(config: ModelConfig) -> MemorizingTransformer:
    return MemorizingTransformer(config, Average)


def test_it_is_trained_resumed_bit_for_bit_and_loaded(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMORIZING_CACHE", str(tmp_path / "cache"))
    runs = [tmp_path / name for name in ("whole", "parts")]
    train(config, runs[0], progress=False, make_model=make_average)
    short = config.replace(["training.steps=4"])
    train(short, runs[1], progress=False, make_model=make_average)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attention\.share is \(2,\).*make_model"):
        train(config, runs[1], progress=False, resume=True)
    train(config, runs[1], progress=False, resume=True, make_model=make_average)
    last = Path("checkpoints") / "step-000006"
    compare_checkpoints(*(run / last for run in runs))
    with pytest.raises(
        CheckpointError, match=r"attention\.share is \(2,\), expected none.*make_mod"
    ):
        load_model(runs[0])
    loaded = load_model(runs[0], make_model=make_average).model
    assert all(isinstance(block.attention, Average) for block in loaded.blocks)
    assert all(bool((block.attention.share != 1).all()) for block in loaded.blocks)


def test_an_ordinary_checkpoint_is_not_read_as_one_of_another_attention(
    model_config: ModelConfig, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", MemorizingTransformer(model_config), None)
    with pytest.raises(CheckpointError, match=r"attention\.share is missing.*make_model"):
        load_model(tmp_path / "model", make_model=make_average)


def test_the_loop_evaluates_it_and_keeps_its_state_by_row(
    model_config: ModelConfig, training_config: TrainingConfig, documents
) -> None:
    torch.manual_seed(0)
    model = make_average(model_config)
    loader = SegmentLoader(documents, 6, model_config.segment_len, 0, seed=0, repeat=True)
    trainer = Trainer(model, loader, training_config)
    result = trainer.run()
    assert result.steps == 7
    assert {
        "row.0.xl_caches.0.keys",
        "row.5.xl_caches.2.values",
    } <= trainer._rows.state_dict().keys()
