"""Reading a JSON file in COCO's format."""

import json
from collections.abc import Sequence
from typing import Any

from ..errors import InputError


def read_coco_json(path: str, needed: Sequence[str]) -> dict[str, Any]:
    """The content of a JSON file that should be COCO's.

    Args:
        needed: the lists that it must have, such as "images".

    Raises:
        InputError: it cannot be read, is no JSON, or lacks a list.
    """
    try:
        with open(path, encoding="utf-8") as file:
            coco = json.load(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    for field in needed:
        if not isinstance(coco, dict) or not isinstance(coco.get(field), list):
            raise InputError(
                f"{path} is not COCO instance annotation: it has no list {field!r}; see "
                "https://cocodataset.org/#format-data"
            )
    return coco
