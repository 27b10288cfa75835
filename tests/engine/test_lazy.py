"""LazyConfigs whose weights were trained on other pixels than they say."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from rope_vit_det.engine.lazy import check_lazy_config, load_lazy_config
from rope_vit_det.errors import InputError

RECIPE = "COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_100ep_lsj.py"
CONFIG = Path(__file__).parents[2] / "configs" / RECIPE


def _check(*overrides):
    # No dataset: here it is about weights.
    opts = ["dataloader.train.dataset.names=[]", *overrides]
    args = argparse.Namespace(config_file=[str(CONFIG)], opts=opts)
    check_lazy_config(load_lazy_config(args))


@pytest.mark.parametrize("prefix", ["birder:", ""])
def test_a_disagreement_is_refused_with_the_overrides_to_give(birder_file, prefix):
    path, _ = birder_file(size=(256, 224), config={"pt_grid_size": [16, 16]})
    given = (f"train.init_checkpoint={prefix}{path}", "model.input_format=BGR")
    with pytest.raises(InputError, match="trained with other settings") as error:
        _check(*given)
    found = re.search(r"set (model\..*); or set (train\S*)", str(error.value))
    overrides = shlex.split(found[1])
    assert sorted(override.split("=")[0] for override in overrides) == [
        "model.backbone.net.image_size",
        "model.backbone.net.name",
        "model.backbone.net.pt_grid_size",
        "model.input_format",
        "model.pixel_mean",
        "model.pixel_std",
    ]
    _check(*given, *overrides)
    with pytest.raises(InputError, match=r"set 'model.pixel_mean=\[127\.5,114\.75,102\.0\]'; or"):
        _check(*given, *overrides, "model.pixel_mean=[102.0,114.75,127.5]")
    _check(*given, found[2])


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"train.init_checkpoint .*nowhere.pt: no such file"):
        _check("train.init_checkpoint=birder:/nowhere.pt")
