"""The demos: what memory is worth to two small models; what a model quotes that has read files."""

from memorizing.demo.pretrained import run_pretrained_demo
from memorizing.demo.run import run_demo

__all__ = ["run_demo", "run_pretrained_demo"]
