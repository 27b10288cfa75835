"""Images that cannot be read, in Detectron2's loaders: named where they end a run, or skipped."""

import logging
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from detectron2.utils import comm

from ..errors import InputError
from ..utils.image_files import any_number_of_pixels, for_each_file, image_size

logger = logging.getLogger(__name__)


class ReadableMapper:
    """A mapper of Detectron2's that names the image which it cannot read."""

    def __init__(self, mapper: Callable[[dict], dict | None], *, any_size: bool = False) -> None:
        """
        Args:
            any_size: beyond Pillow's limit as well.
        """
        self.mapper = mapper
        self.any_size = any_size

    def __call__(self, record: dict) -> dict | None:
        """See :class:`detectron2.data.DatasetMapper`.

        Raises:
            InputError: the image is missing, or cannot be read.
        """
        with any_number_of_pixels(self.any_size):
            try:
                return self.mapper(record)
            except Exception:  # of any mapper, one of the user's too
                problem = _problem(record)
                if problem is None:
                    raise
                raise InputError(
                    f"{record['file_name']} cannot be read: {problem}; repair it, take it out of "
                    "the dataset, or set DATALOADER.SKIP_UNREADABLE True"
                ) from None


def readable_records(records: list[dict], names: tuple[str, ...], output_dir: str) -> list[dict]:
    """Leaves out the records whose image file cannot be decoded; they are counted and listed.

    All processes are to call it: each decodes its share.

    Args:
        records: in Detectron2's format.
        names: of their datasets; the list is `skipped_images_NAME.txt`.
        output_dir: where the list goes, of all that were skipped with the reason.

    Raises:
        InputError: none would be left.
    """
    share = range(comm.get_rank(), len(records), comm.get_world_size())
    problems = for_each_file(lambda i: _problem(records[i]), share, "Decoding the images")
    found = [(i, problem) for i, problem in zip(share, problems, strict=True) if problem]
    skipped = dict(sorted(chain.from_iterable(comm.all_gather(found))))
    if len(skipped) == len(records):
        raise InputError(f"not one image of {', '.join(names)} can be read: {skipped[0]}")
    if skipped and comm.is_main_process():
        path = Path(output_dir, f"skipped_images_{'_'.join(names)}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{records[i]['file_name']}: {problem}\n" for i, problem in skipped.items()]
        path.write_text("".join(lines), "utf-8")
        some = f"{len(skipped)} of {len(records)} images of {', '.join(names)}"
        logger.warning("Skipping %s, which cannot be read; they are listed in %s", some, path)
    return [record for i, record in enumerate(records) if i not in skipped]


def _problem(record: dict) -> str | None:
    """What is wrong with its image; None as well where it is no file of this machine's."""
    file = record.get("file_name")
    if not isinstance(file, str | os.PathLike) or "://" in os.fspath(file):
        return None
    if not os.path.isfile(file):  # to open a pipe would wait for ever
        return "no such file"
    try:
        image_size(file, decode=True)
    except InputError as error:
        return str(error)
    return None
