"""Which files are meant by the images, folders and patterns of a command line."""

import glob
import os
from collections.abc import Iterator, Sequence

from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import InputError


def find_images(inputs: Sequence[str | os.PathLike]) -> list[str]:
    """Image files, in the order of the inputs, those of a folder or a pattern sorted; each once.

    Args:
        inputs: image files (of whatever name), folders (searched through, for files with the
            suffix of an image) and patterns (`**` for any depth; folders that match are searched).

    Raises:
        InputError: there are none; an input does not exist, or brings no image.
    """
    if not inputs:
        raise InputError("no images given: name image files, folders or patterns")
    found: dict[str, str] = {}
    for given in map(os.fspath, inputs):
        images = list(_images(given))
        if not images:
            raise InputError(
                f"{given} brings no image (suffixes looked for: {', '.join(IMG_EXTENSIONS)})"
            )
        for image in images:
            found.setdefault(os.path.abspath(image), image)
    return list(found.values())


def _images(given: str) -> Iterator[str]:
    if os.path.isdir(given):
        yield from _in_folder(given)
    elif os.path.lexists(given):
        yield given
    elif glob.has_magic(given):
        for match in sorted(glob.glob(given, recursive=True)):
            if os.path.isdir(match):
                yield from _in_folder(match)
            elif _is_image(match):
                yield match
    else:
        raise InputError(f"{given}: no such file or folder")


def _in_folder(folder: str) -> Iterator[str]:
    """Through linked folders too, but none twice: a link may lead back up."""
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        new = {os.path.realpath(os.path.join(parent, name)): name for name in sorted(folders)}
        folders[:] = [name for real, name in new.items() if real not in seen]
        seen.update(new)
        yield from (os.path.join(parent, name) for name in sorted(files) if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)
