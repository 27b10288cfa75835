"""Detectors and backbones as files that run without this package."""
