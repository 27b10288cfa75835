#!/usr/bin/env python3
"""Runs an exported backbone with its pyramid: run_backbone.py backbone.onnx (or .xml, or .pt2)

Needs numpy and onnxruntime for .onnx, openvino for .xml, torch for .pt2; neither rope_vit_det nor
Detectron2.
"""

import json
import sys

import numpy as np


def run_onnx(path: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Images (N, 3, H, W), float32, 0 to 255, to feature maps."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    print(json.loads(session.get_modelmeta().custom_metadata_map["info"]))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def run_xml(path: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Images (N, 3, H, W), float32, 0 to 255, to feature maps."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)  # and the weights, from the .bin beside it
    print(json.loads(model.get_rt_info("info").value))
    # Of itself, OpenVINO would take bfloat16 where the CPU has AMX.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    # Not `infer`: on a single core it does not raise, and gives what it gave before.
    request.start_async({"images": images})
    request.wait()
    names = [output.any_name for output in model.outputs]
    return {
        name: each.data.copy() for name, each in zip(names, request.output_tensors, strict=True)
    }


def run_pt2(path: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Images (N, 3, H, W), float32, 0 to 255, to feature maps."""
    import torch

    files = {"info.json": ""}
    backbone = torch.export.load(path, extra_files=files).module()
    print(json.loads(files["info.json"]))
    with torch.no_grad():
        return {name: x.numpy() for name, x in backbone(torch.from_numpy(images)).items()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = {"onnx": run_onnx, "xml": run_xml, "pt2": run_pt2}[sys.argv[1].rpartition(".")[2]]
    images = np.random.default_rng(0).uniform(0, 255, (1, 3, 512, 768)).astype(np.float32)
    for name, features in run(sys.argv[1], images).items():
        print(name, features.shape)
