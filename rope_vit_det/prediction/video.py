"""Frames of a video, and a video of frames, through OpenCV. Frames are BGR, (H, W, 3) uint8."""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cv2
import numpy as np

from ..errors import InputError
from ..utils.atomic_files import new_file

# OpenCV's FFmpeg reads it when it is first used; its own lines would stand beside ours.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_FRAME_RATE = 25.0  # where a file does not say


def find_video(inputs: Sequence[str]) -> str | None:
    """The video that inputs are; None: they are images.

    Raises:
        InputError: it does not exist, or something else is there beside it.
    """
    videos = [path for path in inputs if path.lower().endswith(VIDEO_SUFFIXES)]
    if not videos:
        return None
    if len(inputs) > 1:
        raise InputError(f"{videos[0]} is a video: name it alone, one video a run")
    if not os.path.isfile(videos[0]):
        raise InputError(f"{videos[0]}: no such file")
    return videos[0]


class Video:
    """A video file that has a frame.

    Attributes:
        path: as given.
        size: (width, height) of the first frame, in pixels.
        frame_rate: a second.
        num_frames: as the file says; 0: it does not.
    """

    def __init__(self, path: str) -> None:
        """
        Raises:
            InputError: OpenCV reads no frame from it.
        """
        self.path = path
        capture = cv2.VideoCapture(path)
        read, frame = capture.read()
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        capture.release()
        if not read:
            raise InputError(f"{path} is no video, or one without a frame that OpenCV can read")
        self.size = (frame.shape[1], frame.shape[0])
        self.frame_rate = rate if 0 < rate < 1000 else _FRAME_RATE
        self.num_frames = max(int(count), 0)

    def batches(self, size: int) -> Iterator[list[np.ndarray]]:
        """Its frames in order, `size` at a time, one batch ahead of whoever takes them."""
        capture = cv2.VideoCapture(self.path)
        read = itertools.takewhile(lambda each: each[0], iter(capture.read, None))
        frames = (frame for _, frame in read)

        def next_batch() -> list[np.ndarray]:
            return list(itertools.islice(frames, size))

        try:
            with ThreadPoolExecutor(1) as pool:
                ahead = pool.submit(next_batch)
                while batch := ahead.result():
                    ahead = pool.submit(next_batch)
                    yield batch
        finally:
            capture.release()


@contextmanager
def new_video(
    path: str | os.PathLike, frame_rate: float, size: tuple[int, int]
) -> Iterator[cv2.VideoWriter]:
    """For writing frames of a size, (width, height), to an MP4 whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with new_file(path, force=True) as temporary:
        draft = temporary.with_suffix(".mp4")  # OpenCV chooses the format by it
        writer = cv2.VideoWriter(str(draft), cv2.VideoWriter.fourcc(*"mp4v"), frame_rate, size)
        try:
            if not writer.isOpened():
                raise InputError("this OpenCV cannot write MP4 (mp4v); leave --output out")
            yield writer
            writer.release()
            os.replace(draft, temporary)
        finally:
            writer.release()
            draft.unlink(missing_ok=True)
