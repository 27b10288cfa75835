"""Speed and memory of the backbone beside its peers', measured in one process."""

from projects.benchmark.run import BenchmarkOptions, run_benchmark

__all__ = ["BenchmarkOptions", "run_benchmark"]
