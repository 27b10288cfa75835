#!/usr/bin/env python3
"""Runs a detector that tools/export_model.py wrote: run_detector.py detector.onnx photo.jpg out.png

Needs numpy, pillow and onnxruntime, or for detector.xml openvino, or for detector.ts torch and
torchvision; neither rope_vit_det nor Detectron2. A fourth argument is the least score that is drawn
(default: 0.5).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

COLOURS = ("red", "lime", "cyan", "yellow", "magenta", "orange", "white", "deepskyblue")


def load(path: str) -> tuple[Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]], dict]:
    """The detector, and what it says about itself."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        info = json.loads(session.get_modelmeta().custom_metadata_map["info"])
        names = [output.name for output in session.get_outputs()]
        return lambda image, size: dict(
            zip(names, session.run(names, {"image": image, "size": size}), strict=True)
        ), info

    if path.endswith(".xml"):
        import openvino

        core = openvino.Core()
        model = core.read_model(path)  # and the weights, from the .bin beside it
        # Of itself, OpenVINO would take bfloat16 where the CPU has AMX.
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        names = [output.any_name for output in model.outputs]

        def run(image: np.ndarray, size: np.ndarray) -> dict[str, np.ndarray]:
            # Not `infer`: on a single core it does not raise, and gives what it gave before.
            request.start_async({"image": image, "size": size})
            request.wait()
            return dict(zip(names, (each.data for each in request.output_tensors), strict=True))

        return run, json.loads(model.get_rt_info("info").value)

    import torch
    import torchvision  # noqa: F401 (its operators are part of the graph)

    files = {"info.json": ""}
    detector = torch.jit.load(path, _extra_files=files)

    @torch.inference_mode()
    def run(image: np.ndarray, size: np.ndarray) -> dict[str, np.ndarray]:
        found = detector(torch.from_numpy(image), torch.from_numpy(size))
        return {name: values.numpy() for name, values in found.items()}

    return run, json.loads(files["info.json"])


def prepare(image: Image.Image, info: dict) -> tuple[np.ndarray, np.ndarray, float]:
    """The image scaled and padded, (3, H, W), its height and width without padding, the scale."""
    short, long = sorted(image.size)
    scale = 1.0
    if info["shortest_side"]:  # 0: images as they are
        scale = min(info["shortest_side"] / short, info["longest_side"] / long)
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(size, Image.Resampling.BILINEAR), np.float32)  # (h, w, 3), RGB
    if info["channels"] == "BGR":
        pixels = pixels[..., ::-1]
    height, width = pixels.shape[:2]
    step = info["multiple_of"]
    padded = np.pad(pixels, ((0, -height % step), (0, -width % step), (0, 0)))
    return np.ascontiguousarray(padded.transpose(2, 0, 1)), np.array([height, width]), scale


def draw(image: Image.Image, found: dict[str, np.ndarray], names: list[str]) -> None:
    """Draws boxes (N, 4) in pixels of the image with names, and masks where there are some."""
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        colour = tuple(
            int(value) for value in 128 + 127 * np.cos(i * 2.4 + np.array([0, 2.1, 4.2]))
        )
        left, top, right, bottom = (round(float(side)) for side in found["pred_boxes"][i])
        if "pred_masks" in found:  # probabilities within the box
            size = (max(right - left, 1), max(bottom - top, 1))
            mask = Image.fromarray(found["pred_masks"][i, 0]).resize(
                size, Image.Resampling.BILINEAR
            )
            half = Image.fromarray(np.uint8(128 * (np.array(mask) > 0.5)))
            image.paste(Image.new("RGB", size, colour), (left, top), half)
        pen.rectangle((left, top, right, bottom), outline=colour, width=2)
        pen.text((left + 3, top + 2), name, fill=colour)


def main(model_file: str, image_file: str, output: str, threshold: float | str = 0.5) -> None:
    detector, info = load(model_file)
    image = ImageOps.exif_transpose(Image.open(image_file)).convert("RGB")
    padded, inner, scale = prepare(image, info)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    found = detector(padded, inner)
    found = {name: values[found["scores"] > float(threshold)] for name, values in found.items()}
    found["pred_boxes"] = (found["pred_boxes"] / scale).clip(0, [*image.size, *image.size])
    names = [info["classes"][number] for number in found["pred_classes"]]
    for name, score, box in zip(names, found["scores"], found["pred_boxes"], strict=True):
        print(f"{name} {score:.2f}", *(f"{side:.0f}" for side in box))
    draw(image, found, names)
    image.save(output)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
