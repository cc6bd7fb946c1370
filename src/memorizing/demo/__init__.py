"""The demo: two small models on real source code, one with memory, and what memory is worth."""

from memorizing.demo.run import run_demo

__all__ = ["run_demo"]
