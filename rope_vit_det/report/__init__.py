"""A training on one HTML page: tools/report.py, and the end of the demo."""

from .run import write_report

__all__ = ["write_report"]
