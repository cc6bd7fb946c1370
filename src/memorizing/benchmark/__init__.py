"""Timings that are ratios measured in one run, pair by pair."""

from memorizing.benchmark.step import benchmark_step

__all__ = ["benchmark_step"]
