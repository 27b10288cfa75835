#!/usr/bin/env python3
"""Brings the table in docs/networks.md up to date with the catalogue and the networks."""

from pathlib import Path

from rope_vit_det.weights.table import update_table

if __name__ == "__main__":
    update_table(Path(__file__).resolve().parents[1] / "docs" / "networks.md")
