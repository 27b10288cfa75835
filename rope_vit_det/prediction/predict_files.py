"""What tools/predict.py does."""

import difflib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import torch
from detectron2.structures import Instances
from tqdm import tqdm

from ..errors import InputError
from ..utils.image_files import any_number_of_pixels, find_images, load_batches, read_rgb
from ..visualization.predictions import draw_instances, draw_picture
from ..visualization.sheets import write_picture
from .inputs import check_images, find_video
from .label_files import Predictions
from .predictor import Predictor, Prepared
from .slicing import SlicedPredictor, check_slicing
from .video import Video, new_video

# What pictures are drawn on, if any are, and what the detector gets.
_Loaded: TypeAlias = tuple[np.ndarray | None, np.ndarray | Prepared]


def run(
    config_file: str,
    inputs: Sequence[str],
    *,
    weights: str | None = None,
    output: str | None = None,
    json_file: str | None = None,
    yolo: str | None = None,
    label_studio: str | None = None,
    confidence_threshold: float = 0.5,
    classes: Sequence[str] | None = None,
    categories: str | None = None,
    batch_size: int = 1,
    device: str | None = None,
    tta: bool = False,
    bf16: bool = False,
    slice_side: int | None = None,
    opts: Sequence[str] = (),
) -> int:
    """Detects objects in images or a video, and writes pictures, files for other tools, or both.

    Args:
        config_file, weights, categories, device, tta, bf16, opts: see :class:`Predictor`.
        inputs: images, folders and patterns, or one video.
        output: the folder for a PNG an image, or the MP4.
        json_file: the file for the detections in COCO's format.
        yolo: the folder for YOLO's data.yaml and labels of images.
        label_studio: the file for Label Studio's tasks with predictions, of images.
        confidence_threshold: least score.
        classes: names; None: all.
        batch_size: images at a time.
        slice_side: pixels of the side of slices for large images; None: images go whole.

    Returns:
        The exit status: 0, or 1 where images had to be left out, which stderr names.

    Raises:
        InputError: nothing was done, or, where memory or disk ends, nothing half-written.
    """
    written = [path for path in (output, json_file, yolo, label_studio) if path is not None]
    if not written:
        raise InputError(
            "nothing would be written: name --output, --json, --yolo or --label-studio"
        )
    if batch_size < 1:
        raise InputError(f"the batch size must be 1 or more, got {batch_size}")
    if slice_side is not None:
        check_slicing(slice_side)
    for path in written:
        _check_writable(path)
    video = find_video(inputs)
    if video and (yolo or label_studio):
        raise InputError(f"{video} is a video: --yolo and --label-studio are for images; --json")
    source = Video(video) if video else _Images(find_images(inputs), output, yolo, slice_side)
    predictor = Predictor(
        config_file,
        weights,
        opts=opts,
        threshold=confidence_threshold,
        categories=categories,
        device=device,
        tta=tta,
        bf16=bf16,
    )
    print(f"{predictor.cfg.MODEL.WEIGHTS}: {len(predictor.classes['names'])} classes", flush=True)
    keep = _class_numbers(classes, predictor.classes["names"])
    model = predictor if slice_side is None else SlicedPredictor(predictor, slice_side)
    work = _Work(model, keep)
    labels = Predictions(predictor.classes) if written != [output] else None
    start = time.perf_counter()
    left_out = 0
    if isinstance(source, Video):
        _predict_video(source, work, predictor, output, labels, batch_size)
    else:
        left_out = _predict_images(source, work, predictor, output, labels, batch_size)
    if labels and json_file:
        labels.write_coco(json_file)
    if labels and yolo and isinstance(source, _Images):
        labels.write_yolo(yolo, source.labels)
    if labels and label_studio:
        labels.write_label_studio(label_studio, predictor.cfg.MODEL.WEIGHTS)
    print(work.summary(time.perf_counter() - start, predictor))
    for path in written:
        print(f"written: {path}")
    if left_out and isinstance(source, _Images):
        print(f"{left_out} of {len(source.paths)} images left out, see above", file=sys.stderr)
    return 1 if left_out else 0


class _Images:
    """Image files, checked, and what is to be written of each."""

    def __init__(
        self, paths: list[str], output: str | None, yolo: str | None, slice_side: int | None
    ) -> None:
        self.pictures = _paths_within(output, paths, ".png") if output else {}
        self.labels = _paths_within(os.path.join(yolo, "labels"), paths, ".txt") if yolo else {}
        self.ids = {path: i for i, path in enumerate(paths, start=1)}
        self.are_sliced = slice_side is not None
        with any_number_of_pixels(self.are_sliced):
            sizes = dict(zip(paths, check_images(paths), strict=True))
        # Images of a size go through the network together.
        self.paths = sorted(paths, key=lambda path: sizes[path])


