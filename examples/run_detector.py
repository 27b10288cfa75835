#!/usr/bin/env python3
"""Runs a detector that tools/export_model.py wrote: run_detector.py detector.ts photo.jpg drawn.png

Needs torch, torchvision and pillow; neither rope_vit_det nor Detectron2.
"""

import json
import sys

import numpy as np
import torch
import torchvision  # its operators are part of the graph
from PIL import Image, ImageOps
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks


def load(path: str) -> tuple[torch.jit.ScriptModule, dict]:
    """The detector, and what it says about itself."""
    files = {"info.json": ""}
    detector = torch.jit.load(path, _extra_files=files)
    return detector, json.loads(files["info.json"])


def prepare(image: Image.Image, info: dict) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The image scaled and padded, (3, H, W), its height and width without padding, the scale."""
    short, long = sorted(image.size)
    scale = min(info["shortest_side"] / short, info["longest_side"] / long)
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(size, Image.Resampling.BILINEAR), np.float32)  # (h, w, 3), RGB
    if info["channels"] == "BGR":
        pixels = pixels[..., ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    height, width = tensor.shape[-2:]
    step = info["multiple_of"]
    padded = torch.nn.functional.pad(tensor, (0, -width % step, 0, -height % step))
    return padded, torch.tensor([height, width]), scale


def main(model_file: str, image_file: str, output: str, threshold: float = 0.5) -> None:
    detector, info = load(model_file)
    image = ImageOps.exif_transpose(Image.open(image_file)).convert("RGB")
    padded, inner, scale = prepare(image, info)
    with torch.no_grad():
        found = detector(padded, inner)
    keep = found["scores"] > threshold
    found = {name: values[keep] for name, values in found.items()}
    size = (image.height, image.width)
    boxes = torchvision.ops.clip_boxes_to_image(found["pred_boxes"] / scale, size)
    names = [info["classes"][number] for number in found["pred_classes"].tolist()]
    for name, score, box in zip(names, found["scores"].tolist(), boxes.tolist(), strict=True):
        print(f"{name} {score:.2f}", *(f"{side:.0f}" for side in box))

    drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if names:
        if "pred_masks" in found:
            masks = paste_masks_in_image(found["pred_masks"], boxes, size)[:, 0] > 0.5
            drawn = draw_segmentation_masks(drawn, masks, alpha=0.5)
        drawn = draw_bounding_boxes(drawn, boxes, names, width=2)
    Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(output)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
