"""Whatever this machine's CPU: autocast to bf16 is followed, as on those that are fast at it."""

import pytest

from rope_vit_det.layers import cpu as cpu_kernels


@pytest.fixture(autouse=True)
def bf16_counts_as_fast(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_SLOW_BF16", False)
