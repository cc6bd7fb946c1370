"""Finetuning a model of `transformers` to use its memory."""

from memorizing.training.finetuning.run import finetune
from memorizing.training.finetuning.settings import FinetuneSettings

__all__ = ["FinetuneSettings", "finetune"]
