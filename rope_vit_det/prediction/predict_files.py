"""What tools/predict.py does."""

import difflib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np
import torch
from detectron2.structures import Instances
from tqdm import tqdm

from ..errors import InputError
from ..utils.atomic_files import check_folder, check_new_file
from ..utils.image_files import (
    any_number_of_pixels,
    find_images,
    for_each_file,
    image_size,
    load_batches,
    read_rgb,
)
from ..visualization.predictions import draw_instances, draw_picture
from ..visualization.sheets import write_picture
from .label_files import Predictions
from .predictor import Predictor, Prepared
from .video import Video, find_video, new_video


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
    for folder in filter(None, (output, yolo)):
        check_folder(folder)
    for file in filter(None, (json_file, label_studio)):
        check_new_file(file, force=True)
    video = find_video(inputs)
    if video and (yolo or label_studio):
        raise InputError(f"{video} is a video: --yolo and --label-studio are for images; --json")
    paths = [video] if video else find_images(inputs)
    drawn = _paths_within(output, paths, ".mp4" if video else ".png") if output else {}
    labelled = _paths_within(os.path.join(yolo, "labels"), paths, ".txt") if yolo else {}
    _check_distinct(
        [*paths, *filter(None, (config_file, weights, categories))],
        {
            "--output": drawn.values(),
            "--yolo": (*labelled.values(), os.path.join(yolo, "data.yaml")) if yolo else (),
            "--json": filter(None, [json_file]),
            "--label-studio": filter(None, [label_studio]),
        },
    )
    source = Video(video) if video else _sizes(paths, any_size=slice_side is not None)
    predictor = Predictor(
        config_file,
        weights,
        opts=opts,
        threshold=confidence_threshold,
        categories=categories,
        device=device,
        tta=tta,
        bf16=bf16,
        slice_side=slice_side,
    )
    print(f"{predictor.cfg.MODEL.WEIGHTS}: {len(predictor.classes['names'])} classes", flush=True)
    keep = _class_numbers(classes, predictor.classes["names"])
    labels = Predictions(predictor.classes) if written != [output] else None
    work = _Work(predictor, keep, drawn, labels, batch_size)
    start = time.perf_counter()
    left_out = 0
    if isinstance(source, Video):
        work.predict_video(source)
    else:
        left_out = work.predict_images(source)
    if labels and json_file:
        labels.write_coco(json_file)
    if labels and yolo:
        labels.write_yolo(yolo, labelled)
    if labels and label_studio:
        labels.write_label_studio(label_studio, predictor.cfg.MODEL.WEIGHTS)
    print(work.summary(time.perf_counter() - start))
    for path in written:
        print(f"written: {path}")
    if left_out:
        print(f"{left_out} of {len(paths)} images left out, see above", file=sys.stderr)
    return 1 if left_out else 0


def _sizes(paths: Sequence[str], *, any_size: bool) -> dict[str, tuple[int, int]]:
    """Looks at every image, before the work starts, without decoding what looks whole.

    Returns:
        (height, width) of each.

    Raises:
        InputError: names the first that cannot be read, and says how many there are.
    """

    def size(path: str) -> tuple[int, int] | InputError:
        try:
            return image_size(path, ends=True)[::-1]
        except InputError as error:
            return InputError(f"{path}: {error}")

    with any_number_of_pixels(any_size):
        sizes = for_each_file(size, paths, "Looking at the images")
    errors = [each for each in sizes if isinstance(each, InputError)]
    if errors:
        more = f" ({len(errors)} of {len(paths)} images cannot be read)" if errors[1:] else ""
        raise InputError(f"{errors[0]}{more}")
    return {p: s for p, s in zip(paths, sizes, strict=True) if not isinstance(s, InputError)}


