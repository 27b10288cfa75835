"""What tools/visualize_results.py does."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import InputError
from ..evaluation.matching import ImageMatches, match_images
from ..evaluation.results import find_task, read_results, read_truth, registered_files, restrict
from ..utils.image_files import read_rgb
from .mistakes import draw_mistakes
from .sheets import check_no_other_run, write_picture


def run(
    results: str,
    output: str,
    *,
    dataset: str | None = None,
    val_json: str | None = None,
    val_images: str | None = None,
    confidence_threshold: float = 0.5,
    iou: float = 0.5,
    number: int = 20,
) -> None:
    """Draws the images of a dataset on which a detector did worst, and lists all in a table.

    Args:
        results: see :func:`~rope_vit_det.evaluation.results.read_results`.
        output: the folder for the pictures, named in order.
        dataset: its name in Detectron2's catalog; or
        val_json, val_images: its COCO file and image folder.
        confidence_threshold: detections below are left out.
        iou: least overlap of a detection with its object.
        number: images to draw.

    Raises:
        InputError: nothing was written; says why.
    """
    if number < 1 or not 0 < iou <= 1 or not 0 <= confidence_threshold <= 1:
        raise InputError(
            "--number is 1 or more, --iou above 0 and up to 1, --confidence-threshold from 0 to 1"
        )
    if dataset and (val_json or val_images):
        raise InputError("--dataset, or --val-json and --val-images: one of them")
    if dataset:
        json_file, folder = registered_files(dataset)
    elif val_json and val_images:
        json_file, folder = val_json, val_images
    else:
        raise InputError("name the ground truth: --dataset, or --val-json and --val-images")
    truth = read_truth(json_file)
    found, covered = read_results(results, truth)
    truth = restrict(truth, covered)
    task = find_task(found, truth)
    matches = match_images(truth, found, min_score=confidence_threshold, iou=iou, task=task)
    worst = matches[:number]
    stems = [Path(each.image["file_name"]).stem for each in worst]
    names = [f"{rank:03d}_{stem}.png" for rank, stem in enumerate(stems, start=1)]
    check_no_other_run(output, names)
    pictures = draw_images(worst, folder, truth.cats, masks=task == "segm")
    for name, picture in zip(names, pictures, strict=True):
        write_picture(picture, Path(output, name))
    _print_summary(matches, task, iou, confidence_threshold)
    print(f"written: {output}, the {len(worst)} worst images, the worst first")


def draw_images(
    matches: Sequence[ImageMatches], folder: str, categories: dict, *, masks: bool
) -> list[np.ndarray]:
    """A picture of each image; see :func:`draw_mistakes`.

    Args:
        folder: of the images.
        categories: of the ground truth, by id.

    Raises:
        InputError: an image cannot be read.
    """
    names = {number: each["name"] for number, each in categories.items()}
    pictures = []
    for each in tqdm(matches, "drawing", unit="image", disable=None):
        image = read_rgb(os.path.join(folder, each.image["file_name"]))
        if image.shape[:2] != (each.image["height"], each.image["width"]):
            raise InputError(
                f"{each.image['file_name']} in {folder} has another size than in the ground truth"
            )
        pictures.append(draw_mistakes(image, each, names, masks=masks))
    return pictures


def _print_summary(matches: list[ImageMatches], task: str, iou: float, threshold: float) -> None:
    counts = [
        sum(len(getattr(each, kind)) for each in matches) for kind in ("found", "false", "missed")
    ]
    clean = sum(not each.num_mistakes for each in matches)
    print(
        f"{len(matches)} images, {task} IoU {iou}, score {threshold} or more: {counts[0]} objects "
        f"found, {counts[2]} missed, {counts[1]} false detections; {clean} images without a mistake"
    )
