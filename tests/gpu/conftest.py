"""The device of these tests: a GPU, or with GPU_TESTS=cpu, tiny, the CPU they are rehearsed on."""

import pytest
import torch
from helpers import REHEARSED

from rope_vit_det import create_model


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    if REHEARSED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible here: make test-gpu, on a machine with one")
    return torch.device("cuda")


@pytest.fixture
def exact():
    """Products and convolutions in float32 are those of float32, not of TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture
def build(device):
    """A network by its arguments, the B/14 one unless rehearsed or named."""

    def build(name="rope_vit_reg1_t14" if REHEARSED else "rope_vit_reg4_b14", **kwargs):
        return create_model(name, **kwargs).to(device)

    return build
