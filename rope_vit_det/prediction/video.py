"""Frames of a video, and a video of frames, through OpenCV. Frames are BGR, (H, W, 3) uint8."""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from ..errors import InputError
from ..utils.atomic_files import new_file

# OpenCV's FFmpeg reads it when it is first used; its own lines would stand beside ours.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

_FRAME_RATE = 25.0  # where a file does not say


class Video:
    """A video file that has a frame.

    Attributes:
        path: as given.
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
        read, _ = capture.read()
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        capture.release()
        if not read:
            raise InputError(f"{path} is no video, or one without a frame that OpenCV can read")
        self.frame_rate = rate if 0 < rate < 1000 else _FRAME_RATE
        self.num_frames = max(int(count), 0)

    def batches(self, size: int) -> Iterator[list[np.ndarray]]:
        """Its frames in order, `size` at a time, one batch ahead of whoever takes them."""
        capture = cv2.VideoCapture(self.path)

        def read() -> list[np.ndarray]:
            frames = iter(capture.read, None)
            whole = (frame for ok, frame in itertools.takewhile(lambda each: each[0], frames))
            return list(itertools.islice(whole, size))

        try:
            with ThreadPoolExecutor(1) as pool:
                ahead = pool.submit(read)
                while batch := ahead.result():
                    if len(batch) == size:
                        ahead = pool.submit(read)
                    yield batch
                    if len(batch) < size:
                        return
        finally:
            capture.release()


class VideoFile:
    """An MP4 that frames are written to; see :func:`new_video`."""

    def __init__(self, path: Path, frame_rate: float) -> None:
        self._path = path
        self._frame_rate = frame_rate
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame; all have the size of the first."""
        if self._writer is None:
            height, width = frame.shape[:2]
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(
                str(self._path), codec, self._frame_rate, (width, height)
            )
            if not self._writer.isOpened():
                raise InputError("this OpenCV cannot write MP4 (mp4v); leave --output out")
        self._writer.write(frame)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()


@contextmanager
def new_video(path: str | os.PathLike, frame_rate: float) -> Iterator[VideoFile]:
    """For writing an MP4 whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with new_file(path, force=True) as temporary:
        draft = temporary.with_suffix(".mp4")  # OpenCV chooses the format by it
        file = VideoFile(draft, frame_rate)
        try:
            yield file
            file.close()
            os.replace(draft, temporary)
        finally:
            file.close()
            draft.unlink(missing_ok=True)
