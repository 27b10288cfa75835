"""A training on one HTML page: tools/report.py, and the end of the demo."""

from .training_report import write_report

__all__ = ["write_report"]
