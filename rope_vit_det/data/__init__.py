"""Datasets: checks before a run, and the generated one of the demo, registered on import."""

from .demo.dataset import register_demo_dataset

register_demo_dataset()
