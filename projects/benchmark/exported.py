"""Exported detectors and backbones beside the eager ones, on the CPU."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor, nn

from projects.benchmark.measure import machine, seconds, today
from rope_vit_det.config.run_config import read_run_config
from rope_vit_det.errors import InputError
from rope_vit_det.export import export_model
from rope_vit_det.export.openvino_file import inference_precisions, load_openvino, save_openvino
from rope_vit_det.export.pyramid import Pyramid, size_multiple, traced_size, with_padding
from rope_vit_det.export.traced_detector import find_instances, pad

_CONFIGS = Path(__file__).parents[2] / "configs"
# Those that the demo and the recipe of COCO train.
NETWORKS = {
    "rope_vit_reg4_demo16": "demo.yaml",
    "rope_vit_reg4_b14": "COCO-InstanceSegmentation/mask_rcnn_rope_vit_reg4_b14_1x.yaml",
}
_BATCHES = (1, 8)  # of the backbone
# For INT8: how many do not change the time that it takes.
_CALIBRATION = 4
_TOKEN = 16  # pixels
# Runtimes without fused attention hold the scores of all tokens beside all, more than once, and
# keep that memory: five runtimes together so many times.
_SCORES = 14
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}
EAGER, SCRIPT, ONNX = "eager fp32", "TorchScript fp32", "ONNX Runtime fp32"


def measure_exported(
    networks: Sequence[str] = tuple(NETWORKS),
    grids: Sequence[tuple[int, int]] = ((40, 40), (64, 64)),
    repeats: int = 5,
) -> dict[str, Any]:
    """Times one image of the detector, and batches of 1 and 8 of the backbone with its pyramid.

    Weights are random. Each round times every runtime once. Batches for which the memory of the
    machine is not enough are left out.

    Args:
        networks: of `NETWORKS`.
        grids: images' height and width in tokens of 16 pixels; they are padded to the multiple that
            files want, for the eager model too.
        repeats: rounds, after one that only warms up.

    Returns:
        A JSON-like dict: "date", "machine", "vnni", "measurements".

    Raises:
        InputError: an unknown network.
    """
    if unknown := [name for name in networks if name not in NETWORKS]:
        raise InputError(f"unknown network {unknown[0]!r}; known are {', '.join(NETWORKS)}")
    measurements = []
    with TemporaryDirectory() as folder:
        for network in networks:
            cfg, _ = read_run_config(str(_CONFIGS / NETWORKS[network]), ["MODEL.DEVICE", "cpu"])
            cfg.MODEL.WEIGHTS = ""
            torch.manual_seed(0)
            detector = build_model(cfg).eval()
            # Scores that differ, so that as many objects are found as may be.
            detector.roi_heads.box_predictor.cls_score.weight.data *= 20
            for part in ("detector", "backbone"):
                runs = _export(detector, part, Path(folder))
                for grid in grids:
                    for batch in _BATCHES if part == "backbone" else (1,):
                        inputs = _inputs(detector, part, grid, batch)
                        if not _fits(detector.backbone.net, inputs[0], batch):
                            continue
                        times = _time(runs, inputs, repeats)
                        for runtime, taken in times.items():
                            label = {"network": network, "part": part, "runtime": runtime}
                            label |= {"image": [_TOKEN * side for side in grid], "batch": batch}
                            label |= {"padded": list(inputs[0].shape[-2:])}
                            spent = {"median_s": median(taken), "seconds": taken}
                            measurements.append({**label, **spent})
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return {
        "date": today(),
        "machine": machine(torch.device("cpu")),
        "vnni": sorted(_VNNI & set(flags.split())),
        "measurements": measurements,
    }


def format_exported(results: Mapping[str, Any]) -> str:
    """The table of medians in Markdown, and two ratios of them."""
    measured = results["measurements"]
    runtimes = list(dict.fromkeys(m["runtime"] for m in measured))
    rows: dict[tuple, dict[str, float]] = {}
    for m in measured:
        key = (m["network"], m["part"], *("{}×{}".format(*m[side]) for side in ("image", "padded")))
        rows.setdefault((*key, m["batch"]), {})[m["runtime"]] = m["median_s"]
    table = [
        [
            *(str(each) for each in key),
            *(f"{times[runtime]:.3f}" for runtime in runtimes),
            f"{times[EAGER] / times[_openvino('f32')]:.2f}",
            f"{times[_openvino('f32')] / times[_openvino('int8')]:.2f}",
        ]
        for key, times in rows.items()
    ]
    ratios = ["OpenVINO f32, times as fast as eager", "INT8, times as fast as OpenVINO f32"]
    headers = ["network", "part", "px", "padded", "images", *(f"{r}, s" for r in runtimes), *ratios]
    about = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{results['date']}, {about['device']}, {about['threads']} threads, "
        f"instructions for INT8: {', '.join(results['vnni']) or 'none'}; {versions}\n\n"
        + tabulate(table, headers=headers, tablefmt="github", disable_numparse=True)
    )


def _openvino(precision: str) -> str:
    return f"OpenVINO {precision}"


def _export(detector: nn.Module, part: str, folder: Path) -> dict[str, Callable]:
    """A function from the inputs of a file, for each runtime."""
    step = size_multiple(detector)
    small = (traced_size(step)[0] // _TOKEN, traced_size(step)[1] // _TOKEN)
    padded, pyramid = with_padding(detector, step), Pyramid(detector).eval()
    graph = folder / "model.onnx"
    runs: dict[str, Callable]
    if part == "detector":
        image, _ = _inputs(detector, part, small, 1)
        runs = {EAGER: lambda *inputs: find_instances(padded, *inputs)}
        runs[SCRIPT] = export_model._save_ts(folder / "model.ts", padded, image, step, "")
        runs[ONNX] = export_model._save_onnx_detector(graph, padded, image, step, "")
    else:
        (images,) = _inputs(detector, part, small, 2)
        with torch.no_grad():
            script = torch.jit.trace(pyramid, images, strict=False, check_trace=False)
        runs = {EAGER: pyramid, SCRIPT: script}
        runs[ONNX] = export_model._save_onnx(graph, pyramid, images, step, "")
    calibration = [_inputs(detector, part, small, 1) for _ in range(_CALIBRATION)]
    for name, inputs in (("f32", None), ("int8", calibration)):
        path, kept = folder / f"{name}.model", folder / f"{name}.weights"
        path.write_bytes(graph.read_bytes())
        save_openvino(path, kept, "", images=inputs)
        runs[_openvino(name)] = load_openvino(path, kept, "f32")
        if name == "f32" and "bf16" in inference_precisions():
            runs[_openvino("bf16")] = load_openvino(path, kept, "bf16")
    return runs


def _inputs(
    detector: nn.Module, part: str, grid: tuple[int, int], batch: int
) -> tuple[Tensor, ...]:
    image = torch.rand(3, *(side * _TOKEN for side in grid)) * 255
    padded, size = pad(image, size_multiple(detector))
    return (padded, size) if part == "detector" else (padded.expand(batch, -1, -1, -1).clone(),)


def _fits(net: nn.Module, images: Tensor, batch: int) -> bool:
    tokens = images.shape[-2] * images.shape[-1] // _TOKEN**2
    scores = batch * net.encoder.block[0].attn.num_heads * tokens**2 * 4
    return _SCORES * scores < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _time(
    runs: Mapping[str, Callable], inputs: Sequence[Tensor], repeats: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {runtime: [] for runtime in runs}
    with torch.inference_mode():
        for turn in range(-1, repeats):
            for runtime, run in runs.items():
                taken = seconds(lambda run=run: run(*inputs), torch.device("cpu"))
                times[runtime] += [taken] * (turn >= 0)
    return times
