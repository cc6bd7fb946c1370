"""Timings that are ratios measured in one run, pair by pair."""

from memorizing.benchmark.decode import benchmark_decode
from memorizing.benchmark.read import benchmark_read
from memorizing.benchmark.recording import Recording, load_recording, record_search
from memorizing.benchmark.search import SearchShape, benchmark_search, choose_shape
from memorizing.benchmark.step import benchmark_step

__all__ = [
    "Recording",
    "SearchShape",
    "benchmark_decode",
    "benchmark_read",
    "benchmark_search",
    "benchmark_step",
    "choose_shape",
    "load_recording",
    "record_search",
]
