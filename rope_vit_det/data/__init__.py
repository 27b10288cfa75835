"""Datasets: loading, one's own and the generated one of the demo, checks before a run."""

from .demo.dataset import register_demo_dataset

__all__ = ["register_demo_dataset"]
