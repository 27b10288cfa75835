"""Optimizers, and what each layer learns at."""
