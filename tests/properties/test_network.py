"""The whole network on any grid, windows and batch, against the plain forward pass of reference."""

import torch
from helpers import move_off_initial_values, relative_difference
from hypothesis import given
from hypothesis import strategies as st
from reference import neck

from rope_vit_det.models import RoPEViT

SIDES = st.integers(1, 9)


@st.composite
def cases(draw):
    return {
        "grid": (draw(SIDES), draw(SIDES)),
        "pos_grid": (draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        "batch": draw(st.integers(1, 3)),
        "registers": draw(st.integers(0, 4)),
        "window": draw(st.integers(0, 10)),
        "global_blocks": draw(st.sampled_from([(), (0,), (1,), (0, 1), (0, 2)])),
        "pt_grid_size": draw(st.none() | st.tuples(SIDES, SIDES)),
        "tile": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(cases())
def test_the_neck_equals_the_reference(case):
    torch.manual_seed(case["seed"])
    patch = 4
    net = RoPEViT(
        patch_size=patch,
        hidden_dim=16,
        num_layers=3,
        num_heads=2,
        mlp_dim=24,
        num_reg_tokens=case["registers"],
        image_size=tuple(side * patch for side in case["pos_grid"]),
        window_size=case["window"],
        global_blocks=case["global_blocks"],
        pt_grid_size=case["pt_grid_size"],
        tile_pos_embed=case["tile"],
    )
    move_off_initial_values(net)
    height, width = case["grid"]
    image = torch.randn(case["batch"], 3, height * patch, width * patch)
    tile = None
    if case["tile"]:
        tile = (case["window"],) * 2 if case["window"] else case["pos_grid"]
    expected = neck(
        {key: value.double() for key, value in net.state_dict().items()},
        image.double(),
        patch=patch,
        heads=2,
        pos_grid=case["pos_grid"],
        window=case["window"],
        global_blocks=case["global_blocks"],
        pt_grid_size=case["pt_grid_size"],
        tile=tile,
    )
    with torch.inference_mode():
        found = net.detection_features(image)["neck"]
    assert relative_difference(found.double(), expected) < 1e-5
