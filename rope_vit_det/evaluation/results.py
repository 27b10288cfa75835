"""Results and ground truth in COCO's format, read and checked against each other."""

import os
from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO

from ..data.classes import registered
from ..data.coco_file import complete_coco, read_coco, read_json
from ..errors import InputError
from ..utils.arguments import is_id, is_number
from .fast import as_api


def read_truth(json_file: str | os.PathLike) -> COCO:
    """Ground truth, ready for pycocotools.

    Raises:
        InputError: it cannot be read, has no image, or is not what COCO's format asks for.
    """
    content = read_coco(json_file, needed=("images", "annotations", "categories"))
    if not content["images"]:
        raise InputError(f"{json_file} is an empty dataset: it has no image")
    return as_api(complete_coco(content, json_file))


def registered_files(name: str) -> tuple[str, str]:
    """(JSON file, image folder) of a dataset registered with Detectron2.

    Raises:
        InputError: there is none, or it is not one in COCO's format.
    """
    metadata = registered(name, "--dataset")
    if metadata.get("evaluator_type", None) != "coco" or not metadata.get("json_file", None):
        raise InputError(f"dataset {name!r} is no file in COCO's format")
    return metadata.json_file, metadata.image_root


def read_results(path: str | os.PathLike, truth: COCO) -> tuple[list[dict[str, Any]], set[int]]:
    """Detections, with the ids of the ground truth.

    Args:
        path: a list of COCO results, as Detectron2's evaluator leaves it, or a file of
            tools/predict.py, whose images are found again by their file names.

    Returns:
        The results, and the ids of the images that they are on (of a list: all).

    Raises:
        InputError: it cannot be read, is something else, or belongs to other images or classes.
    """
    content = read_json(path)
    is_file = isinstance(content, dict) and isinstance(content.get("images"), list)
    results = content.get("annotations") if is_file else content
    if not isinstance(results, list) or not all(map(_is_result, results)):
        raise InputError(
            f"{path} is neither a list of COCO results, with image_id, category_id, score and bbox "
            "or segmentation, nor a file of tools/predict.py"
        )
    covered = set(truth.imgs)
    if is_file:
        images = _match_files(path, content["images"], truth)
        results = [{**each, "image_id": images.get(each["image_id"])} for each in results]
        covered = set(images.values())
    _check_known(path, results, truth)
    return results, covered


def find_task(results: Sequence[dict[str, Any]], truth: COCO) -> str:
    """ "segm" where the results have masks, and the ground truth has some, else "bbox"."""
    has_masks = any("segmentation" in each for each in truth.dataset["annotations"])
    return "segm" if has_masks and all(each.get("segmentation") for each in results) else "bbox"


def restrict(truth: COCO, images: set[int]) -> COCO:
    """The ground truth of some images."""
    if images == set(truth.imgs):
        return truth
    annotations = [each for each in truth.dataset["annotations"] if each["image_id"] in images]
    listed = [each for each in truth.dataset["images"] if each["id"] in images]
    return as_api({**truth.dataset, "images": listed, "annotations": annotations})


def _is_result(each: Any) -> bool:
    return (
        isinstance(each, dict)
        and is_id(each.get("image_id"))
        and is_id(each.get("category_id"))
        and is_number(each.get("score"))
        and not {"bbox", "segmentation"}.isdisjoint(each)
    )


def _check_known(path: str | os.PathLike, results: list[dict], truth: COCO) -> None:
    for key, known, what in (
        ("image_id", truth.imgs, "images"),
        ("category_id", truth.cats, "categories"),
    ):
        strange = {each[key] for each in results if each[key] not in known}
        if strange:
            raise InputError(
                f"{path} belongs to another dataset: of its {len({r[key] for r in results})} "
                f"{what}, {len(strange)} are not in the ground truth, such as {key} "
                f"{sorted(strange, key=str)[0]}"
            )


def _match_files(path: str | os.PathLike, images: list, truth: COCO) -> dict[int, int]:
    """Ids in the results to ids in the ground truth, whose file names may leave a folder out."""
    by_name: dict[str, list[dict]] = {}
    for image in truth.imgs.values():
        by_name.setdefault(os.path.basename(image["file_name"]), []).append(image)
    ids = {}
    for image in images:
        if not isinstance(image, dict) or not is_id(image.get("id")):
            raise InputError(f"{path}: an image is no object with an id: {image!r}")
        full = "/" + str(image.get("file_name")).replace(os.sep, "/")
        same = by_name.get(os.path.basename(full), [])
        fitting = [each for each in same if full.endswith("/" + each["file_name"].lstrip("/"))]
        if len(fitting) != 1:
            raise InputError(
                f"{path} belongs to other images: {image.get('file_name')} is "
                f"{'there twice' if fitting else 'not'} in the ground truth"
            )
        ids[image["id"]] = fitting[0]["id"]
    return ids
