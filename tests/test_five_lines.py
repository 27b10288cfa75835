"""The README's promise: an existing Detectron2 script gets this backbone in five lines."""

import re
from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import detector_input

README = Path(__file__).parents[1] / "README.md"
ZOO_YAML = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def test_the_readmes_lines_train_an_unmodified_zoo_config():
    lines = re.search(r"```python\n(import rope_vit_det\n.*?)```", README.read_text(), re.S)[1]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 5
    # What stands in the script already.
    script = {"cfg": get_cfg()}
    load_zoo_yaml = f'cfg.merge_from_file(r"{model_zoo.get_config_file(ZOO_YAML)}")'
    before, after = lines.split("# your config as it was\n")
    exec(before + load_zoo_yaml + "\n" + after, script)

    cfg = script["cfg"]
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROPE_VIT.NAME = "rope_vit_reg1_t14"  # the README's own is large for a test
    model = build_model(cfg)
    with EventStorage():
        losses = model([detector_input(200, 270), detector_input(180, 150)])
        sum(losses.values()).backward()
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"} == set(losses)
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name

    model.eval()
    with torch.inference_mode():
        output = model([detector_input(200, 270)])[0]["instances"]
    assert output.image_size == (200, 270)
    assert output.pred_boxes.tensor.isfinite().all()
