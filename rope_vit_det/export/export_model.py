"""Exporting, checking and evaluating, as a command line says."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.export import Dim

from ..config.keys import with_settings
from ..config.run_config import find_config_file, read_run_config
from ..data.classes import Classes, registered
from ..data.own import TRAIN, register_own_data, use_own_data
from ..engine.setup import check_config
from ..errors import InputError, check_packages
from ..layers.lora import merge_adapters
from ..models import RoPEViT
from ..prediction.load_detector import load_detector, read_detector_config
from ..utils.atomic_files import check_new_file, check_new_folder, new_file, new_folder
from ..utils.memory import bound_caches
from ..utils.own_process import in_own_process
from ..utils.torch_private import drop_guards
from ..weights.catalogue import published_weights
from ..weights.load import PREFIXES
from .bundle import write_bundle
from .checks import LIMITS, ONNX_LIMITS, check_images, compare_detections, compare_features
from .evaluation import ExportedDetector, compare_ap
from .onnx_detector import OnnxDetector
from .onnx_file import export_onnx, load_onnx
from .openvino_file import calibration_images, inference_precisions, load_openvino, save_openvino
from .pyramid import Pyramid, dynamic_sides, image_sizes, size_multiple, with_padding
from .traced_detector import pad, trace_detector

Run = Callable[..., Mapping[str, Tensor]]
INFO_FILE = "info.json"
# By suffix and part; the first part of a suffix is what is meant without --part.
_FORMATS = {
    (".ts", "detector"): "the detector as TorchScript",
    (".pt2", "backbone"): "the backbone with its pyramid, by torch.export",
    (".onnx", "backbone"): "the backbone with its pyramid, as ONNX",
    (".onnx", "detector"): "the detector as ONNX",
    (".xml", "backbone"): "the backbone with its pyramid, for OpenVINO",
    (".xml", "detector"): "the detector, for OpenVINO",
}


def run(
    *,
    config_file: str,
    output: str,
    part: str | None = None,
    weights: str | None = None,
    images: Sequence[str] = (),
    threshold: float = 0.05,
    categories: str | None = None,
    evaluate: bool = False,
    max_ap_loss: float | None = None,
    fp16: bool = False,
    int8: str | None = None,
    bundle: bool = False,
    force: bool = False,
    opts: Sequence[str] = (),
) -> None:
    """Exports a trained detector, or its backbone, and says how far the file is from it.

    The file gets its name only after all checks.

    Args:
        config_file: a config, or a training's OUTPUT_DIR.
        output: the file; its suffix says as what is exported: .ts, .pt2, .onnx or .xml.
        part: "detector" or "backbone", of .onnx and .xml; None: what the suffix has, of these two
            the backbone.
        weights: a checkpoint; None: see
            :func:`~rope_vit_det.prediction.load_detector.read_detector_config`.
        images: files to compare on; none: drawn images.
        threshold: least score of a detection.
        categories: a COCO file, for a checkpoint without class names.
        evaluate: compare AP on DATASETS.TEST.
        max_ap_loss: AP points, of 100, that may be lost; None: 0.1, or 1 of what INT8 leaves.
        fp16: keep weights in half the precision, in .xml. AP decides whether they are good enough,
            as of `int8`.
        int8: a registered dataset with which a .xml is quantised to 8 bits.
        bundle: make the file's folder, with what whoever gets it needs.
        force: replace a file.
        opts: KEY VALUE pairs over the config.

    Raises:
        InputError: for a wrong input.
        RunError: the exported file is not as good.
    """
    suffix = Path(output).suffix
    part = part or next((of for end, of in _FORMATS if end == suffix), "none")
    if (suffix, part) not in _FORMATS:
        known = "; ".join(f"{end} --part {of}: {what}" for (end, of), what in _FORMATS.items())
        raise InputError(f"{output}: the suffix and --part say what is exported ({known})")
    folder = Path(os.path.abspath(output)).parent
    if bundle:
        check_new_folder(folder)
    else:
        check_new_file(output, force=force)
    is_reduced = fp16 or int8 is not None
    if suffix == ".xml":
        check_packages("openvino", "nncf", extra="openvino")
        check_new_file(Path(output).with_suffix(".bin"), force=force)
    elif is_reduced:
        raise InputError(f"{output}: --fp16 and --int8 are for .xml")
    if fp16 and int8 is not None:
        raise InputError("--fp16 and --int8: one of them")
    if is_reduced and images:
        raise InputError("--image: --fp16 and --int8 are judged by AP, not on images")
    evaluate |= is_reduced
    if max_ap_loss is not None and not evaluate:
        raise InputError("--max-ap-loss is for --eval, which measures AP; add it")
    if max_ap_loss is None:
        max_ap_loss = 0.1 if int8 is None else 1.0
    bound_caches()
    if not os.path.isdir(config_file):
        config_file = find_config_file(config_file)
    on_cpu = {"MODEL.DEVICE": "files are made on the CPU"}
    cfg = read_detector_config(config_file, weights, opts, threshold, on_cpu)
    cfg.MODEL.DEVICE = "cpu"
    if evaluate:
        use_own_data(cfg, eval_only=int8 != TRAIN)
        register_own_data(cfg)
    cfg.freeze()
    if int8 is not None:
        registered(int8, "--int8")
        check_config(with_settings(cfg, {"DATASETS.TEST": (int8,)}), eval_only=True)
    if evaluate:
        check_config(cfg, eval_only=True)
    detector, classes = load_detector(cfg, categories)
    merge_adapters(detector)
    detector.float()  # a network in bf16, too: not all that runs these files knows it
    step = size_multiple(detector)
    traced, *others = check_images(images, image_sizes(step), cfg.INPUT.FORMAT)
    description = _info(cfg, detector, classes, step)
    description |= {"threshold": threshold, "pretrained": _pretrained(config_file)}
    info = json.dumps(description)
    what, ap = _FORMATS[suffix, part], None

    padded = with_padding(detector, step)
    pyramid = Pyramid(detector, step if suffix == ".pt2" else None).eval()

    with contextlib.ExitStack() as files:
        if bundle:
            folder = files.enter_context(new_folder(folder))
        file = folder / Path(output).name
        temporary = files.enter_context(new_file(file, force=force))
        if part == "detector":
            # Of odd sizes, so that cutting and padding is in the graph.
            traced, *others = (image[:, :-5, :-11] for image in (traced, *others))
            others.append(torch.full_like(traced, 128.0))  # in which nothing is found
            save = _save_ts if suffix == ".ts" else _save_onnx_detector
            found = save(temporary, padded, traced, step, info)
        else:
            # Another number of images at a time, too.
            others = [image[None] for image in others] + [torch.stack([traced, others[0]])]
            save_pyramid = _save_pt2 if suffix == ".pt2" else _save_onnx
            found = save_pyramid(temporary, pyramid, torch.stack([traced, traced]), step, info)
        runs: dict[str, Run] = {"f32": found}
        if suffix == ".xml":
            kept = files.enter_context(new_file(file.with_suffix(".bin"), force=force))
            images_of = int8 and calibration_images(cfg, int8, partial(_inputs, part, step))
            save_openvino(temporary, kept, info, fp16=fp16, images=images_of or None)
            runs = {each: load_openvino(temporary, kept, each) for each in inference_precisions()}
        if not is_reduced:
            if part == "detector":
                limits = LIMITS if suffix == ".ts" else ONNX_LIMITS
                summary = compare_detections(padded, runs["f32"], others, threshold, step, limits)
            else:
                summary = compare_features(pyramid, runs["f32"], others)
            print(summary, flush=True)
        if evaluate:

            def as_detector(run: Run) -> nn.Module:
                if part == "detector":
                    return ExportedDetector(run, step)
                return with_padding(detector, step, lambda images: run(pyramid.to_pixels(images)))

            words = "INT8, else {}" if int8 else "{}, weights f16" if fp16 else "{}"
            exported = {words.format(each): as_detector(run) for each, run in runs.items()}
            ap = compare_ap(cfg, detector, exported, max_ap_loss)
        if bundle:
            write_bundle(file, part, what, description, ap)
    written = {suffix, ".bin"} if suffix == ".xml" else {suffix}
    size = sum(os.path.getsize(Path(output).with_suffix(each)) for each in written) / 2**20
    print(f"{output}: {what}, {size:.1f} MiB; height and width: multiples of {step} px")


def _inputs(part: str, step: int, image: Tensor) -> tuple[Tensor, ...]:
    """Of a file, for an image (3, H, W)."""
    padded, size = pad(image, step)
    return (padded, size) if part == "detector" else (padded[None],)


def _save_ts(path: Path, detector: nn.Module, image: Tensor, step: int, info: str) -> Run:
    script = trace_detector(detector, image, step)
    script.save(str(path), _extra_files={INFO_FILE: info})
    return torch.jit.load(str(path))


def _save_onnx_detector(
    path: Path, detector: nn.Module, image: Tensor, step: int, info: str
) -> Run:
    model = OnnxDetector(detector).eval()
    inputs = dict(zip(("image", "size"), pad(image, step), strict=True))
    rows, columns = dynamic_sides(model.detector.backbone, step)
    return _write_onnx(path, model, inputs, ({1: rows, 2: columns}, None), model.names, step, info)


def _save_pt2(path: Path, pyramid: Pyramid, images: Tensor, step: int, info: str) -> Run:
    rows, columns = dynamic_sides(pyramid.backbone, step)
    shapes = ({0: Dim("batch", min=1), 2: rows, 3: columns},)
    with torch.no_grad():
        program = torch.export.export(pyramid, (images,), dynamic_shapes=shapes)
    # Newer torch would refuse other sizes by what it concluded from the multiple, in terms that
    # nobody can read, before the check in the graph. Ranges are checked all the same.
    drop_guards(program)
    # torch.export wants a name that ends in .pt2, or an open file.
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={INFO_FILE: info})
    with path.open("rb") as file:
        # No module within one: it cannot be switched to evaluation, which it is made for.
        return partial(torch.export.load(file).module())


def _save_onnx(path: Path, pyramid: Pyramid, images: Tensor, step: int, info: str) -> Run:
    rows, columns = dynamic_sides(pyramid.backbone, step)
    shapes = ({0: Dim("batch", min=1), 2: rows, 3: columns},)
    names = sorted(pyramid.backbone.output_shape())
    return _write_onnx(path, pyramid, {"images": images}, shapes, names, step, info)


def _write_onnx(path: Path, *arguments: Any) -> Run:
    path.write_bytes(in_own_process(partial(export_onnx, *arguments), "torch.onnx.export"))
    return load_onnx(path)


def _info(cfg: CfgNode, detector: nn.Module, classes: Classes, step: int) -> dict[str, Any]:
    """What whoever runs the file needs to know."""
    modules = detector.get_submodule("backbone").modules()
    is_ours = any(isinstance(each, RoPEViT) for each in modules)
    return {
        "network": cfg.MODEL.ROPE_VIT.NAME if is_ours else None,
        "channels": cfg.INPUT.FORMAT,
        "pixel_mean": detector.get_buffer("pixel_mean").flatten().tolist(),
        "pixel_std": detector.get_buffer("pixel_std").flatten().tolist(),
        "multiple_of": step,
        "shortest_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "classes": classes["names"],
        "category_ids": classes["ids"],
    }


def _pretrained(config_file: str) -> dict[str, str | None]:
    """Which weights the training began with, and their licence, where that is known."""
    source = read_run_config(config_file)[0].MODEL.WEIGHTS
    prefix, _, name = source.partition("//")
    known = published_weights().get(name) if prefix in PREFIXES else None
    source = name if known else os.path.basename(source)
    return {"weights": source or None, "licence": known.license if known else None}