class _Work:
    """Runs the detector, and counts."""

    def __init__(self, model: Predictor | SlicedPredictor, keep: torch.Tensor | None) -> None:
        self._model: Any = model  # of slices: takes arrays alone
        self._keep = keep
        self.seconds = 0.0
        self.num_images = 0
        self.found: Counter[int] = Counter()

    def __call__(
        self, images: Sequence[np.ndarray | Prepared], channel_order: Literal["RGB", "BGR"]
    ) -> list[Instances]:
        start = time.perf_counter()
        results = self._model.predict(images, channel_order=channel_order)
        if self._keep is not None:
            results = [each[torch.isin(each.pred_classes, self._keep)] for each in results]
        self.seconds += time.perf_counter() - start
        self.num_images += len(images)
        for each in results:
            self.found.update(each.pred_classes.tolist())
        return results

    def summary(self, seconds: float, predictor: Predictor) -> str:
        names = predictor.classes["names"]
        found = ", ".join(f"{names[i]} {count}" for i, count in sorted(self.found.items()))
        return (
            f"{self.num_images} images, {self.found.total()} objects ({found or 'none'})\n"
            f"{seconds:.1f} s, {self.num_images / seconds:.2f} images/s with reading and writing, "
            f"{self.num_images / self.seconds:.2f} images/s in the detector, on "
            f"{predictor.device}"
        )


def _predict_images(
    source: _Images,
    work: _Work,
    predictor: Predictor,
    output: str | None,
    labels: Predictions | None,
    batch_size: int,
) -> int:
    """Returns how many images were left out."""

    def load(path: str) -> _Loaded | InputError:
        try:
            with any_number_of_pixels(source.are_sliced):
                image = read_rgb(path)
            drawn_on = image if output else None
            if source.are_sliced:
                predictor.check_size(image.shape[:2], path)
                return drawn_on, image
            return drawn_on, predictor.prepare(image, path)
        except InputError as error:
            return error

    errors = []
    if source.are_sliced:  # no large image waits while another is looked at
        batches: Iterator = ([(path, load(path))] for path in source.paths)
    else:
        batches = load_batches(source.paths, batch_size, load)
    with tqdm(total=len(source.paths), unit="image", disable=None) as bar:
        for loaded in batches:
            batch = [(p, *each) for p, each in loaded if not isinstance(each, InputError)]
            new = [error for _, error in loaded if isinstance(error, InputError)]
            for error in new:
                bar.write(f"left out: {error}", file=sys.stderr)
            errors += new
            results = work([made for *_, made in batch], "RGB") if batch else []
            for (path, image, _), found in zip(batch, results, strict=True):
                if labels:
                    labels.add(source.ids[path], found, file_name=path)
                if image is not None:
                    picture = draw_picture(image, found, predictor.metadata)
                    write_picture(picture, source.pictures[path])
            bar.update(len(loaded))
            # Before the next is read.
            image = picture = results = found = loaded = batch = None  # type: ignore[assignment]
    if len(errors) == len(source.paths):
        raise InputError(f"none of the {len(errors)} images can be used; the first, {errors[0]}")
    return len(errors)


def _predict_video(
    video: Video,
    work: _Work,
    predictor: Predictor,
    output: str | None,
    labels: Predictions | None,
    batch_size: int,
) -> None:
    number = 0
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=video.num_frames or None, unit="frame", disable=None))
        if output:
            path = Path(output, Path(video.path).stem + ".mp4")
            file = stack.enter_context(new_video(path, video.frame_rate))
        for frames in video.batches(batch_size):
            for frame, found in zip(frames, work(frames, "BGR"), strict=True):
                if output:
                    picture = draw_instances(frame[:, :, ::-1], found, predictor.metadata)
                    file.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
                if labels:
                    labels.add(number + 1, found, file_name=video.path, frame=number)
                number += 1
            bar.update(len(frames))
    if number < video.num_frames:
        print(f"{video.path}: {number} of the {video.num_frames} frames it should have were read")


def _class_numbers(wanted: Sequence[str] | None, names: list[str]) -> torch.Tensor | None:
    if wanted is None:
        return None
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1) or names[:20]
            raise InputError(f"--classes: no class {name!r}; there is {', '.join(close)}")
    return torch.tensor([i for i, name in enumerate(names) if name in wanted])


def _paths_within(output: str, paths: list[str], suffix: str) -> dict[str, str]:
    """A file in the folder for each image, whose names tell apart what has the same name."""
    folder = os.path.dirname(os.path.abspath(paths[0]))
    if len(paths) > 1:
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = [os.path.relpath(os.path.abspath(path), folder) for path in paths]
    stems = Counter(os.path.splitext(name)[0] for name in names)
    files = {}
    for path, name in zip(paths, names, strict=True):
        stem = os.path.splitext(name)[0]
        if stems[stem] > 1 and suffix == ".txt":
            raise InputError(f"{path}: another image has this name too, and YOLO one {stem}.txt")
        file = os.path.join(output, (stem if stems[stem] == 1 else name) + suffix)
        if any(os.path.exists(file) and os.path.samefile(file, each) for each in paths):
            raise InputError(f"--output {output}: {file} is one of the images; another folder")
        files[path] = file
    return files


def _check_writable(path: str) -> None:
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() and folder != Path(path).absolute():
        raise InputError(f"{path} cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path} cannot be written: {folder} is read-only")
