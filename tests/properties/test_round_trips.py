"""Weights of any small network through all formats and back, with birder reading along."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from birder.common import fs_ops
from hypothesis import given
from hypothesis import strategies as st

from rope_vit_det import create_model
from rope_vit_det.weights import WeightsInfo, read_weights_file, write_weights_file
from rope_vit_det.weights.convert import convert, resample_patches
from rope_vit_det.weights.info import architecture_from_config

NETWORK = "rope_vit_reg1_t16"
FRACTIONS = st.floats(0.01, 1)
NAMES = st.text(min_size=1, max_size=12).filter(lambda s: s.isprintable())


@st.composite
def files(draw):
    """A state dict and its info."""
    heads = draw(st.integers(1, 3))
    patch = draw(st.sampled_from([4, 7, 16]))
    config = {
        "patch_size": patch,
        "num_layers": draw(st.integers(1, 2)),
        "num_heads": heads,
        "hidden_dim": 8 * heads,
        "mlp_dim": draw(st.integers(1, 40)),
        "num_reg_tokens": draw(st.integers(0, 3)),
        "class_token": draw(st.booleans()),
        "pos_embed_special_tokens": draw(st.booleans()),
        "pre_norm": draw(st.booleans()),
        "attn_norm": draw(st.booleans()),
        "norm_layer_type": draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        "mlp_layer_type": draw(st.sampled_from(["FFN", "SwiGLU_FFN", "Norm_SwiGLU_FFN"])),
        "rope_rot_type": draw(st.sampled_from(["standard", "interleaved"])),
        "attn_pool_head": draw(st.booleans()),
        "pt_grid_size": draw(st.none() | st.lists(st.integers(1, 9), min_size=2, max_size=2)),
    }
    names = draw(st.lists(NAMES, max_size=4, unique=True))
    info = WeightsInfo(
        network=NETWORK,
        tag="x",
        num_classes=len(names),
        class_to_idx={name: i for i, name in enumerate(names)},
        image_size=(patch * draw(st.integers(1, 4)), patch * draw(st.integers(1, 4))),
        rgb_mean=tuple(draw(FRACTIONS) for _ in range(3)),
        rgb_std=tuple(draw(FRACTIONS) for _ in range(3)),
        config=config,
        birder_version="v0.8.4",
    )
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = create_model(
        NETWORK,
        num_classes=info.num_classes,
        image_size=info.image_size,
        **architecture_from_config(config, NETWORK),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    state = {key: torch.randn(t.shape).to(dtype) for key, t in model.state_dict().items()}
    return state, info


def _equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@given(files())
def test_every_format_and_back(file):
    state, info = file
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{NETWORK}_x{suffix}" for suffix in (".pt", ".safetensors", ".pth")]
        pt, safetensors, pth = (Path(folder, name) for name in names)
        write_weights_file(pt, state, info)
        convert(pt, safetensors)
        convert(safetensors, pth)
        convert(pth, pt, head_from=str(safetensors), force=True)
        for path in (safetensors, pt):
            read, told = read_weights_file(path)
            _equal(read, state)
            assert told == info
            theirs, also_told = fs_ops.load_model(
                torch.device("cpu"), NETWORK, path=path, inference=True, st=path is safetensors
            )
            _equal(theirs.state_dict(), {key: tensor.float() for key, tensor in state.items()})
            assert also_told.class_to_idx == info.class_to_idx
            assert also_told.custom_config == info.config


@given(files(), st.integers(1, 24))
def test_patches_of_another_size_give_the_same_tokens(file, patch_size):
    """As a network that resamples them on the fly."""
    state, info = file
    state = {key: tensor.float() for key, tensor in state.items()}

    def build(state, info, **arguments):
        arguments |= architecture_from_config(info.config, NETWORK)
        model = create_model(NETWORK, image_size=info.image_size, **arguments)
        model.load_state_dict(state)
        return model.eval()

    info = replace(info, num_classes=0, class_to_idx={})
    state = {key: t for key, t in state.items() if not key.startswith("classifier.")}
    strided = build(state, info, patch_stride=patch_size)
    resampled = build(*resample_patches(state, info, patch_size))
    image = torch.randn(1, 3, 3 * patch_size, 2 * patch_size)
    with torch.inference_mode():
        a, b = (
            strided.detection_features(image)["neck"],
            resampled.detection_features(image)["neck"],
        )
    assert resampled.pos_grid == strided.pos_grid
    assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))
