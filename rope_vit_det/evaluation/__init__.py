"""Evaluators and plots."""