@dataclass
class _Work:
    """Runs the detector, draws and keeps what it finds, and counts."""

    predictor: Predictor
    keep: torch.Tensor | None  # classes; None: all
    drawn: Mapping[str, str]  # the picture or video of each input; empty: nothing is drawn
    labels: Predictions | None
    batch_size: int
    seconds: float = 0.0
    num_images: int = 0
    found: Counter[int] = field(default_factory=Counter)

    def predict(
        self, images: Sequence[np.ndarray | Prepared], channel_order: Literal["RGB", "BGR"]
    ) -> list[Instances]:
        start = time.perf_counter()
        results = self.predictor.predict(images, channel_order=channel_order)
        if self.keep is not None:
            results = [each[torch.isin(each.pred_classes, self.keep)] for each in results]
        self.seconds += time.perf_counter() - start
        self.num_images += len(images)
        for each in results:
            self.found.update(each.pred_classes.tolist())
        return results

    def summary(self, seconds: float) -> str:
        names = self.predictor.classes["names"]
        found = ", ".join(f"{names[i]} {count}" for i, count in sorted(self.found.items()))
        return (
            f"{self.num_images} images, {self.found.total()} objects ({found or 'none'})\n"
            f"{seconds:.1f} s, {self.num_images / seconds:.2f} images/s with reading and writing, "
            f"{self.num_images / self.seconds:.2f} images/s in the detector, on "
            f"{self.predictor.device}"
        )

    def predict_images(self, sizes: Mapping[str, tuple[int, int]]) -> int:
        """Returns how many images, whose sizes are given, were left out."""
        ids = {path: i for i, path in enumerate(sizes, start=1)}
        # Images of a size go through the network together.
        paths = sorted(sizes, key=lambda path: sizes[path])
        are_sliced = self.predictor.cfg.TEST.SLICE.ENABLED

        def load(path: str) -> tuple[np.ndarray | None, Prepared] | InputError:
            """What pictures are drawn on, if any are, and what the detector gets."""
            try:
                with any_number_of_pixels(are_sliced):
                    image = read_rgb(path)
                return image if self.drawn else None, self.predictor.prepare(image, path)
            except InputError as error:
                return error

        errors = []
        if are_sliced:  # no large image waits while another is looked at
            batches: Iterator = ([(path, load(path))] for path in paths)
        else:
            batches = load_batches(paths, self.batch_size, load)
        with tqdm(total=len(paths), unit="image", disable=None) as bar:
            for loaded in batches:
                batch = [(p, *each) for p, each in loaded if not isinstance(each, InputError)]
                new = [error for _, error in loaded if isinstance(error, InputError)]
                for error in new:
                    bar.write(f"left out: {error}", file=sys.stderr)
                errors += new
                results = self.predict([made for *_, made in batch], "RGB") if batch else []
                for (path, image, _), found in zip(batch, results, strict=True):
                    if self.labels:
                        self.labels.add(ids[path], found, file_name=path)
                    if image is not None:
                        picture = draw_picture(image, found, self.predictor.metadata)
                        write_picture(picture, self.drawn[path])
                bar.update(len(loaded))
                # Before the next is read.
                image = picture = results = found = loaded = batch = None  # type: ignore[assignment]
        if len(errors) == len(paths):
            raise InputError(
                f"none of the {len(errors)} images can be used; the first, {errors[0]}"
            )
        return len(errors)

    def predict_video(self, video: Video) -> None:
        number = 0
        path = self.drawn.get(video.path)
        drawn = new_video(path, video.frame_rate, video.size) if path else nullcontext()
        with tqdm(total=video.num_frames or None, unit="frame", disable=None) as bar, drawn as file:
            for frames in video.batches(self.batch_size):
                for frame, found in zip(frames, self.predict(frames, "BGR"), strict=True):
                    if file:
                        picture = draw_instances(frame[:, :, ::-1], found, self.predictor.metadata)
                        file.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
                    if self.labels:
                        self.labels.add(number + 1, found, file_name=video.path, frame=number)
                    number += 1
                bar.update(len(frames))
        if number < video.num_frames:
            print(
                f"{video.path}: {number} of the {video.num_frames} frames it should have were read"
            )


def _class_numbers(wanted: Sequence[str] | None, names: list[str]) -> torch.Tensor | None:
    if wanted is None:
        return None
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1) or names[:20]
            raise InputError(f"--classes: no class {name!r}; there is {', '.join(close)}")
    return torch.tensor([i for i, name in enumerate(names) if name in wanted])


def _paths_within(output: str, paths: list[str], suffix: str) -> dict[str, str]:
    """A file in the folder for each input, whose names tell apart what has the same name."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = [os.path.relpath(os.path.abspath(path), folder) for path in paths]
    stems = Counter(os.path.splitext(name)[0] for name in names)
    read = set(map(_identity, paths))
    files = {}
    for path, name in zip(paths, names, strict=True):
        stem = os.path.splitext(name)[0]
        if stems[stem] > 1 and suffix == ".txt":
            raise InputError(f"{path}: another image has this name too, and YOLO one {stem}.txt")
        plain = os.path.join(output, stem + suffix)
        if stems[stem] > 1 and _identity(plain) in read:
            raise InputError(
                f"--output {output}: {plain} is one of the inputs, as a picture of an earlier run "
                "would be; name another folder"
            )
        files[path] = plain if stems[stem] == 1 else os.path.join(output, name + suffix)
    return files


def _check_distinct(read: Iterable[str], written: Mapping[str, Iterable[str]]) -> None:
    """
    Args:
        read: files, and folders.
        written: files, by the option that asks for them.

    Raises:
        InputError: one would take the place of another.
    """
    users = {_identity(path): "is one of the inputs" for path in read}
    for option, files in written.items():
        for file in files:
            key = _identity(file)
            if key in users:
                raise InputError(f"{option}: {file} {users[key]}; name another file or folder")
            users[key] = f"is what {option} writes too"


def _identity(path: str) -> tuple[int, int] | str:
    """Of a file that is there or not yet, whatever path leads to it."""
    with suppress(OSError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino
    return os.path.realpath(path)
