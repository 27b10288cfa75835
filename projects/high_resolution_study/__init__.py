"""Experiments behind the advice in docs/."""
