"""Speed and memory of the backbone beside its peers', measured in one process."""

from .run import BenchmarkOptions, run_benchmark

__all__ = ["BenchmarkOptions", "run_benchmark"]
