#!/usr/bin/env python3
"""Runs an exported backbone with its pyramid: run_backbone.py backbone.onnx (or .xml, or .pt2)

Needs numpy and onnxruntime for .onnx, openvino for .xml, torch for .pt2; neither rope_vit_det nor
Detectron2.
"""

import json
import sys
from collections.abc import Callable

import numpy as np


def load(path: str) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], dict]:
    """From images (N, 3, H, W), float32, 0 to 255, to feature maps; and what the file says."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        info = json.loads(session.get_modelmeta().custom_metadata_map["info"])
        names = [output.name for output in session.get_outputs()]
        return lambda images: dict(
            zip(names, session.run(names, {"images": images}), strict=True)
        ), info

    if path.endswith(".xml"):
        import openvino

        core = openvino.Core()
        model = core.read_model(path)  # and the weights, from the .bin beside it
        # Of itself, OpenVINO would take bfloat16 where the CPU has AMX.
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        names = [output.any_name for output in model.outputs]

        def run(images: np.ndarray) -> dict[str, np.ndarray]:
            # Not `infer`: on a single core it does not raise, and gives what it gave before.
            request.start_async({"images": images})
            request.wait()
            return dict(
                zip(names, (each.data.copy() for each in request.output_tensors), strict=True)
            )

        return run, json.loads(model.get_rt_info("info").value)

    import torch

    files = {"info.json": ""}
    backbone = torch.export.load(path, extra_files=files).module()

    @torch.no_grad()
    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x.numpy() for name, x in backbone(torch.from_numpy(images)).items()}

    return run, json.loads(files["info.json"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    backbone, info = load(sys.argv[1])
    print(info)
    step = info["multiple_of"]  # with windows in the network: of whole ones
    size = [-(-side // step) * step for side in (512, 768)]
    images = np.random.default_rng(0).uniform(0, 255, (1, 3, *size)).astype(np.float32)
    for name, features in backbone(images).items():
        print(name, features.shape)
