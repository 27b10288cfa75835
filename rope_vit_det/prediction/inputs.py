"""What a prediction is made on: image files, or a video."""

import os
from collections.abc import Sequence

from ..errors import InputError
from ..utils.image_files import for_each_file, image_size

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


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


def check_images(paths: Sequence[str]) -> list[tuple[int, int]]:
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

    sizes = list(for_each_file(size, paths, "Looking at the images"))
    errors = [each for each in sizes if isinstance(each, InputError)]
    if errors:
        more = f" ({len(errors)} of {len(paths)} images cannot be read)" if errors[1:] else ""
        raise InputError(f"{errors[0]}{more}")
    return [each for each in sizes if not isinstance(each, InputError)]
